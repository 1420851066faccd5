"""Replays of models of many makes: their own forward passes, positions, heads and experts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from model_families import FAMILIES, REFUSED, Family
from tiny_models import SMALL, save_model, save_text
from transformers import LlamaConfig

from topt_vllm.calibration.head_errors import output_projection
from topt_vllm.cli.main import main
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.model import Subject, examine, load_causal_lm
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.replay import Replay
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.table.file import load as load_table
from topt_vllm.table.identity import identify

TOKENS = torch.randint(0, 256, (121,), generator=torch.Generator().manual_seed(0))
ROWS = 40


def each_family(quick: Callable[[Family], bool]) -> pytest.MarkDecorator:
    """All families, of which the fast loop runs the quick ones."""
    marked = [
        pytest.param(family, id=name, marks=[] if quick(family) else pytest.mark.slow)
        for name, family in FAMILIES.items()
    ]
    return pytest.mark.parametrize("family", marked)


def load(folder: Path, config: transformers.PretrainedConfig):
    return load_causal_lm(str(save_model(folder, config)), "cpu", "float32")


@each_family(quick=lambda family: not family.alike)
def test_a_replay_that_skips_nothing_has_the_models_own_losses(tmp_path, family):
    """Dense, and with the first or the last layer attended by a rule that keeps everything."""
    model, subject = load(tmp_path, family.config), examine(str(tmp_path))
    assert subject.full_layers == list(family.full)
    assert subject.identity.attention_free_layers == list(family.free)
    replay = Replay(model, subject, TOKENS.tolist(), ROWS)
    # Where there are softcaps or sinks SDPA would drop them.
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(TOKENS[None, :-1], use_cache=False).logits[0, -ROWS:]
    expected = torch.nn.functional.cross_entropy(logits, TOKENS[-ROWS:], reduction="none")
    assert expected.std() > 1e-3
    for layers in ([], subject.full_layers[:1], subject.full_layers[-1:]):
        rules = dict.fromkeys(layers, TopTheta({}))
        found = replay.compare(RuleAttention(subject, rules, replay.rows + 1))
        torch.testing.assert_close(found.dense, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)
        assert found.kl.abs().max() < 1e-5


def test_a_pass_makes_one_row_of_logits(tmp_path):
    """Those of a long sequence are large, and only some rows' are asked for."""
    model = load(tmp_path, FAMILIES["llama"].config)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    Replay(model, examine(str(tmp_path)), TOKENS.tolist(), ROWS)
    assert seen == [1, ROWS]


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_calibrated_is_refused_by_its_configuration(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ReplayError, match=message):
        examine(str(tmp_path))


def test_what_the_configuration_does_not_say_is_seen_by_the_dense_pass(tmp_path):
    """Layers that attend in chunks, or twice for each token."""
    model = load(tmp_path, REFUSED["llama4"][0])
    with pytest.raises(ReplayError, match="layer 0 attends with a mask that isn't its window's"):
        Replay(model, Subject(identify(model.config, "tiny"), 64, 257), TOKENS.tolist(), ROWS)
    model = load(tmp_path / "twice", REFUSED["diffllama"][0])
    FAMILIES["llama"].config.save_pretrained(tmp_path / "once")
    with pytest.raises(ReplayError, match="layer 0 attends more than once for each token"):
        Replay(model, examine(str(tmp_path / "once")), TOKENS.tolist(), ROWS)


def test_v_rows_are_counted_by_each_layers_own_heads(tmp_path):
    """Gemma 4's windowed layers have more KV heads than its full ones, and layers without attention have none."""
    contexts = torch.tensor([100, 200])
    FAMILIES["gemma4"].config.save_pretrained(tmp_path)
    assert examine(str(tmp_path)).v_rows(contexts) == [2 * 64, 300, 300]
    FAMILIES["nemotron-h"].config.save_pretrained(tmp_path)
    assert examine(str(tmp_path)).v_rows(contexts) == [0, 0, 2 * 300, 0]


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path, capsys):
    """transformers would stop and ask."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard-of", "auto_map": {"AutoConfig": "own.OwnConfig"}}),
        encoding="utf-8",
    )
    (tmp_path / "own.py").write_text("raise RuntimeError('run')", encoding="utf-8")
    with pytest.raises(ReplayError, match="it comes with code of its own; add --trust-remote-code"):
        examine(str(tmp_path))
    with pytest.raises(RuntimeError, match="run"):
        examine(str(tmp_path), trust_remote_code=True)


@each_family(quick=lambda family: family.quick)
def test_calibrate_and_evaluate(tmp_path, family):
    """Through the command line: a table of the expected layers, with which rows are skipped."""
    save_text(save_model(tmp_path, family.config) / "text.txt", 1300)
    model = ["--model", str(tmp_path), "--dataset", str(tmp_path / "text.txt"), "--device", "cpu"]
    sizes = ["--num-samples", "1", "--max-seq-length", "300", "--k", "16", "--dense-layers"]
    assert main(["calibrate", *model, *sizes]) == 0
    (budget,) = load_table(tmp_path / "toptheta.yaml").budgets
    assert [entry.layer for entry in budget.layers] == list(family.full)
    out = tmp_path / "out.json"
    asked = ["--rules", "toptheta", "--rows", "--budget", "16", "--max-seq-length", "300"]
    assert main(["evaluate", *model, *asked, "--decode-rows", "40", "--json", str(out)]) == 0
    (record,) = json.loads(out.read_text())
    assert 0 < record["v_rows_read"] < 1
    assert record["dropped_mass"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral", "qwen3-next", "gpt-oss"])
def test_calibrate_for_targets_and_evaluate_needles(tmp_path, name):
    save_text(save_model(tmp_path, FAMILIES[name].config) / "text.txt", 3700)
    model = ["--model", str(tmp_path), "--dataset", str(tmp_path / "text.txt"), "--device", "cpu"]
    budgets = ["--budget", "auto", "--k", "16", "--target-rows", "40"]
    assert main(["calibrate", *model, "--num-samples", "2", "--max-seq-length", "600", *budgets]) == 0
    out = tmp_path / "out.json"
    asked = ["--max-seq-length", "400", "--rows", "0.4", "--rules", "toptheta", "topk", "--k", "16"]
    assert main(["evaluate", *model, *asked, "--needles", "390", "--depths", "0.5", "--json", str(out)]) == 0
    assert len(json.loads(out.read_text())) == 6


def test_output_projection_of_gpt2_is_turned(tmp_path):
    """Its Conv1D multiplies from the other side."""
    model = load(tmp_path, FAMILIES["gpt2"].config)
    projection, heads = output_projection(model, 1, 32), torch.randn(5, 32)
    found = model.transformer.h[1].attn.c_proj
    torch.testing.assert_close(heads @ projection.T + found.bias, found(heads))


COMPRESSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "weights are compressed, and can't be read here: .*GPTQ"),
    "no method": ({"bits": 4}, "weights are compressed, and can't be read here: .*quant_method"),
}


@pytest.mark.parametrize(("quantisation", "message"), COMPRESSED.values(), ids=COMPRESSED.keys())
def test_compressed_weights_that_cannot_be_read_are_refused_before_they_are(
    tmp_path, monkeypatch, quantisation, message
):
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda: False)
    LlamaConfig(**SMALL, quantization_config=quantisation).save_pretrained(tmp_path)
    with pytest.raises(ReplayError, match=message):
        examine(str(tmp_path))


def test_output_projections_of_offloaded_layers_are_fetched(tmp_path):
    """Between forward passes accelerate leaves such weights on no device."""
    accelerate = pytest.importorskip("accelerate")
    model = load(tmp_path, FAMILIES["llama"].config)
    expected = output_projection(model, 1, 32).clone()
    devices = {name: "cpu" for name, _ in model.named_children()} | {"model": "disk"}
    accelerate.dispatch_model(model, devices, offload_dir=tmp_path / "offload", main_device="cpu")
    assert model.model.layers[1].self_attn.o_proj.weight.is_meta
    assert torch.equal(output_projection(model, 1, 32), expected)
    assert model.model.layers[1].self_attn.o_proj.weight.is_meta
