"""Captured caches and their replay: a tiny model's, through the command line."""

import itertools
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_families import FAMILIES
from safetensors.torch import save_file
from table_factory import make_table
from tiny_models import SMALL, byte_tokenizer, save_model, save_text
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from topt_vllm.attention.common import Selection
from topt_vllm.benchmarks.cache_file import CapturedCache, load
from topt_vllm.benchmarks.oracle import expect
from topt_vllm.benchmarks.replay import layer_inputs
from topt_vllm.cli.main import main
from topt_vllm.table.file import dump
from topt_vllm.table.schema import Budget, KeyStatistics, LayerKeys, LayerThresholds

SEQ_LEN = 700
FIELDS = {
    *("batch", "seq_len", "heads", "kv_heads", "head_dim", "dtype", "keep_target", "v_rows_read", "ms"),
    *(
        "ms_platform",
        "ratio_platform",
        "ratio_keep_all",
        "bytes_moved",
        "gbps",
        "bandwidth_share",
        "max_error",
    ),
    *("k_screen", "k_rows_read", "candidates", "loss"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bfloat16 model, a text, and a captured cache."""
    path = tmp_path_factory.mktemp("replay")
    save_model(path / "model", LlamaConfig(**SMALL | {"head_dim": 32}))
    AutoModelForCausalLM.from_pretrained(path / "model").bfloat16().save_pretrained(path / "model")
    save_text(path / "text.txt", 1000)
    assert main(capture_command(path, "cache.safetensors")) == 0
    return path


@pytest.fixture(scope="module")
def captured(folder: Path) -> CapturedCache:
    return load(folder / "cache.safetensors")


@pytest.fixture(scope="module")
def table(folder: Path, captured: CapturedCache) -> Path:
    """Budgets whose θ keep as many keys of the captured rows; layer 0 is dense."""
    made = make_table(captured.identity, ks=(16, 32), lengths=[256, 1024])

    def fitted(entry: LayerThresholds, k: int) -> LayerThresholds:
        ordered = layer_inputs(captured, entry.layer, 1, 128).scores(torch.float64)[0].sort(dim=-1).values
        theta = (ordered[:, -k] + ordered[:, -k - 1]) / 2
        return entry.model_copy(update={"theta": [[value, value] for value in theta.tolist()]})

    def refitted(budget: Budget) -> Budget:
        return budget.model_copy(update={"layers": [fitted(entry, budget.k) for entry in budget.layers]})

    keys = [
        LayerKeys(
            layer=index, mean=layer.key.float().mean(dim=1).tolist(), scale=[[1.0] * 32] * len(layer.key)
        )
        for index, layer in captured.layers.items()
    ]
    path = folder / "table.yaml"
    budgets = [refitted(budget) for budget in made.budgets]
    statistics = KeyStatistics(seed=0, layers=keys)
    dump(made.model_copy(update={"budgets": budgets, "key_statistics": statistics}), path)
    return path


def capture_command(folder: Path, output: str, *extra: str) -> list[str]:
    return shlex.split(
        f"bench capture --model {folder / 'model'} --dataset {folder / 'text.txt'} --seq-len {SEQ_LEN} "
        f"--output {folder / output} {shlex.join(extra)}"
    )


def replay_command(folder: Path, table: Path, *extra: str) -> list[str]:
    return shlex.split(
        f"bench decode --cache {folder / 'cache.safetensors'} --thresholds {table} --batch 1 --seconds 0 "
        f"{shlex.join(extra)}"
    )


def test_the_last_query_attends_to_the_cache_as_the_model_did(folder: Path, captured: CapturedCache):
    """Dense attention from the file against what each layer's output projection got in the model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").eval()
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1]))
    tokens = byte_tokenizer()((folder / "text.txt").read_text())["input_ids"][:SEQ_LEN]
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    assert list(captured.layers) == [0, 1, 2]
    for index, found in enumerate(seen):
        expectation = expect(layer_inputs(captured, index, 1, 128), None, Selection())
        assert expectation.error(found.view(1, 4, 32)) <= expectation.allowed


def test_a_file_holds_what_was_captured(captured: CapturedCache, tmp_path: Path):
    captured.save(tmp_path / "copy.safetensors")
    copy = load(tmp_path / "copy.safetensors")
    assert replace(copy, layers={}) == replace(captured, layers={})
    assert copy.text == "text.txt"
    assert copy.seq_len == SEQ_LEN
    assert copy.identity.fingerprint == captured.identity.fingerprint
    for index, layer in captured.layers.items():
        assert torch.equal(copy.layers[index].key, layer.key)
        assert torch.equal(copy.layers[index].value, layer.value)
        assert torch.equal(copy.layers[index].query, layer.query)


def test_softcap_is_kept_and_windowed_layers_are_not(tmp_path: Path):
    sizes = SMALL | {"num_hidden_layers": 2, "sliding_window": 64}
    save_model(
        tmp_path / "model", Gemma2Config(**sizes, attn_logit_softcapping=7.0, query_pre_attn_scalar=16)
    )
    save_text(tmp_path / "text.txt", 1000)
    assert main(capture_command(tmp_path, "cache.safetensors")) == 0
    cache = load(tmp_path / "cache.safetensors")
    assert (list(cache.layers), cache.softcap, cache.scale) == ([1], 7.0, 0.25)
    assert layer_inputs(cache, 1, 1, 64).scores(torch.float32)[0].abs().max() <= 7.0


def test_what_a_captured_cache_has_no_place_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_model(tmp_path / "model", FAMILIES["gpt-oss"].config)
    save_text(tmp_path / "text.txt", 1000)
    assert main(capture_command(tmp_path, "cache.safetensors")) == 2
    assert "it has attention sinks, for which a captured cache has no place" in capsys.readouterr().err
    assert not (tmp_path / "cache.safetensors").exists()


def test_every_sequence_has_blocks_of_its_own(captured: CapturedCache):
    inputs = layer_inputs(captured, 1, 2, 128)
    assert sorted(inputs.batch.block_table.flatten().tolist()) == list(range(12))
    assert inputs.batch.block_table.tolist() != torch.arange(12).view(2, 6).tolist()
    for sequence, head in itertools.product(range(2), range(2)):
        key, value = inputs.gather(sequence, head, torch.bfloat16)
        assert torch.equal(key, captured.layers[1].key[head])
        assert torch.equal(value, captured.layers[1].value[head])
    assert inputs.cache.key.stride(2) == 1


@pytest.mark.usefixtures("screens_anywhere")
def test_replay_reports_every_budget_and_screen(
    folder: Path, table: Path, capsys: pytest.CaptureFixture[str]
):
    report = folder / "report.json"
    arguments = ("--k", "16", "32", "--k-screen", "off", "int4+4", "--json", str(report))
    assert main(replay_command(folder, table, *arguments)) == 0
    records = json.loads(report.read_text())
    assert [(r["k"], r["k_screen"]) for r in records] == [
        (None, "off"),
        (16, "off"),
        (16, "int4+4"),
        (32, "off"),
        (32, "int4+4"),
    ]
    for record in records:
        assert set(record) >= FIELDS
        # Layer 0 is dense in the table, so two of three are called.
        assert (record["batch"], record["seq_len"], record["layers"]) == (1, SEQ_LEN, 2)
        assert record["rounds"] >= 7
    dense, off, screened = records[:3]
    assert (dense["v_rows_read"], dense["k_rows_read"], off["k_rows_read"]) == (1.0, 1.0, 1.0)
    assert screened["v_rows_read"] == pytest.approx(off["v_rows_read"], rel=0.1)
    assert off["v_rows_read"] < 0.3
    assert (screened["k_rows_read"], off["candidates"]) == (0.0, 1.0)
    assert off["v_rows_read"] < screened["candidates"] < 1.0
    assert screened["bytes_moved"] < off["bytes_moved"]
    assert screened["loss"] == pytest.approx(off["loss"], rel=0.1)
    assert dense["ratio_keep_all"] == 1.0
    out = capsys.readouterr().out
    assert f"{SEQ_LEN} tokens of text.txt" in out
    assert "k=32" in out


def test_only_named_layers_and_batches(folder: Path, table: Path):
    report = folder / "layers.json"
    arguments = ("--budget", "16", "--layers", "2", "--batch", "1", "3", "--json", str(report))
    assert main(replay_command(folder, table, *arguments)) == 0
    records = json.loads(report.read_text())
    assert [(r["batch"], r["layers"]) for r in records] == [(1, 1), (1, 1), (3, 1), (3, 1)]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("topt-vllm: error: ")
    return captured.err


REFUSED_REPLAYS = {
    "another length": (["--seq-lens", "800"], "--seq-lens describes a synthetic cache"),
    "a share": (["--keep", "0.1"], "--keep describes a synthetic cache"),
    "no such budget": (["--budget", "17"], "budget is 17, but the table has budgets 16, 32"),
    "a dense layer": (
        ["--layers", "0", "1"],
        "--layers [0] are not sparse with budget 32; those in the file are [1, 2]",
    ),
    "no thresholds": (["--thresholds", "none"], "a replay needs thresholds"),
    "no such table": (["--thresholds", "missing.yaml"], "missing.yaml: can't be read"),
    "no such file": (["--cache", "missing.safetensors"], "missing.safetensors: not a captured cache"),
}


@pytest.mark.parametrize(("extra", "message"), REFUSED_REPLAYS.values(), ids=REFUSED_REPLAYS.keys())
def test_a_replay_that_makes_no_sense_is_refused(
    folder: Path, table: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
):
    assert message in refused(capsys, replay_command(folder, table, *extra))


def test_options_of_a_replay_need_a_cache(capsys: pytest.CaptureFixture[str]):
    for option in ("--budget", "--layers", "--thresholds"):
        assert f"{option} is for replays" in refused(capsys, ["bench", "decode", option, "1"])


def test_a_table_of_another_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    dump(make_table(), folder / "other.yaml")
    assert "this table belongs to tiny" in refused(capsys, replay_command(folder, folder / "other.yaml"))


def test_files_that_are_no_captures_are_refused(
    folder: Path, table: Path, captured: CapturedCache, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    path = tmp_path / "bad.safetensors"
    arguments = replay_command(folder, table, "--cache", str(path))
    path.write_bytes(b"not safetensors at all")
    assert "not a captured cache" in refused(capsys, arguments)
    save_file({"a": torch.zeros(1)}, path)
    assert "format is None" in refused(capsys, arguments)
    with pytest.raises(FileExistsError):
        captured.save(path)
    path.unlink()
    replace(captured, seq_len=SEQ_LEN + 1).save(path)
    assert "layer.0.key is torch.bfloat16 (2, 700, 32), the header says" in refused(capsys, arguments)


REFUSED_CAPTURES = {
    "text too short": (["--seq-len", "1001"], "the text has 1000 tokens; --seq-len is 1001"),
    "context too short": (["--seq-len", "2049"], "--seq-len is 2049, but the model's context is 2048"),
    "no tokens": (["--seq-len", "0"], "--seq-len is 0"),
    "no such model": (["--model", "./missing"], "--model ./missing: "),
    "no such text": (["--dataset", "missing.txt"], "--dataset missing.txt: no such file"),
    "no such folder": (["--output", "/nowhere/cache.safetensors"], "the folder /nowhere does not exist"),
}


@pytest.mark.parametrize(("extra", "message"), REFUSED_CAPTURES.values(), ids=REFUSED_CAPTURES.keys())
def test_a_capture_that_makes_no_sense_is_refused_before_the_weights(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    message: str,
):
    monkeypatch.setattr("topt_vllm.benchmarks.capture.load_causal_lm", pytest.fail)
    assert message in refused(capsys, capture_command(folder, "new.safetensors", *extra))
    assert not (folder / "new.safetensors").exists()


def test_a_capture_replaces_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert "exists; name another file" in refused(capsys, capture_command(folder, "cache.safetensors"))
