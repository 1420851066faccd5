"""The engine benchmark: what engines are asked for and what is made of their answers; one test runs real ones."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import SMALL, save_model
from transformers import AutoConfig, LlamaConfig

from topt_vllm.benchmarks import engine_main
from topt_vllm.benchmarks.engine import EngineBenchmark
from topt_vllm.benchmarks.model_shapes import SHAPES, has_weights, write_checkpoint
from topt_vllm.benchmarks.share_table import share_table
from topt_vllm.cli.main import main
from topt_vllm.engines.process import EngineError
from topt_vllm.table.file import load
from topt_vllm.table.identity import identify
from topt_vllm.table.schema import ThresholdTable

LAYERS, HEADS = SMALL["num_hidden_layers"], SMALL["num_attention_heads"]
TOTALS = {
    "toptheta:v_rows_total": 1000.0,
    "toptheta:v_rows_read_total": 104.0,
    "toptheta:decode_rows_total": 50.0,
    "dense_rows:no_thresholds": 0.0,
}


def config_only(folder: Path) -> Path:
    """A tiny model's folder without weights."""
    path = folder / "tiny"
    # Heads of a size that vLLM's kernels have.
    LlamaConfig(**{**SMALL, "head_dim": 32}, architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return path


def benchmark(model: Path, **changes: Any) -> EngineBenchmark:
    settings: dict[str, Any] = {
        "model": model,
        "batch": 2,
        "context": 300,
        "tokens": 5,
        "keeps": (1.0, 0.1, "none"),
        "kernel": "cpu",
        **changes,
    }
    return EngineBenchmark(**settings)


class Engines:
    """Answers in the engines' place: the platform takes 8 ms a step, TOPTHETA 4 ms."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.tables: list[ThresholdTable] = []

    def ask(
        self, program: Sequence[str], request: dict[str, Any], separate: bool, limit: float
    ) -> dict[str, Any]:
        self.requests.append(json.loads(json.dumps(request)))
        if "keeps" in request:
            shares = [[[0.5 + head for head in range(HEADS)] for _ in request["keeps"]]]
            sums = torch.ones(6, SMALL["num_key_value_heads"], 32).tolist()
            layers = [str(layer) for layer in range(LAYERS)]
            return {"thetas": dict.fromkeys(layers, shares[0]), "keys": dict.fromkeys(layers, sums)}
        settings = request["engine"].get("additional_config")
        if settings and settings["toptheta"]["thresholds"] != "none":
            self.tables.append(load(Path(settings["toptheta"]["thresholds"])))
        ms = 4.0 if settings else 8.0
        return {
            "backend": "TOPTHETA" if settings else "CPU_ATTN",
            "start_seconds": 1.0,
            "prefill_seconds": 2.0,
            "ms_per_step": [ms, ms + 1, ms + 9][: request["turns"]],
            "totals": TOTALS if settings else None,
        }


def test_engines_run_one_after_the_other_with_what_tells_them_apart(tmp_path: Path):
    engines = Engines()
    outcome = benchmark(config_only(tmp_path), engine={"enforce_eager": False}).run(
        lambda _: None, engines.ask
    )
    finding, *timed = engines.requests
    assert finding["keeps"] == [0.1]
    assert finding["engine"]["enforce_eager"] is True
    assert [request["engine"].get("attention_backend") for request in timed] == [None, *["TOPTHETA"] * 3]
    settings = [request["engine"].get("additional_config", {}).get("toptheta") for request in timed]
    assert settings[0] is None
    assert settings[1] == {"thresholds": "none", "implementation": "cpu"}
    assert settings[2] is not None
    assert settings[2]["budget"] == "rows-10%"
    assert settings[3] == {"thresholds": "none"}
    ours = {"attention_backend", "additional_config"}
    alike = [{k: v for k, v in request["engine"].items() if k not in ours} for request in timed]
    assert alike[0]["load_format"] == "dummy"
    assert alike[0]["enforce_eager"] is False
    assert all(each == alike[0] for each in alike)
    stock, every, sparse, _ = outcome["engines"]
    assert (stock["name"], stock["backend"], stock["v_rows_read"]) == ("platform", "CPU_ATTN", None)
    assert (stock["ms_per_step"], stock["ratio_platform"], every["ratio_platform"]) == (9.0, 1.0, 9 / 5)
    assert sparse["v_rows_read"] == 0.104
    assert sparse["dense_rows"] == {}
    assert sparse["tokens_per_second"] == 2e3 / 5
    json.dumps(outcome)


def test_the_table_holds_what_was_found_from_the_context_on(tmp_path: Path):
    engines, model = Engines(), config_only(tmp_path)
    benchmark(model).run(lambda _: None, engines.ask)
    (table,) = engines.tables
    assert table.model == identify(AutoConfig.from_pretrained(model), "tiny")
    found = table.budget("rows-10%").thetas(table.lengths)
    assert set(found) == set(range(LAYERS))
    for n in (300, 303, 305, 4000):
        assert found[0].at(n).tolist() == [0.5, 1.5, 2.5, 3.5]
    assert found[0].at(299).max() == -torch.inf


def test_contexts_may_lie_below_the_table(tmp_path: Path):
    engines = Engines()
    benchmark(config_only(tmp_path), keeps=(0.1,), first_length=1000).run(lambda _: None, engines.ask)
    thetas = engines.tables[0].budget("rows-10%").thetas(engines.tables[0].lengths)[0]
    assert thetas.at(999).max() == -torch.inf
    assert thetas.at(1000).min() == 0.5


def test_rounds_start_every_engine_again_but_find_thresholds_once(tmp_path: Path):
    engines = Engines()
    outcome = benchmark(config_only(tmp_path), rounds=2, turns=2).run(lambda _: None, engines.ask)
    assert [("keeps" in request) for request in engines.requests] == [True, *[False] * 8]
    assert outcome["engines"][0]["ms_per_step_turns"] == [8.0, 9.0, 8.0, 9.0]


def test_without_a_share_no_thresholds_are_looked_for(tmp_path: Path):
    engines = Engines()
    benchmark(config_only(tmp_path), keeps=(1.0,)).run(lambda _: None, engines.ask)
    assert len(engines.requests) == 2


def test_rows_that_were_dense_are_said_with_their_reason(tmp_path: Path):
    engines = Engines()

    def ask(*given: Any) -> dict[str, Any]:
        result = engines.ask(*given)
        if result.get("totals"):
            result["totals"] = TOTALS | {"dense_rows:no_thresholds": 25.0}
        return result

    outcome = benchmark(config_only(tmp_path), keeps=("none",)).run(lambda _: None, ask)
    assert outcome["engines"][1]["dense_rows"] == {"no_thresholds": 0.5}


def test_times_that_are_noise_are_no_result(tmp_path: Path):
    engines = Engines()

    def ask(*given: Any) -> dict[str, Any]:
        return engines.ask(*given) | {"ms_per_step": [3.0, -2.0, -1.0]}

    with pytest.raises(
        ValueError, match=r"platform: 5 tokens took no longer than one \(3, -2, -1 ms a step\)"
    ):
        benchmark(config_only(tmp_path), keeps=(1.0,)).run(lambda _: None, ask)


def test_an_engine_that_fails_is_named(tmp_path: Path):
    def ask(*_: Any) -> dict[str, Any]:
        raise EngineError("exit status 1: out of memory")

    with pytest.raises(EngineError, match="platform: the engine exit status 1: out of memory"):
        benchmark(config_only(tmp_path), keeps=(1.0,)).run(lambda _: None, ask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 2047}, "2047 tokens of context and 5 of an answer are more than the 2048 of tiny"),
        ({"engine": {"max_model_len": 9}}, "max_model_len can't be given"),
        (
            {"engine": {"attention_backend": "X", "tensor_parallel_size": 2}},
            "attention_backend, tensor_parallel_size",
        ),
    ],
)
def test_what_can_t_be_measured_starts_no_engine(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        benchmark(config_only(tmp_path), **changes).run(lambda _: None, pytest.fail)


def test_weights_are_dummies_where_the_folder_has_none(tmp_path: Path):
    assert not has_weights(config_only(tmp_path))
    assert has_weights(save_model(tmp_path / "real", LlamaConfig(**SMALL)))


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_shapes_are_configurations_that_transformers_reads(tmp_path: Path, shape: str):
    folder = write_checkpoint(shape, tmp_path)
    config = AutoConfig.from_pretrained(folder)
    identity = identify(config, folder.name)
    assert identity.architecture == SHAPES[shape]["architectures"][0]
    assert identity.head_dim == SHAPES[shape]["head_dim"]
    assert not identity.sliding_window_layers
    assert config.rope_parameters["rope_theta"] == SHAPES[shape]["rope_parameters"]["rope_theta"]


def test_budgets_of_a_table_are_its_shares():
    thetas = {"1": [[1.0], [2.0]], "0": [[3.0], [4.0]]}
    identity = identify(LlamaConfig(**{**SMALL, "num_hidden_layers": 2}), "tiny").model_copy(
        update={"num_query_heads": 1}
    )
    sums = torch.ones(6, identity.num_kv_heads, identity.head_dim).tolist()
    table = share_table(identity, 100, 8, [0.05, 0.1], thetas, {"1": sums, "0": sums})
    assert [budget.key for budget in table.budgets] == ["rows-5%", "rows-10%"]
    assert [entry.theta for entry in table.budget("rows-10%").layers] == [[[4.0, 4.0]], [[2.0, 2.0]]]
    assert set(table.key_statistics.transforms()) == {0, 1}


def test_every_screen_is_measured_at_every_share(tmp_path: Path):
    engines = Engines()
    outcome = benchmark(config_only(tmp_path), keeps=(0.1, 1.0), k_screens=("off", "int4+4")).run(
        lambda _: None, engines.ask
    )
    names = [engine["name"] for engine in outcome["engines"]]
    assert names == ["platform", "10 % of V rows", "10 % of V rows, int4+4", "every row, cpu"]
    assert outcome["engines"][2]["toptheta"]["k_screen"] == "int4+4"
    assert engines.tables[0].key_statistics is not None


class FakeLlm:
    """Seconds pass with the tokens of an answer: 1 for the first and 0.25 for each more."""

    def __init__(self, cached: int) -> None:
        self.cached, self.now, self.answers = cached, 0.0, []
        config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))
        self.llm_engine = SimpleNamespace(
            vllm_config=config, model_config=SimpleNamespace(get_vocab_size=lambda: 100)
        )

    def generate(self, prompts: list[dict[str, Any]], sampling: Any, use_tqdm: bool) -> list[Any]:
        assert sampling.ignore_eos
        self.answers.append(sampling.max_tokens)
        self.now += 1 + 0.25 * (sampling.max_tokens - 1)
        return [SimpleNamespace(num_cached_tokens=self.cached) for _ in prompts]

    def collective_rpc(self, method: str) -> list[Any]:
        if method == "attention_backends":
            return [["CPU_ATTN"]]
        return [{"rows": 10.0 * len(self.answers)}]


def test_a_step_is_what_more_tokens_take_behind_cached_prompts(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("vllm")
    llm = FakeLlm(cached=112)
    monkeypatch.setattr(engine_main, "time", SimpleNamespace(perf_counter=lambda: llm.now))
    result = engine_main.measure(llm, 3, 128, 21, 2)
    assert result["ms_per_step"] == [250.0, 250.0]
    assert result["prefill_seconds"] == 1.0
    assert llm.answers == [1, 8, 1, 21, 1, 21]
    # Of the turns alone.
    assert result["totals"] == {"rows": 40.0}


def test_prefill_that_would_be_timed_is_an_error():
    pytest.importorskip("vllm")
    with pytest.raises(RuntimeError, match="only 16 of 128 tokens of a prompt were cached"):
        engine_main.measure(FakeLlm(cached=16), 3, 128, 21, 2)


class Layer(torch.nn.Module):
    """An attention layer with vLLM's attributes."""

    num_heads, num_kv_heads = 4, 2

    def __init__(self, index: int, window: int | None = None, softcap: float | None = None) -> None:
        super().__init__()
        self.layer_name, self.sliding_window = f"model.layers.{index}.self_attn.attn", window
        self.impl = SimpleNamespace(scale=0.125, logits_soft_cap=softcap)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunks", [(512,), (300, 211, 1)])
def test_thresholds_read_the_share_of_what_the_layers_were_called_with(
    monkeypatch: pytest.MonkeyPatch, chunks: tuple[int, ...], softcap: float | None
):
    engine_worker = pytest.importorskip("topt_vllm.benchmarks.engine_worker")
    monkeypatch.setattr(engine_worker, "Attention", Layer)
    model = torch.nn.ModuleList([Layer(0, softcap=softcap), Layer(1, window=64)])
    worker = type("Worker", (engine_worker.BenchmarkedWorker,), {"get_model": lambda _: model})()
    worker.watch_attention()
    torch.manual_seed(0)
    keys, queries = [], []
    for rows in (*chunks, 1, 1, 1):
        query, key = torch.randn(rows, 4 * 32), torch.randn(rows, 2 * 32)
        keys.append(key)
        queries.append(query)
        for layer in model:
            layer(query, key, key)
    found = worker.thetas_found(512, 3, [0.3, 0.1], 1)
    # The layer with a window has no thresholds.
    assert set(found) == {0}
    k = torch.cat(keys)[:512].view(512, 2, 1, 32)
    q = torch.cat(queries[-3:]).view(3, 1, 2, 2, 32)
    scores = (q * k).sum(dim=-1) * 0.125
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    for keep, theta in zip((0.3, 0.1), found[0], strict=True):
        kept = (scores >= torch.tensor(theta).view(2, 2)).any(dim=-1)
        assert float(kept.float().mean()) == pytest.approx(keep, abs=0.01)
    with pytest.raises(RuntimeError, match=r"515 keys and \d calls of one token"):
        worker.thetas_found(512, 4, [0.1], 1)


def test_a_screen_that_the_kernel_lacks_is_refused_before_the_first_engine(tmp_path: Path):
    def ask(*_: Any) -> Any:
        pytest.fail("an engine was started")

    with pytest.raises(ValueError, match=r"--k-screen int4: the cpu kernel has int4\+4"):
        benchmark(config_only(tmp_path), keeps=(0.1,), k_screens=("off", "int4")).run(print, ask)


@pytest.mark.engine
def test_real_engines_read_the_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = tmp_path / "engine.json"
    command = shlex.split("--batch 2 --context 1024 --tokens 9 --turns 1 --keep 0.2 --engine")
    model = str(config_only(tmp_path))
    eager = ['{"enforce_eager": true}', "--json", str(report)]
    assert main(["bench", "engine", "--model", model, *command, *eager]) == 0
    assert "tiny, dummy weights, 2 x 1024 tokens" in capsys.readouterr().out
    stock, sparse = json.loads(report.read_text())["engines"]
    assert (stock["backend"], sparse["backend"]) == ("CPU_ATTN", "TOPTHETA")
    assert stock["v_rows_read"] is None
    assert sparse["v_rows_read"] == pytest.approx(0.2, abs=0.05)
    assert sparse["dense_rows"] == {}
