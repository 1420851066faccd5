"""The decode operator: choice of implementation and the checks that all of them share."""

import importlib
import importlib.util
from typing import Protocol, cast

import torch

from topt_vllm.attention import posit
from topt_vllm.attention.common import DecodeBatch, PagedCache, Policy, RowThetas, Thetas

IMPLEMENTATIONS = {
    "reference": "topt_vllm.attention.reference",
    "cpu": "topt_vllm.attention.cpu.launcher",
    "triton": "topt_vllm.attention.triton.launcher",
}
_AUTO = {"cpu": "cpu", "cuda": "triton"}


class Implementation(Protocol):
    """What a module named in ``IMPLEMENTATIONS`` offers."""

    def decode(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DecodeBatch,
        thetas: Thetas | RowThetas | None,
        policy: Policy,
        scale: float,
        softcap: float,
        out: torch.Tensor,
        statistics: torch.Tensor | None,
        reached: torch.Tensor | None = None,
    ) -> None:
        """As :func:`decode`. Where ``TAKES_SINKS`` is true, ``sinks`` may follow."""
        ...


class ScreenImplementation(Implementation, Protocol):
    """An implementation that can drop keys without reading their K; ``k_screen`` asks for one."""

    def screen_bytes(self, head_dim: int, block_size: int) -> int:
        """Bytes of ``PagedCache.key_screen`` for one KV head of one block."""
        ...

    def update_screen(self, cache: PagedCache, finished_blocks: torch.Tensor) -> None:
        """Writes the low-bit copies of blocks (int64, physical numbers) from their K."""
        ...


def load_implementation(name: str, device_type: str) -> tuple[str, Implementation]:
    """Imports an implementation and does its one-time work (compiling), so that the first step is not slow.

    Args:
        name: ``auto``, or a key of ``IMPLEMENTATIONS``. A named one loads or raises; only ``auto`` picks.
        device_type: torch device type of the KV cache, such as ``cpu``.

    Returns:
        The name that was chosen, and the module.

    Raises:
        ValueError: No such implementation, or none for this device.
        RuntimeError: It can't run here (no compiler, say); the message has the remedy.
    """
    chosen = _AUTO.get(device_type) if name == "auto" else name
    if chosen is None or chosen not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {name!r} is not available for {device_type} tensors in this release; "
            f"available: {', '.join(sorted(IMPLEMENTATIONS))}"
        )
    module = importlib.import_module(IMPLEMENTATIONS[chosen])
    if hasattr(module, "prepare"):
        module.prepare(device_type)
    return chosen, cast(Implementation, module)


def screening(implementation: Implementation) -> ScreenImplementation:
    """The implementation as one that has a K screen.

    Raises:
        ValueError: It has none.
    """
    if not hasattr(implementation, "update_screen"):
        raise ValueError("this implementation has no K screen; of those here, cpu has one")
    return cast(ScreenImplementation, implementation)


# What not every implementation does. One that does has a constant of this name, which is true.
_CAPABILITIES = {
    "TAKES_SINKS": "takes no attention sinks; triton and reference do",
    "TAKES_NARROW_VALUES": "needs heads of K and V of one size; triton and reference don't",
}


def _require(implementation: Implementation, capability: str) -> None:
    if not getattr(implementation, capability, False):
        raise ValueError(f"this implementation {_CAPABILITIES[capability]}")


def finish_blocks(implementation: Implementation, cache: PagedCache, finished_blocks: torch.Tensor) -> None:
    """Brings what is stored per block up to date after the last slot of blocks was written.

    Everything is computed from the block's rows again instead of updated, which makes it idempotent: preemption,
    block reuse and rejected speculative tokens can't corrupt it.

    Args:
        implementation: From :func:`load_implementation`.
        cache: The layer's cache; ``value_sums`` and ``key_screen`` are written where present.
        finished_blocks: int64 [any], physical block numbers.
    """
    if not finished_blocks.numel():
        return
    if cache.value_sums is not None:
        rows = cache.value[finished_blocks]
        sums = (posit.decode(rows) if cache.posit8 else rows).sum(dim=2, dtype=torch.float32)
        cache.value_sums.index_copy_(0, finished_blocks, sums)
    if cache.key_screen is not None:
        screening(implementation).update_screen(cache, finished_blocks)


def decode(
    implementation: Implementation,
    query: torch.Tensor,
    cache: PagedCache,
    batch: DecodeBatch,
    thetas: Thetas | RowThetas | None,
    policy: Policy,
    scale: float,
    softcap: float = 0.0,
    out: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    reached: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Top-Theta attention of the rows of a decode batch over a paged KV cache.

    Args:
        implementation: From :func:`load_implementation`.
        query: [R, H, D].
        cache: K, V and V sums of the layer.
        batch: Rows, context lengths and block table.
        thetas: Thresholds of the layer's query heads, or of each row; None for θ = −inf, which keeps every row.
        policy: Selection and compensation.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
        out: [R, H, Dv] to write into; allocated when None.
        statistics: float64 accumulators to add to (:class:`~topt_vllm.attention.common.Stat`).
        reached: int64 [R, H], counters to add to: keys whose score is θ(n) or more, whatever else keeps them. Rows
            that are dense for their length add nothing. Not with thresholds by row.
        sinks: float32 [H], a logit of each query head that takes probability as one more key would, has no V row
            and is compensated by nothing; None for none. Not every implementation takes them.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes or options that contradict each other, or that the implementation doesn't take.
    """
    _check(query, cache, batch, thetas, policy)
    if reached is not None and isinstance(thetas, RowThetas):
        raise ValueError("reached counts against thresholds of heads, not of rows; leave it out")
    if cache.key.shape[3] != cache.value.shape[3]:
        _require(implementation, "TAKES_NARROW_VALUES")
    options = {}
    if sinks is not None:
        _require(implementation, "TAKES_SINKS")
        if sinks.shape != query.shape[1:2] or sinks.dtype != torch.float32:
            raise ValueError(
                f"sinks {tuple(sinks.shape)} of {sinks.dtype} must be float32 [H={query.shape[1]}]"
            )
        options["sinks"] = sinks
    if out is None:
        out = query.new_empty(*query.shape[:2], cache.value.shape[3])
    if query.shape[0]:
        arguments = query, cache, batch, thetas, policy, scale, softcap, out, statistics, reached
        implementation.decode(*arguments, **options)
    return out


def _check(
    query: torch.Tensor,
    cache: PagedCache,
    batch: DecodeBatch,
    thetas: Thetas | RowThetas | None,
    policy: Policy,
) -> None:
    num_heads, head_dim = query.shape[1:]
    num_blocks, num_kv_heads, _, value_dim = cache.value.shape
    key_dim = cache.key.shape[3]
    if cache.key.shape[:3] != cache.value.shape[:3]:
        raise ValueError(
            f"key cache {tuple(cache.key.shape)} and value cache {tuple(cache.value.shape)} differ"
        )
    if cache.posit8 != (cache.key.dtype == torch.uint8):
        raise ValueError(
            f"cache has posit8 = {cache.posit8} and holds {cache.key.dtype}; posits are stored as torch.uint8, and "
            "torch.uint8 is no other format: take a view with the fp8 dtype, or set posit8"
        )
    if key_dim != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            f"query [R, H={num_heads}, D={head_dim}] doesn't fit a cache with Hkv={num_kv_heads}, D={key_dim}"
        )
    if batch.query_start_loc.shape[0] != batch.seq_lens.shape[0] + 1:
        raise ValueError("query_start_loc must have one entry more than seq_lens")
    if isinstance(thetas, RowThetas) and thetas.theta.shape != query.shape[:2]:
        raise ValueError(f"theta {tuple(thetas.theta.shape)} must be [R, H] = {tuple(query.shape[:2])}")
    if isinstance(thetas, Thetas) and thetas.theta.shape != (num_heads, thetas.lengths.shape[0]):
        raise ValueError(
            f"theta {tuple(thetas.theta.shape)} must be [H={num_heads}, L={thetas.lengths.shape[0]}]"
        )
    needs_sums = policy.compensation == "vmean" and thetas is not None
    if needs_sums and (
        cache.value_sums is None or cache.value_sums.shape != (num_blocks, num_kv_heads, value_dim)
    ):
        raise ValueError(f"vmean needs value_sums [B={num_blocks}, Hkv={num_kv_heads}, Dv={value_dim}]")
