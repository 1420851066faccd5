"""Pipeline parallelism, as far as CPUs allow: the second stage's layers have the model's numbers and thresholds.

vLLM 0.32 itself can't run more than one stage on CPUs, so no engine does it here.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from table_factory import make_table
from transformers import LlamaConfig
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import PPMissingLayer, make_layers
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype

from topt_vllm.backend.states import states_of
from topt_vllm.table.file import dump
from topt_vllm.table.identity import identify

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 4, 2, 64
DENSE = 17


@pytest.fixture
def second_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine's configuration, and its layers as vLLM's models make them on the second of two stages."""
    import vllm.distributed.parallel_state

    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=64,
        vocab_size=64,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    dump(make_table(identify(config, "tiny"), dense_layers=(0, DENSE)), tmp_path / "toptheta.yaml")
    monkeypatch.delenv("TOPT_THRESHOLDS", raising=False)
    load_general_plugins()
    current_platform.import_kernels()
    engine = EngineArgs(
        model=str(tmp_path), attention_backend="TOPTHETA", skip_tokenizer_init=True, dtype="bfloat16"
    ).create_engine_config()
    group = SimpleNamespace(rank_in_group=1, world_size=2)
    monkeypatch.setattr(vllm.distributed.parallel_state, "get_pp_group", lambda: group)

    def attention(prefix: str) -> Attention:
        return Attention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, prefix=f"{prefix}.self_attn.attn")

    with set_current_vllm_config(engine), set_default_torch_dtype(torch.bfloat16):
        yield engine, make_layers(LAYERS, attention, "model.layers")


def test_the_second_stage_has_its_own_layers_thresholds(second_stage: Any):
    engine, (start, end, layers) = second_stage
    assert (start, end) == (15, 30)
    assert all(isinstance(layer, PPMissingLayer) for layer in layers[:start])
    names = [layer.layer_name for layer in layers[start:]]
    layers[start].process_weights_after_loading(torch.bfloat16)
    layers[start].attn_backend.get_builder_cls()(
        layers[start].get_kv_cache_spec(engine), names, engine, torch.device("cpu")
    )
    for number, layer in enumerate(layers[start:], start):
        bound = layer.impl.bound
        thetas = bound.group.thresholds.thetas[bound.index]
        states = states_of(layer.layer_name, layer, engine)
        assert layer.impl.bound.states == states
        if number == DENSE:
            assert (thetas, states.value_sums) == (None, None)
            continue
        assert states.value_sums is not None
        # Of the table's default budget, k = 128 (see make_table).
        expected = [-number - head / 10 - 0.128 for head in range(HEADS)]
        torch.testing.assert_close(thetas.theta[:, 0], torch.tensor(expected, dtype=torch.float32))
