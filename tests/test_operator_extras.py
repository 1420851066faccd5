"""What models have seldom: sinks, V narrower than K, large heads; and what an implementation does beyond others."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, random_case
from device import DEVICE, TRITON

from topt_vllm.attention import api
from topt_vllm.attention.common import (
    Capabilities,
    LargestBatch,
    PagedCache,
    ScreenLimits,
    Selection,
    Stat,
    new_statistics,
)

NARROW = ["reference", TRITON]


@pytest.mark.parametrize("impl", ["reference", "cpu", TRITON])
@pytest.mark.parametrize("compensation", ["none", "vmean"])
def test_a_sink_takes_probability_and_gives_nothing(impl: str, compensation: Any):
    """As a key whose V row is zero; what thresholds drop is compensated, the sink's share is not."""
    case = random_case(
        [(1, 300), (3, 70)], dtype=torch.float32, selection=Selection(compensation=compensation)
    )
    sinks = torch.tensor([-2.0, 0.0, 3.0, 60.0])
    plain, statistics, with_sinks = case.run(impl), new_statistics(), new_statistics()
    case.run(impl, statistics)
    out = replace(case, sinks=sinks).run(impl, with_sinks)
    for row, sequence, n in case.rows():
        mass = case.scores64(row, sequence, n).logsumexp(dim=1)
        share = torch.sigmoid(mass - sinks.double())
        torch.testing.assert_close(out[row].double(), plain[row] * share[:, None], rtol=1e-4, atol=1e-6)
    assert torch.equal(with_sinks[:, : Stat.DROPPED_MASS], statistics[:, : Stat.DROPPED_MASS])
    assert with_sinks[0, Stat.DROPPED_MASS] < statistics[0, Stat.DROPPED_MASS]


@pytest.mark.parametrize("impl", ["reference", "cpu", TRITON])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sinks_are_read_as_the_model_has_them(impl: str, dtype: torch.dtype):
    case = random_case([(1, 300)], dtype=dtype, sinks=torch.tensor([-2.0, 0.5, 3.3, 7.1]).to(dtype))
    assert torch.equal(case.run(impl), replace(case, sinks=case.sinks.float()).run(impl))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_sinks_of_another_shape_or_kind_are_refused(impl: str):
    with pytest.raises(ValueError, match=r"sinks \(3,\) of torch.float32 must be floating point, \[H=4\]"):
        random_case([(1, 40)], sinks=torch.zeros(3)).run(impl)
    with pytest.raises(ValueError, match=r"sinks \(4,\) of torch.int32 must be floating point, \[H=4\]"):
        random_case([(1, 40)], sinks=torch.zeros(4, dtype=torch.int32)).run(impl)


def test_the_kernel_reads_sinks_one_after_the_other():
    with pytest.raises(RuntimeError, match="sinks: expected a contiguous last dimension"):
        random_case([(1, 40)], sinks=torch.zeros(8)[::2]).run("cpu")


def narrow(case: Case, value_dim: int) -> Case:
    """The case with the first components of V only."""
    cache = case.cache
    assert cache.value_sums is not None
    part = PagedCache(cache.key, cache.value[..., :value_dim], cache.value_sums[..., :value_dim])
    return replace(case, cache=part)


@pytest.mark.parametrize("impl", NARROW)
@pytest.mark.parametrize("value_dim", [32, 40])
def test_v_may_be_narrower_than_k(impl: str, value_dim: int):
    case = random_case([(1, 300), (2, 70)], head_dim=80, dtype=torch.float32)
    whole, out = case.run("reference"), narrow(case, value_dim).run(impl)
    torch.testing.assert_close(out, whole[..., :value_dim], rtol=1e-5, atol=2e-6)


def test_v_narrower_than_k_is_refused_by_name():
    with pytest.raises(ValueError, match="needs heads of K and V of one size"):
        narrow(random_case([(1, 40)]), 32).run("cpu")


CAPABILITIES = {
    "reference": Capabilities(narrow_values=True, screens={"int4": ScreenLimits(), "int4+4": ScreenLimits()}),
    "cpu": Capabilities(screens={"int4+4": ScreenLimits(0.36, 1024)}, amx_copies=True),
    "triton": Capabilities(narrow_values=True, screens={"int4": ScreenLimits(0.36)}, graphs=True),
}


@pytest.mark.parametrize("impl", CAPABILITIES)
def test_what_each_does_beyond_the_others(impl: str):
    module = api.load_implementation(impl, DEVICE.type if impl == "triton" else "cpu")[1]
    assert module.capabilities == CAPABILITIES[impl]
    assert module.new_statistics("cpu").shape[1:] == (len(Stat),)
    api.require(module)
    if impl == "triton":
        assert (
            module.allocate(LargestBatch(2, 1, 4, 2, 64, torch.device("meta"))).capabilities
            == CAPABILITIES[impl]
        )


@pytest.mark.parametrize("shape", [(7,), (2, 6)])
def test_statistics_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"statistics \(.*\) must be \[slots, 8\]"):
        random_case([(1, 40)]).run("cpu", torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("impl", ["cpu", TRITON])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_heads_of_512(impl: str, dtype: torch.dtype):
    case = random_case([(1, 100), (2, 40)], 4, 2, 512, 32, dtype, torch.float32)
    torch.testing.assert_close(case.run(impl), case.run("reference"), rtol=1e-4, atol=1e-5)
