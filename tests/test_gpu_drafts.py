"""Draft models on GPUs: vLLM's second model runner gives their layers the served model's attention backend."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import (
    BLOCK_SIZE,
    DECODE,
    FLASH,
    GPU_HOSTS,
    HEAD_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    Host,
    Table,
    as_on_gpu,
    vllm_config,
)
from adapter_engine import make_rig
from adapter_rig import layer_name
from transformers import LlamaConfig
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, replace, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu.attn_utils import init_attn_backend

from topt_vllm.backend.hosts.flash import FlashTopThetaBackend
from topt_vllm.backend.startup import resolve
from topt_vllm.backend.states import StatesLayer
from topt_vllm.table.identity import identify

__all__ = ["make_rig", "vllm_config"]


def as_the_draft_model_is_made(config: VllmConfig) -> VllmConfig:
    """The configuration with which the draft model's layers are made (v1/worker/gpu/spec_decode, 0.31 to 0.33)."""
    speculative = config.speculative_config
    return replace(
        config,
        model_config=speculative.draft_model_config,
        quant_config=None,
        parallel_config=replace(speculative.draft_parallel_config, rank=config.parallel_config.rank),
    )


@pytest.fixture
def configs(
    vllm_config: VllmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[VllmConfig, VllmConfig]:
    """Those of a model on a GPU that has a table, and of its draft model, which has none and larger heads."""
    LlamaConfig(
        hidden_size=2 * 2 * HEAD_DIM,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "draft")
    model = EngineArgs(
        model=vllm_config.model_config.model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        speculative_config={
            "method": "draft_model",
            "model": str(tmp_path / "draft"),
            "num_speculative_tokens": 2,
        },
        additional_config={"toptheta": {}},
    ).create_engine_config()
    draft = as_the_draft_model_is_made(model)
    Table().write(identify(model.model_config.hf_config, "tiny"), tmp_path / "table.yaml")
    for config in (model, draft):
        as_on_gpu(config, monkeypatch, thresholds=str(tmp_path / "table.yaml"))
    return model, draft


def test_a_draft_model_needs_no_table(configs: tuple[VllmConfig, VllmConfig]):
    """It was refused for lack of one, or for the served model's, although none is meant for it."""
    model, draft = configs
    assert draft.model_config.get_head_size() == 2 * HEAD_DIM
    assert resolve(draft).description == resolve(model).description
    assert resolve(draft).identity == resolve(model).identity
    layers = []
    with set_default_torch_dtype(torch.bfloat16):
        for config, prefix, heads, kv_heads, size in (
            (model, "model", NUM_HEADS, NUM_KV_HEADS, HEAD_DIM),
            (draft, "draft_model.model", 2, 1, 2 * HEAD_DIM),
        ):
            with set_current_vllm_config(config):
                layers.append(
                    Attention(
                        heads,
                        size,
                        scale=1.0,
                        num_kv_heads=kv_heads,
                        cache_config=config.cache_config,
                        prefix=f"{prefix}.layers.0.self_attn.attn",
                        attn_backend=FlashTopThetaBackend,
                    )
                )
                layers[-1].process_weights_after_loading(torch.bfloat16)
    context = model.compilation_config.static_forward_context
    states = [name for name, layer in context.items() if isinstance(layer, StatesLayer)]
    assert states == ["model.layers.0.self_attn.attn.toptheta_value_sums"]


def test_heads_that_draft_have_no_thresholds_whatever_their_number(make_rig: Any):
    """Those of MTP begin at 0 in some models (Qwen3-Next, EXAONE), where the model has a layer with thresholds."""
    with set_model_tag("eagle_head"):
        rig = make_rig(FLASH, prefixes=("mtp.layers.0.self_attn.attn",), settings={"implementation": "auto"})
    assert rig.builder.build(0, rig.common(DECODE)).decode is None
    assert rig.layers[0].impl.platform_reason == "draft_model"
    assert rig.states().value_sums is None


@pytest.mark.parametrize("host", GPU_HOSTS, ids=str)
def test_a_graph_of_several_drafts_updates_what_the_platform_has_built(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, host: Host
):
    """Without it vLLM's second model runner builds metadata anew, on the host, for each drafted token."""
    with set_model_tag("eagle_head"):
        rig = make_rig(host, prefixes=("mtp.layers.0.self_attn.attn",), settings={"implementation": "auto"})
    assert rig.builder.supports_draft_decode_metadata_update
    metadata = rig.builder.build_for_cudagraph_capture(rig.common(DECODE))
    updated: list[Any] = []
    monkeypatch.setattr(rig.builder._platform, "update_draft_decode_metadata", updated.append)
    rig.builder.update_draft_decode_metadata(metadata)
    assert updated == [metadata.whole]


def test_a_drafter_may_share_a_cache_that_has_states_beside_it(make_rig: Any):
    """Gemma 4's is told whose once it is made, and either model runner adds it to the owner's cache group then."""
    draft = f"draft_model.{layer_name(0)}"
    rig = make_rig(FLASH, layers=2, prefixes=(layer_name(0), draft))
    rig.layers[1].kv_sharing_target_layer_name = layer_name(0)
    (group,) = rig.plan.kv_cache_groups
    specs = group.kv_cache_spec.kv_cache_specs
    group.layer_names.remove(draft)
    del specs[draft]
    (groups,), _, _ = init_attn_backend(rig.plan, rig.config, FLASH.device)
    assert any(draft in each.layer_names for each in groups)
    del specs[draft]
    gpu_model_runner.add_kv_sharing_layers_to_kv_cache_groups({draft: layer_name(0)}, [group])
    assert specs[draft] == specs[layer_name(0)]
