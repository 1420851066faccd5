"""Attention sinks in the adapter: on every host, prefilled and decoded, of a rank's own heads, loaded again."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import CLOSE, HOSTS, MIXED, NUM_HEADS, Host, Table, vllm_config
from adapter_engine import make_rig
from adapter_rig import Rig, Step

from topt_vllm.attention.common import Stat

__all__ = ["make_rig", "vllm_config"]

# Beside 200 to 350 keys with scores of 0 ± 2, shares of 2 to 90 % of the probability.
SINKS = [4.0, 6.0, 7.0, 10.0]


def sinks_of(values: list[float], dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    """As a model has them before its weights are loaded."""
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype), requires_grad=False)


def assert_sinks_count(rig: Rig, step: Step, sparse: bool) -> None:
    """That every row is as beside the sinks, and would not be without."""
    rows, dense = step.metadata.num_decode_rows, rig.dense(step)
    expected = rig.sparse(step, rig.thetas(), rig.selection) if sparse else dense[:rows]
    torch.testing.assert_close(step.output[:rows].float(), expected, **CLOSE)
    torch.testing.assert_close(step.output[rows:].float(), dense[rows:], **CLOSE)
    impl = rig.layers[0].impl
    sinks, impl.sinks = impl.sinks, None
    without = rig.dense(step)
    impl.sinks = sinks
    assert float((without - dense).abs().mean()) > 0.2 * float(without.abs().mean())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("host", HOSTS)
def test_rows_of_prefill_and_decoding_have_them(make_rig: Any, host: Host, sparse: bool):
    torch.manual_seed(0)
    rig = make_rig(host, Table() if sparse else None, sinks=sinks_of(SINKS).to(host.device))
    rig.write_contexts(MIXED)
    step = rig.step(MIXED)
    assert_sinks_count(rig, step, sparse)
    statistics = rig.statistics()
    read = statistics[Stat.V_ROWS_READ] / statistics[Stat.V_ROWS]
    assert 0.1 < read < 0.7 if sparse else read == 1


@pytest.mark.parametrize("name", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("host", HOSTS[:1])
def test_sinks_of_other_dtypes(make_rig: Any, host: Host, dtype: torch.dtype, name: str):
    torch.manual_seed(1)
    rig = make_rig(host, sinks=sinks_of(SINKS, dtype), kv_cache_dtype=name)
    rig.write_contexts(MIXED)
    assert_sinks_count(rig, rig.step(MIXED), sparse=True)


@pytest.mark.parametrize("host", HOSTS)
def test_a_rank_has_the_sinks_of_its_heads(make_rig: Any, host: Host):
    """As models make them: of as many heads as the rank has."""
    torch.manual_seed(2)
    rig = make_rig(host, rank=(1, 2), sinks=sinks_of(SINKS[NUM_HEADS // 2 :]).to(host.device))
    rig.write_contexts(MIXED)
    assert_sinks_count(rig, rig.step(MIXED), sparse=True)


@pytest.mark.parametrize("host", HOSTS)
def test_weights_that_change_in_place_count_in_the_next_step(make_rig: Any, host: Host):
    """Some ways to load weights again tell layers nothing, and graphs read from where the sinks were."""
    torch.manual_seed(3)
    sinks = sinks_of(SINKS).to(host.device)
    rig = make_rig(host, sinks=sinks)
    rig.write_contexts(MIXED)
    rig.step(MIXED)
    sinks.copy_(torch.tensor(SINKS[::-1]))
    assert_sinks_count(rig, rig.step(MIXED), sparse=True)
