"""What TOPTHETA is on GPUs alone: dense layers on the platform's kernels, and what those may not do behind it."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import (
    CLOSE,
    DECODE,
    FLASH,
    GPU_HOSTS,
    HEAD_DIM,
    MIXED,
    NUM_HEADS,
    TRITON,
    Host,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder

from topt_vllm.attention.common import Stat
from topt_vllm.attention.triton.launcher import Bound

pytestmark = pytest.mark.gpu

__all__ = ["make_rig", "vllm_config"]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "triton"])
@pytest.mark.parametrize("host", GPU_HOSTS, ids=str)
def test_who_decodes_a_dense_layer_of_the_table(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, host: Host, implementation: str
):
    """Under auto the platform, whole batches at a time and without V sums; the operator where it is named."""
    torch.manual_seed(7)
    rig = make_rig(host, Table(dense_layers=(0,)), layers=2, settings={"implementation": implementation})
    rig.write_contexts(MIXED)
    rig.builder.build(0, rig.common(MIXED))
    rig.builder._bound.group.warm_up = None
    finished: list[Any] = []
    finish = Bound.finish
    monkeypatch.setattr(Bound, "finish", staticmethod(lambda *args: (finished.append(args), finish(*args))))
    step = rig.step(MIXED)
    on_platform = implementation == "auto"
    assert rig.platform_rows == [92 if on_platform else 90]
    assert rig.layers[0].impl.platform_reason == ("dense_layer" if on_platform else None)
    assert (rig.bound(0) is None) == on_platform == (step.metadata.whole is not None)
    assert not finished
    torch.testing.assert_close(step.output.float(), rig.dense(step), **CLOSE)
    rig.step(MIXED, index=1)
    assert rig.platform_rows[1:] == [90]
    assert rig.statistics(1)[Stat.ROWS] == 2
    assert len(finished) == 1


def test_a_sparse_model_builds_nothing_of_the_platform_s_to_decode(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch
):
    rig = make_rig(FLASH)
    assert rig.builder._platform is None
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", None)
    metadata = rig.builder.build(0, rig.common(DECODE))
    assert metadata.decode is not None
    assert metadata.prefill is metadata.whole is None


def test_outputs_are_not_quantised_behind_the_operator_s_back(make_rig: Any):
    impl = make_rig(TRITON).layers[0].impl
    assert not impl.supports_quant_query_input
    assert not impl.fused_output_quant_supported(None)
    with pytest.raises(NotImplementedError, match="output_scale"):
        impl.forward(None, None, None, None, None, None, None, output_scale=torch.ones(1))


@pytest.mark.parametrize("drafts", [0, 4])
def test_the_operator_s_buffers_are_there_when_vllm_measures_memory(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, drafts: int
):
    """Hundreds of megabytes with drafts and large heads, which came on top of what the cache leaves."""
    rig = make_rig(
        FLASH, Table(dense_layers=(0,)), layers=2, drafts=drafts, settings={"implementation": "auto"}
    )
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda impl, *arguments: arguments[-1])
    query = torch.empty(3, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=FLASH.device)
    for layer in rig.layers:
        layer.impl.forward(layer, query, query, query, torch.empty(0), None, query)
    dense, sparse = (layer.impl.allocated for layer in rig.layers)
    rig.builders[1].build(0, rig.common(DECODE))
    assert dense is None
    assert sparse is rig.bound(1).group.kernel
    assert isinstance(sparse, Bound)


def test_blocks_are_large_enough_for_the_sums_to_be_cheap():
    """One float32 per channel and state: a sixty-fourth of a bf16 cache at 64 rows."""
    assert TRITON.backend.get_preferred_block_size(16) == 64
    assert TRITON.backend.get_preferred_block_size(128) == 128


@pytest.mark.parametrize("host", GPU_HOSTS, ids=str)
def test_layouts_and_cache_writes_are_the_platform_s(host: Host):
    """States lie in layers of their own, so nothing of a page is changed, and writers may be fused."""
    platform = host.backend.__mro__[host.backend.__mro__.index(host.backend) + 1 :]
    stock = next(cls for cls in platform if not cls.__module__.startswith("topt_vllm"))
    assert host.backend.supported_kv_cache_layouts() == stock.supported_kv_cache_layouts()
    for name in ("do_kv_cache_update", "fused_rope_kvcache_supported"):
        assert getattr(host.backend.get_impl_cls(), name) is getattr(stock.get_impl_cls(), name)
