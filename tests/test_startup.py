"""What stops start-up, and with which words: settings, tables, vLLM's own options."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from table_factory import make_key_statistics, make_table
from transformers import FalconH1Config, Gemma2Config, Gemma4TextConfig, LlamaConfig, Phi3Config

from topt_vllm.attention import reference
from topt_vllm.attention.common import ScreenLimits
from topt_vllm.attention.cpu import jit, launcher
from topt_vllm.backend import compat
from topt_vllm.backend.layers import ModelLayer
from topt_vllm.backend.skipping import why_nothing_is_skipped
from topt_vllm.backend.startup import resolve
from topt_vllm.config import ConfigError, TopThetaConfig
from topt_vllm.table import search
from topt_vllm.table.file import dump
from topt_vllm.table.identity import identify
from topt_vllm.table.schema import ThresholdTable, ThresholdTableError


@pytest.fixture
def hf_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=32
    )


@pytest.fixture
def model(tmp_path: Path, hf_config: LlamaConfig) -> Path:
    folder = tmp_path / "a model"
    hf_config.architectures = ["LlamaForCausalLM"]
    hf_config.save_pretrained(folder)
    return folder


@pytest.fixture
def table(hf_config: LlamaConfig) -> ThresholdTable:
    return make_table(identify(hf_config, "a model"))


@pytest.fixture
def start(model: Path, hf_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls resolve() as the platform hook does, for the tiny model and given settings."""
    monkeypatch.delenv("TOPT_THRESHOLDS", raising=False)

    return lambda settings, **options: resolve(
        vllm_config(settings, model, **{"hf_config": hf_config} | options)
    )


def vllm_config(settings: object, model: Path, hf_config: Any, **options: Any) -> Any:
    """vLLM's configuration, as far as it is asked."""
    return SimpleNamespace(
        additional_config={"toptheta": settings},
        model_config=SimpleNamespace(
            hf_config=hf_config,
            model=str(model),
            revision=None,
            max_model_len=options.get("max_model_len", 1024),
            dtype=torch.bfloat16,
            runner_type=options.get("runner_type", "generate"),
            is_multimodal_model=False,
            is_hybrid=options.get("is_hybrid", False),
            uses_mrope=False,
        ),
        lora_config=options.get("lora_config"),
        kv_transfer_config=options.get("kv_transfer_config"),
        speculative_config=options.get("speculative_config"),
        load_config=SimpleNamespace(load_format=options.get("load_format", "auto")),
        cache_config=SimpleNamespace(
            kv_sharing_fast_prefill=options.get("fast_prefill", False),
            cache_dtype=options.get("cache_dtype", "auto"),
            kv_cache_memory_bytes=options.get("memory"),
        ),
        device_config=SimpleNamespace(device_type=options.get("device_type", "cpu")),
        parallel_config=SimpleNamespace(
            use_ubatching=options.get("use_ubatching", False),
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            worker_cls=options.get("worker_cls", "vllm.v1.worker.gpu_worker.Worker"),
        ),
    )


def test_the_key_wins_then_the_environment_then_the_folder(
    start: Any, table: ThresholdTable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reference = {"implementation": "reference"}
    dump(table, model / "toptheta.yaml")
    assert str(model / "toptheta.yaml") in start(reference).description
    dump(table, tmp_path / "from environment.yaml")
    monkeypatch.setenv("TOPT_THRESHOLDS", str(tmp_path / "from environment.yaml"))
    assert "from environment.yaml" in start(reference).description
    dump(table, tmp_path / "from key.yaml")
    resolved = start(reference | {"thresholds": str(tmp_path / "from key.yaml")})
    assert "from key.yaml" in resolved.description
    sparse = set(range(2)) - set(table.budgets[-1].dense_layers)
    assert set(resolved.thetas) == sparse


def test_a_table_that_the_environment_names_wrongly_is_said_to_be_its(
    start: Any, table: ThresholdTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "another.yaml"
    monkeypatch.setenv("TOPT_THRESHOLDS", str(path))
    with pytest.raises(ThresholdTableError, match=r"^TOPT_THRESHOLDS names .*another.yaml: can't be read"):
        start({})
    dump(make_table(), path)
    with pytest.raises(
        ThresholdTableError, match=r"^TOPT_THRESHOLDS names .*another.yaml: model: this table"
    ):
        start({})
    with pytest.raises(ThresholdTableError, match=r"^/.*another.yaml: model: this table"):
        start({"thresholds": str(path)})


def test_without_a_table_the_calibrate_command_is_shown(start: Any, model: Path):
    with pytest.raises(ThresholdTableError) as error:
        start({})
    # The folder's name has a space: the command must be ready for a shell.
    assert f"topt-vllm calibrate --model '{model}'" in str(error.value)


@pytest.mark.parametrize("name", ["a model of mine", "model--copy", "model.git", "a/b/c"])
def test_names_that_are_none_for_the_hub_have_no_table_there(
    table: ThresholdTable, hf_config: LlamaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """A replay names the model of its capture by the folder that it lay in."""
    monkeypatch.delenv("TOPT_THRESHOLDS", raising=False)
    monkeypatch.setattr(search, "__file__", str(tmp_path / "package" / "table" / "search.py"))
    identity = identify(hf_config, name)
    with pytest.raises(ThresholdTableError, match=f"no threshold table for {name}"):
        search.find_table(TopThetaConfig(), identity, name, None)
    (tmp_path / "configs").mkdir()
    dump(table, tmp_path / "configs" / "a.yaml")
    _, path = search.find_table(TopThetaConfig(), identity, name, None)
    assert path.name == "a.yaml"


def test_two_shipped_tables_of_one_model_are_not_chosen_between(
    start: Any, table: ThresholdTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(search, "__file__", str(tmp_path / "package" / "table" / "search.py"))
    configs = tmp_path / "configs"
    configs.mkdir()
    dump(table, configs / "a.yaml")
    assert "a.yaml" in start({"implementation": "reference"}).description
    dump(table, configs / "b.yaml")
    with pytest.raises(ThresholdTableError, match=r"several shipped tables .*a\.yaml, .*b\.yaml"):
        start({"implementation": "reference"})


def test_dense_is_a_choice(start: Any):
    assert "θ = −inf)" in start({"thresholds": "none"}).description
    assert "no table found" in start({"on_missing": "dense"}).description


def test_dense_layers_stay_with_the_platform_s_kernels_on_gpus(
    start: Any, table: ThresholdTable, model: Path
):
    """Unless the operator's is named; what V sums can't have is refused only where there are thresholds."""
    options = {"device_type": "cuda", "fast_prefill": True}
    resolved = start({"thresholds": "none"}, **options)
    assert resolved.all_on_platform
    assert resolved.description == "TOPTHETA: vLLM's own kernels, every V row is read (θ = −inf)"
    with pytest.raises(ConfigError, match="kv-sharing-fast-prefill"):
        start({"thresholds": "none", "implementation": "triton"}, **options)
    dump(table, model / "toptheta.yaml")
    with pytest.raises(ConfigError, match="kv-sharing-fast-prefill"):
        start({}, **options)
    sparse = start({}, device_type="cuda")
    assert (sparse.dense_on_platform, sparse.all_on_platform) == (True, False)
    assert "triton kernel, dense layers on vLLM's own, table" in sparse.description
    assert not start({"implementation": "triton"}, device_type="cuda").dense_on_platform
    assert not start({}).dense_on_platform


def test_dense_is_a_choice_of_the_environment_too(start: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOPT_THRESHOLDS", "none")
    assert "θ = −inf)" in start({"on_missing": "dense"}).description


def test_the_log_says_what_the_budget_is_worth(start: Any, table: ThresholdTable, model: Path):
    dump(table, model / "toptheta.yaml")
    line = start({"implementation": "reference"}).description
    assert "budget 128" in line
    assert (
        "on 1024 held-back tokens: perplexity +0.50 %, 25.0% of V rows read, 3.0% of probability dropped"
        in line
    )
    assert "95.0% of next tokens as with dense attention" in line
    assert "extrapolated" not in line
    longer = start({"implementation": "reference"}, max_model_len=4096).description
    assert "contexts of 1024 to 4096 tokens use extrapolated thresholds" in longer


def test_a_budget_can_be_chosen_by_name(start: Any, table: ThresholdTable, model: Path):
    named = table.budgets[0].model_copy(update={"k": None, "name": "loss-1%"})
    dump(table.model_copy(update={"budgets": [*table.budgets, named]}), model / "toptheta.yaml")
    chosen = start({"implementation": "reference", "budget": "loss-1%"})
    assert "budget loss-1%" in chosen.description
    assert start({"implementation": "reference"}).description == chosen.description
    for name in ("budget", "k"):
        assert "budget 64" in start({"implementation": "reference", name: 64}).description


def test_labels_of_the_metrics_are_text_and_name_the_model(
    start: Any, table: ThresholdTable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    odd = tmp_path / os.fsdecode(b"caf\xe9.yaml")
    dump(table, odd)
    monkeypatch.chdir(model)
    settings: Any = {"implementation": "reference", "thresholds": str(odd)}
    config = vllm_config(settings, Path("."), hf_config=LlamaConfig.from_pretrained(model))
    labels = resolve(config).table_labels
    assert (labels["name"], labels["model"]) == ("caf?.yaml", "a model")


def test_a_table_of_another_model_is_refused(start: Any, table: ThresholdTable, tmp_path: Path):
    other = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    path = tmp_path / "other.yaml"
    dump(make_table(identify(other, "another model")), path)
    with pytest.raises(ThresholdTableError, match=r"belongs to another model.*num_layers: 2 against 3"):
        start({"thresholds": str(path)})


def test_a_table_that_was_calibrated_anew_is_read_anew(start: Any, table: ThresholdTable, model: Path):
    """A notebook starts one engine after the other."""
    dump(table, model / "toptheta.yaml")
    settings = {"implementation": "reference", "budget": table.budgets[0].k}
    assert f"budget {table.budgets[0].k}," in start(settings).description
    others = table.model_copy(update={"budgets": table.budgets[1:]})
    dump(others, model / "toptheta.yaml", force=True)
    with pytest.raises(ThresholdTableError, match=f"the table has budgets {table.budgets[1].k};"):
        start(settings)


def test_vllm_options_that_would_break_the_sums_are_refused(start: Any):
    with pytest.raises(ConfigError, match="kv-sharing-fast-prefill"):
        start({"thresholds": "none"}, fast_prefill=True)
    with pytest.raises(ConfigError, match="--load-format tensorizer"):
        start({"thresholds": "none"}, load_format="tensorizer")


def transfer(name: str, **options: Any) -> Any:
    """vLLM's configuration of a KV connector."""
    return SimpleNamespace(is_kv_transfer_instance=True, kv_connector=name, **options)


def test_connectors_that_are_not_known_to_carry_sums_are_refused(start: Any):
    dense = {"thresholds": "none"}
    with pytest.raises(ConfigError, match=r"KV connector LMCacheConnectorV1 .*Allowed: .*NixlConnector"):
        start(dense, kv_transfer_config=transfer("LMCacheConnectorV1"))
    with pytest.raises(ConfigError, match="its code is not vLLM's"):
        start(dense, kv_transfer_config=transfer("NixlConnector", kv_connector_module_path="mine"))
    start(dense, kv_transfer_config=transfer("NixlConnector"))
    start(dense | {"compensation": "none"}, kv_transfer_config=transfer("LMCacheConnectorV1"))
    unused = SimpleNamespace(is_kv_transfer_instance=False, kv_connector=None)
    start(dense, kv_transfer_config=unused)


def test_a_named_implementation_runs_or_fails(start: Any, monkeypatch: pytest.MonkeyPatch):
    from topt_vllm.attention import reference
    from topt_vllm.attention.cpu import launcher as cpu_launcher
    from topt_vllm.attention.triton import launcher

    monkeypatch.setattr(launcher, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"runs on GPUs, .* on the CPU.*TRITON_INTERPRET=1"):
        start({"thresholds": "none", "implementation": "triton"})
    assert start({"thresholds": "none", "implementation": "reference"}).implementation is reference
    assert start({"thresholds": "none"}).implementation is cpu_launcher


@pytest.mark.engine
def test_vllm_serve_stops_before_it_loads_anything(model: Path):
    """The message reaches the person who typed the command, from the front end, without weights to load."""
    vllm = shutil.which("vllm", path=str(Path(sys.executable).parent))
    assert vllm, "the vllm command is missing from the environment"
    run = subprocess.run(
        [vllm, "serve", str(model), "--attention-backend", "TOPTHETA", "--skip-tokenizer-init"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode != 0
    assert "topt-vllm calibrate --model" in run.stdout + run.stderr
    assert "Starting to load model" not in run.stdout + run.stderr


def test_sift_needs_no_table(start: Any):
    resolved = start({"policy": "sift", "sift_tau": 0.9})
    assert resolved.thetas == {}
    assert (
        "policy sift: 32 dense rows of each request, then thresholds that skip 90.0% of the keys"
        in resolved.description
    )
    assert resolved.table_labels["name"] == "none"


def test_kv_heads_are_each_layer_s_own(start: Any):
    """Gemma 4 has fewer in its layers with full attention; vLLM repeats heads where there are more ranks."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
    kinds = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    gemma = Gemma4TextConfig(**sizes, **kinds, num_global_key_value_heads=1, attention_k_eq_v=True)
    resolved = start({"thresholds": "none"}, hf_config=gemma)
    assert resolved.kv_heads == {0: 4, 1: 1, 2: 1}
    for index, ranks, heads, replicas in ((0, 1, 4, 1), (0, 2, 2, 1), (1, 1, 1, 1), (1, 2, 1, 2)):
        layer = SimpleNamespace(num_kv_heads=heads, impl=None)
        assert (
            ModelLayer(layer, f"model.layers.{index}.self_attn.attn", resolved, ranks).kv_replicas == replicas
        )


def test_what_vllm_writes_into_a_configuration_changes_no_fingerprint(start: Any):
    """Once a layer of Falcon-H1 is made its table would be another model's."""
    falcon = FalconH1Config(num_hidden_layers=2)
    before = start({"thresholds": "none"}, hf_config=falcon).identity
    falcon.rope_parameters["partial_rotary_factor"] = 1.0
    assert identify(falcon, "a model").fingerprint != before.fingerprint
    assert start({"thresholds": "none"}, hf_config=falcon).identity == before


PHI = {"num_hidden_layers": 2, "max_position_embeddings": 4096, "pad_token_id": 0}
WINDOWS = {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}


def test_sift_says_in_how_many_layers_it_skips(start: Any):
    """A window skips nothing, unless no context outgrows it."""
    for hf_config, words in (
        (Phi3Config(**PHI, sliding_window=4096), "95.0% of the keys"),
        (Phi3Config(**PHI, sliding_window=1024), "95.0% of the keys"),
        (Phi3Config(**PHI, sliding_window=1023), "95.0% of the keys in 0 of 2 layers"),
        (Gemma2Config(num_hidden_layers=2, **WINDOWS), "95.0% of the keys in 1 of 2 layers"),
    ):
        assert start({"policy": "sift"}, hf_config=hf_config).description.endswith(words)


SKIPS_NOTHING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no table wanted": ({"thresholds": "none"}, {}, 'thresholds "none" was asked for'),
    "no table found": ({"on_missing": "dense"}, {}, "there is no threshold table"),
    "dense layers": ({"dense_layers": (0, 1)}, {}, "budget 128 of toptheta.yaml has dense layers alone"),
    "lengths": (
        {},
        {"max_model_len": 255},
        "has thresholds from 256 tokens on, and contexts have at most 255",
    ),
    "min_seq_len": (
        {"min_seq_len": 1024},
        {},
        "toptheta.min_seq_len is 1024, and contexts have at most 1024",
    ),
    "always kept": (
        {"sink_tokens": 24, "recent_tokens": 1000},
        {},
        "toptheta.sink_tokens and recent_tokens together is 1024",
    ),
    "pooling": ({}, {"runner_type": "pooling"}, "--runner pooling decodes nothing"),
    "sift, windows": (
        {"policy": "sift"},
        {"hf_config": Phi3Config(**PHI, sliding_window=1023)},
        "no layer attends to more than a window of its context, and contexts have at most 1024 tokens",
    ),
    "sift, warm-up": ({"policy": "sift", "sift_warmup": 1024}, {}, "toptheta.sift_warmup is 1024"),
}


@pytest.mark.parametrize(("settings", "options", "reason"), SKIPS_NOTHING.values(), ids=SKIPS_NOTHING.keys())
def test_why_a_server_will_skip_nothing(
    model: Path,
    hf_config: LlamaConfig,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    options: dict[str, Any],
    reason: str,
):
    monkeypatch.delenv("TOPT_THRESHOLDS", raising=False)
    settings = {"implementation": "reference"} | settings
    dense_layers = settings.pop("dense_layers", (0,))
    if not {"policy", "thresholds", "on_missing"} & set(settings):
        dump(make_table(identify(hf_config, "a model"), dense_layers=dense_layers), model / "toptheta.yaml")
    config = vllm_config(settings, model, **{"hf_config": hf_config} | options)
    (found,) = why_nothing_is_skipped(resolve(config), config)
    assert reason in found


def test_a_server_that_skips_gives_no_reason(
    model: Path, hf_config: LlamaConfig, table: ThresholdTable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TOPT_THRESHOLDS", raising=False)
    dump(table, model / "toptheta.yaml")
    for settings in ({}, {"min_seq_len": 1023}, {"policy": "sift"}):
        config = vllm_config({"implementation": "reference"} | settings, model, hf_config)
        assert list(why_nothing_is_skipped(resolve(config), config)) == []


def test_sift_refuses_speculators_with_steps_of_their_own(start: Any):
    with pytest.raises(ConfigError, match="speculation is 'eagle'"):
        start({"policy": "sift"}, speculative_config=SimpleNamespace(method="eagle"))
    start({"policy": "sift"}, speculative_config=SimpleNamespace(method="ngram"))


def test_sift_refuses_microbatches(start: Any):
    """vLLM builds the metadata of each part of a step, and doesn't say whose rows a part has."""
    with pytest.raises(ConfigError, match="policy is 'sift', but --enable-dbo cuts steps in two"):
        start({"policy": "sift"}, use_ubatching=True)


DRAFTS = SimpleNamespace(method="custom_class", model=compat.DRAFTER)


def test_the_model_drafts_for_itself_where_it_can(start: Any, table: ThresholdTable, model: Path):
    dump(table, model / "toptheta.yaml")
    resolved = start({}, speculative_config=DRAFTS)
    assert resolved.drafts
    assert "sparse rows draft, dense rows verify" in resolved.description
    assert not start({}, speculative_config=SimpleNamespace(method="ngram")).drafts
    for settings, options, reason in (
        ({"thresholds": "none"}, {}, "without a threshold table"),
        ({"adapt": True}, {}, "with toptheta.adapt"),
        ({}, {"lora_config": object()}, "with LoRA adapters"),
        ({}, {"device_type": "cuda"}, "on GPUs"),
    ):
        with pytest.raises(ConfigError, match=f"doesn't work {reason}.* Leave --speculative-config out"):
            start(settings, speculative_config=DRAFTS, **options)
    with pytest.raises(ConfigError, match="speculation is 'custom_class'"):
        start({"policy": "sift"}, speculative_config=DRAFTS)


def test_sift_needs_a_worker_on_gpus_that_names_requests(start: Any):
    """On CPUs the plugin's platform sets it; users name it on GPUs, whose platforms are vLLM's."""
    from topt_vllm.attention.triton import launcher

    with pytest.raises(ConfigError, match=r"worker on GPUs \(vllm\S+\) doesn't name them. Add --worker-cls"):
        start({"policy": "sift"}, device_type="cuda")
    resolved = start({"policy": "sift"}, device_type="cuda", worker_cls=compat.GPU_WORKER)
    assert not resolved.all_on_platform
    assert resolved.implementation is launcher
    with pytest.raises(ConfigError, match="--load-format tensorizer"):
        start({"policy": "sift"}, device_type="cuda", worker_cls=compat.GPU_WORKER, load_format="tensorizer")
    with pytest.raises(ConfigError, match="names none in batches of a model with state-space layers"):
        start({"policy": "sift"}, device_type="cuda", worker_cls=compat.GPU_WORKER, is_hybrid=True)
    start({"policy": "sift"}, is_hybrid=True)


def test_thresholds_follow_the_traffic_on_gpus_too(start: Any, table: ThresholdTable, model: Path):
    dump(table, model / "toptheta.yaml")
    for device_type in ("cpu", "cuda"):
        resolved = start({"adapt": True, "budget": 64}, device_type=device_type)
        assert resolved.promised_keys == {1: [64, 64, 64, 64]}
        assert "thresholds adapt to the traffic" in resolved.description
        with pytest.raises(ConfigError, match="adapt is true, but --enable-dbo cuts steps in two"):
            start({"adapt": True, "budget": 64}, device_type=device_type, use_ubatching=True)


def test_budgets_that_promise_no_keys_do_not_adapt(start: Any, table: ThresholdTable, model: Path):
    settings = {"implementation": "reference", "adapt": True}
    with pytest.raises(ConfigError, match="adapt is true, but there is no threshold table"):
        start(settings | {"on_missing": "dense"})
    named = table.budgets[0].model_copy(update={"k": None, "name": "mass-5%"})
    dump(table.model_copy(update={"budgets": [*table.budgets, named]}), model / "toptheta.yaml")
    with pytest.raises(ConfigError, match="adapt is true, but budget mass-5% doesn't say how many keys"):
        start(settings | {"budget": "mass-5%"})
    assert start({"implementation": "reference", "budget": 64}).promised_keys == {}


def screened(table: ThresholdTable, candidates: list[float] | None = None) -> ThresholdTable:
    """The table with what a K screen needs, every layer sparse."""
    budgets = [
        budget.model_copy(
            update={
                "dense_layers": [],
                "quality": budget.quality
                and budget.quality.model_copy(update={"layer_candidates": candidates}),
            }
        )
        for budget in table.budgets
    ]
    statistics = make_key_statistics(table.model)
    return table.model_copy(update={"budgets": budgets, "key_statistics": statistics})


@pytest.mark.parametrize("place", ["model", "elsewhere"])
def test_a_screen_needs_statistics_of_the_keys_and_shows_who_makes_them(
    start: Any, table: ThresholdTable, model: Path, tmp_path: Path, place: str
):
    path = model / "toptheta.yaml" if place == "model" else tmp_path / "a table.yaml"
    dump(table, path)
    output = "" if place == "model" else f" --output '{path}'"
    command = f"topt-vllm calibrate --model '{model}' --dataset TEXT_FILE.txt --k-screen-only{output}\n"
    with pytest.raises(ConfigError) as error:
        start({"implementation": "reference", "k_screen": "int4", "thresholds": str(path)})
    assert f"toptheta.k_screen is 'int4', but {path} has no key_statistics" in str(error.value)
    assert command in str(error.value)
    dump(screened(table), path, force=True)
    resolved = start({"implementation": "reference", "k_screen": "int4", "thresholds": str(path)})
    assert set(resolved.screens) == {0, 1}
    assert resolved.screens[1].mean.shape == (2, 16)
    assert resolved.description.endswith("; K screen int4 with margin 2.5")
    assert start({"thresholds": str(path)}).screens == {}


OFFLOADING = SimpleNamespace(is_kv_transfer_instance=True, kv_connector="OffloadingConnector")


def test_on_cpus_there_is_a_screen_unasked(start: Any, table: ThresholdTable, model: Path):
    dump(screened(table), model / "toptheta.yaml")
    resolved = start({}, max_model_len=1025)
    assert resolved.screen_format == "int4+4"
    assert set(resolved.screens) == {0, 1}
    assert resolved.description.endswith("; K screen int4+4 with margin 2.5")
    assert start({"k_screen": "auto"}, max_model_len=1025).screen_format == "int4+4"
    assert start({}, max_model_len=4096, memory=4096 * 2 * 2 * 85 * 5 // 4).screen_format == "int4+4"
    for settings in ({"k_screen": "off"}, {"implementation": "reference"}, {"thresholds": "none"}):
        resolved = start(settings, max_model_len=1025)
        assert (resolved.screen_format, resolved.screens) == (None, {})
        assert "K screen" not in resolved.description


def test_on_gpus_there_is_none_unasked(start: Any, table: ThresholdTable, model: Path):
    dump(screened(table), model / "toptheta.yaml")
    resolved = start({}, device_type="cuda", max_model_len=8192)
    assert (resolved.screen_format, resolved.screens) == (None, {})
    assert "K screen" not in resolved.description


@pytest.mark.parametrize(
    ("settings", "options", "reason"),
    [
        ({}, {"max_model_len": 1024}, "contexts of up to 1024 tokens read K in full"),
        ({}, {"cache_dtype": "fp8_e4m3"}, "it would be larger than K in fp8"),
        (
            {"compensation": "none"},
            {"kv_transfer_config": OFFLOADING},
            "without V sums every KV connector is allowed, with a K screen some",
        ),
        # 2 layers of 2 KV heads, D = 16: 64 bytes of K and V a token, 1 of sums and 20 of the screen.
        (
            {},
            {"memory": 4096 * 2 * 2 * 85 * 5 // 4 - 1},
            "beside it the cache would hardly hold --max-model-len 4096",
        ),
    ],
    ids=["short contexts", "fp8", "connector", "small cache"],
)
def test_a_screen_that_nobody_asked_for_refuses_nothing(
    start: Any,
    table: ThresholdTable,
    model: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    reason: str,
):
    dump(screened(table), model / "toptheta.yaml")
    resolved = start(settings, **{"max_model_len": 4096} | options)
    assert (resolved.screen_format, resolved.screens) == (None, {})
    assert resolved.description.endswith(f"; no K screen: {reason}")


def test_a_table_that_knows_no_keys_is_served_without_a_screen(
    start: Any, table: ThresholdTable, model: Path
):
    dump(table, model / "toptheta.yaml")
    resolved = start({}, max_model_len=4096)
    assert resolved.screens == {}
    assert resolved.description.endswith(
        "; no K screen: the table has no key_statistics; `topt-vllm calibrate --k-screen-only` adds them"
    )


@pytest.mark.parametrize(
    ("capability", "heads_per_kv", "format"),
    [
        *(("amx", 8, "int4+4"), ("amx", 9, None), ("avx512", 16, "int4+4")),
        *(("avx2", 16, "int4+4"), ("default", 1, None)),
    ],
)
def test_cpus_on_which_a_screen_does_not_pay_go_without(
    monkeypatch: pytest.MonkeyPatch, capability: str, heads_per_kv: int, format: str | None
):
    monkeypatch.setattr(jit, "capability", lambda: capability)
    assert launcher.screen_unasked(heads_per_kv) == format


def test_a_screen_needs_a_table(start: Any):
    with pytest.raises(ConfigError, match="k_screen is 'int4', but there is no threshold table"):
        start({"implementation": "reference", "k_screen": "int4", "on_missing": "dense"})


@pytest.mark.parametrize(
    ("settings", "device_type"),
    [({"k_screen": "int4", "implementation": "cpu"}, "cpu"), ({"k_screen": "int4+4"}, "cuda")],
    ids=["cpu", "cuda"],
)
def test_a_screen_that_the_kernel_lacks_is_refused(
    start: Any, table: ThresholdTable, model: Path, settings: dict[str, Any], device_type: str
):
    dump(screened(table), model / "toptheta.yaml")
    with pytest.raises(ValueError, match=rf"has no K screen '{re.escape(settings['k_screen'])}'; it has: "):
        start(settings, device_type=device_type)


def test_layers_in_which_a_screen_does_not_pay_go_without(
    start: Any, table: ThresholdTable, model: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"implementation": "reference", "k_screen": "int4+4", "k_screen_margin": "hard"}
    capabilities = replace(reference.capabilities, screens={"int4+4": ScreenLimits(0.3)})
    monkeypatch.setattr(reference, "capabilities", capabilities)
    dump(screened(table, [0.4, 0.3]), model / "toptheta.yaml")
    resolved = start(settings)
    assert set(resolved.thetas) == {0, 1}
    assert set(resolved.screens) == {1}
    assert "K screen int4+4 with margin hard, not in layers 0, where too many" in resolved.description
    dump(screened(table, [0.3, 0.0]), model / "toptheta.yaml", force=True)
    assert set(start(settings).screens) == {0, 1}


def test_shares_of_other_layers_are_refused(start: Any, table: ThresholdTable, model: Path):
    dump(screened(table), model / "toptheta.yaml")
    path = model / "toptheta.yaml"
    path.write_text(path.read_text().replace("layer_candidates: null", "layer_candidates: [0.1]"))
    with pytest.raises(
        ThresholdTableError, match=r"quality.layer_candidates: 2 layers expected, got \[0.1\]"
    ):
        start({"implementation": "reference"})


def test_dense_layers_have_no_screen(start: Any, table: ThresholdTable, model: Path):
    table = table.model_copy(update={"key_statistics": make_key_statistics(table.model)})
    dump(table, model / "toptheta.yaml")
    resolved = start({"implementation": "reference", "k_screen": "int4"})
    assert set(resolved.screens) == set(resolved.thetas) == {1}
    assert resolved.description.endswith("; K screen int4 with margin 2.5")
