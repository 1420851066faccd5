"""fp8 caches: what vLLM's writer stores in them, and decode calls on them."""

import pytest
import torch
from cpu_features import needs_fp8_caches

from topt_vllm.attention.common import Selection
from topt_vllm.benchmarks.cases import Shape
from topt_vllm.benchmarks.decode import bench_case
from topt_vllm.cli.main import main

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def cut_off(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The next numbers of an fp8 format towards zero, saturating."""
    largest = torch.finfo(dtype).max
    nearest = values.float().clamp(-largest, largest).to(dtype)
    beyond = nearest.float().abs() > values.float().abs()
    # The codes of one sign rise with the magnitude.
    return (nearest.view(torch.uint8) - beyond.to(torch.uint8)).view(dtype).float()


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_cutting_off_is_the_largest_number_that_is_not_beyond(dtype: torch.dtype):
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].unique()
    values = torch.cat([numbers * factor for factor in (1.0, 1.03, 0.97)]).clamp(numbers[0], numbers[-1])
    distance = torch.where(
        numbers.abs() <= values.abs()[:, None], (values[:, None] - numbers).abs(), torch.inf
    )
    assert torch.equal(cut_off(values, dtype), numbers[distance.argmin(dim=1)])


@needs_fp8_caches
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_cutting_off_is_what_vllm_writes(dtype: torch.dtype):
    ops = pytest.importorskip("vllm._custom_ops")
    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        pytest.skip("vLLM for CPU is not installed")
    values = torch.randn(64, 1, 64) * torch.logspace(-5, 4, 64)[:, None, None]
    blocks = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    name = "fp8_e5m2" if dtype == torch.float8_e5m2 else "fp8_e4m3"
    key, value = blocks.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(values, values, key, value, torch.arange(64), "vec", kv_cache_dtype=name)
    written = blocks[:, 0, 32:].flatten(0, 1).view(dtype).float()
    torch.testing.assert_close(written, cut_off(values[:, 0], dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_decode_calls_on_fp8_caches_pass_the_check(dtype: torch.dtype):
    shape = Shape((700,), 4, 2, 64, 64, torch.bfloat16, dtype)
    full, sparse = bench_case(shape, [1.0, 0.2], Selection(), seconds=0)
    assert full["cache_dtype"] == str(dtype).removeprefix("torch.")
    assert full["bytes_moved"] == 2 * 700 * 2 * 64
    assert sparse["v_rows_read"] < 0.4


def test_a_screen_of_an_fp8_cache_is_refused(capsys: pytest.CaptureFixture[str]):
    arguments = ["bench", "decode", "--cache-dtype", "fp8_e4m3", "--k-screen", "int4+4"]
    assert main(arguments) == 2
    assert "has none for a K in fp8_e4m3" in capsys.readouterr().err
