"""One decode call: our kernel and the platform's dense one, in turns on the same cache in the same process."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from topt_vllm.attention import api
from topt_vllm.attention.common import Policy, Stat, Thetas, new_statistics
from topt_vllm.benchmarks.cases import Inputs, Shape, make_inputs, oracle, thetas_for

Call = Callable[[], None]


@dataclass
class Variant:
    """One column of the turns.

    Attributes:
        name: ``platform``, or the target share of V rows.
        call: Runs it once.
        out: What it writes.
        thetas: Thresholds, None for dense.
        keep: Target share of V rows.
        seconds: One entry per turn.
    """

    name: str
    call: Call
    out: torch.Tensor
    thetas: Thetas | None
    keep: float
    seconds: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Milliseconds."""
        ordered = sorted(self.seconds)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def median(self) -> float:
        """Milliseconds."""
        return 1e3 * statistics.median(self.seconds)


def platform_kernel(inputs: Inputs, out: torch.Tensor) -> Call | None:
    """vLLM's CPU_ATTN decode kernel on the same cache; None where vLLM for CPU is not installed."""
    try:
        from vllm import _custom_ops as ops
        from vllm import envs

        torch.ops._C.cpu_attention_with_kv_cache  # noqa: B018
    except (ImportError, AttributeError):
        return None
    shape = inputs.shape
    # The layout that both kernels read; on an AMX machine vLLM would choose another for itself.
    isa = "vec" if shape.block_size % 32 == 0 and shape.head_dim % 32 == 0 else "vec16"
    key, value = inputs.memory.chunk(2, dim=2)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape.batch,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        seq_lens=inputs.batch.seq_lens,
        dtype=shape.dtype,
        query_start_loc=inputs.batch.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
    )

    def call() -> None:
        ops.cpu_attention_with_kv_cache(
            query=inputs.query,
            key_cache=key,
            value_cache=value,
            output=out,
            query_start_loc=inputs.batch.query_start_loc,
            seq_lens=inputs.batch.seq_lens,
            scale=inputs.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=inputs.batch.block_table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    return call


def variants(inputs: Inputs, keeps: Sequence[float], policy: Policy, name: str) -> list[Variant]:
    """The platform's kernel, ours with every row kept, and ours at each share."""
    _, module = api.load_implementation(name, "cpu")
    found = []
    out = torch.full_like(inputs.query, float("nan"))
    platform_call = platform_kernel(inputs, out)
    if platform_call:
        found.append(Variant("platform", platform_call, out, None, 1.0))
    for keep in sorted({1.0, *keeps}, reverse=True):
        thetas, out = thetas_for(inputs, keep, policy), torch.full_like(inputs.query, float("nan"))

        def call(thetas: Thetas | None = thetas, out: torch.Tensor = out) -> None:
            module.decode(
                inputs.query, inputs.cache, inputs.batch, thetas, policy, inputs.scale, 0.0, out, None
            )

        found.append(Variant(f"{keep:g}", call, out, thetas, keep))
    return found


def check(inputs: Inputs, variant: Variant, policy: Policy) -> float:
    """Largest error against float64.

    Raises:
        RuntimeError: It exceeds twice what eager attention in the same dtype has, and the rounding of the output.
    """
    exact = oracle(inputs, variant.thetas, policy, torch.float64)
    eager = oracle(inputs, variant.thetas, policy, inputs.shape.dtype)
    variant.call()
    error = float((variant.out.double() - exact).abs().max())
    band = torch.finfo(inputs.shape.dtype).eps * float(exact.abs().max()) + 1e-6
    allowed = 2 * float((eager.double() - exact).abs().max()) + band
    if not error <= allowed:
        raise RuntimeError(
            f"{variant.name}: error {error:.3g} against float64, allowed {allowed:.3g}; not timed"
        )
    return error


def take_turns(all_variants: Sequence[Variant], seconds: float) -> None:
    """Times every variant once per round until the time is spent, at least 7 rounds."""
    for variant in all_variants:
        variant.call()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 7 or time.perf_counter() < end:
        for variant in all_variants:
            start = time.perf_counter()
            variant.call()
            variant.seconds.append(time.perf_counter() - start)
        rounds += 1


def streaming_bandwidth(module: Any, rounds: int = 15, size: int = 2**29) -> float:
    """Best rate at which all threads together read memory that no cache holds (GB/s)."""
    memory = torch.ones(size, dtype=torch.uint8)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        module.stream(memory)
        best = max(best, size / (time.perf_counter() - start) / 1e9)
    return best


def bytes_moved(inputs: Inputs, rows_read: int, compensated: bool) -> int:
    """K of the whole context, the V rows that were read and the V sums (bytes)."""
    shape = inputs.shape
    row = shape.head_dim * inputs.query.element_size()
    sums = shape.blocks * shape.head_dim * 4 if compensated else 0
    return shape.batch * shape.kv_heads * (shape.seq_len * row + sums) + rows_read * row


def bench_case(
    shape: Shape,
    keeps: Sequence[float],
    policy: Policy,
    seconds: float = 2.0,
    implementation: str = "cpu",
) -> list[dict[str, Any]]:
    """Checks, then times one shape at every share of V rows.

    Args:
        shape: Dimensions.
        keeps: Target shares of V rows.
        policy: Selection and compensation.
        seconds: Time for the turns of this shape.
        implementation: Key of ``api.IMPLEMENTATIONS``.

    Returns:
        One record per share.
    """
    inputs = make_inputs(shape)
    _, module = api.load_implementation(implementation, "cpu")
    columns = variants(inputs, keeps, policy, implementation)
    errors = {variant.name: check(inputs, variant, policy) for variant in columns}
    bandwidth = streaming_bandwidth(module)
    take_turns(columns, seconds)
    bandwidth = max(bandwidth, streaming_bandwidth(module))
    named = {variant.name: variant for variant in columns}
    records = []
    for keep in keeps:
        variant = named[f"{keep:g}"]
        statistics_ = new_statistics()
        module.decode(
            inputs.query,
            inputs.cache,
            inputs.batch,
            variant.thetas,
            policy,
            inputs.scale,
            0.0,
            variant.out,
            statistics_,
        )
        rows_read = int(statistics_[Stat.V_ROWS_READ])
        compensated = variant.thetas is not None and policy.compensation == "vmean"
        moved = bytes_moved(inputs, rows_read, compensated)
        ms, stock = variant.median, named.get("platform")
        records.append(
            {
                "batch": shape.batch,
                "seq_len": shape.seq_len,
                "heads": shape.heads,
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "block_size": shape.block_size,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "keep_target": keep,
                "v_rows_read": rows_read / float(statistics_[Stat.V_ROWS]),
                "ms": ms,
                "ms_p20": variant.quantile(0.2),
                "ms_p80": variant.quantile(0.8),
                "ms_platform": stock.median if stock else None,
                "ms_platform_p20": stock.quantile(0.2) if stock else None,
                "ms_platform_p80": stock.quantile(0.8) if stock else None,
                "ratio_platform": stock.median / ms if stock else None,
                "ratio_keep_all": named["1"].median / ms,
                "bytes_moved": moved,
                "gbps": moved / ms / 1e6,
                "streaming_gbps": bandwidth,
                "bandwidth_share": moved / ms / 1e6 / bandwidth,
                "max_error": errors[variant.name],
                "rounds": len(variant.seconds),
            }
        )
    return records


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the arguments."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "vllm": _version("vllm-cpu") or _version("vllm"),
    }


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
