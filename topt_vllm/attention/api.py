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
    ) -> None: ...


class ScreenImplementation(Implementation, Protocol):
    """An implementation that can drop keys without reading their K; ``k_screen`` asks for one."""

    def screen_bytes(self, head_dim: int, block_size: int) -> int:
        """Bytes of ``PagedCache.key_screen`` for one KV head of one block."""
        ...

    def update_screen(self, cache: PagedCache, finished_blocks: torch.Tensor) -> None:
        """Writes the low-bit copies of blocks (int64, physical numbers) from their K."""
        ...


class CountingImplementation(Implementation, Protocol):
    """An implementation that counts by row and query head how many keys reach θ; ``adapt`` asks for one."""

    COUNTS_REACHED: bool

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
    ) -> None: ...


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


def counting(implementation: Implementation) -> CountingImplementation:
    """The implementation as one that counts the keys that reach θ.

    Raises:
        ValueError: It doesn't.
    """
    if not getattr(implementation, "COUNTS_REACHED", False):
        raise ValueError("this implementation doesn't count keys by query head; cpu and reference do")
    return cast(CountingImplementation, implementation)


def require_row_thetas(implementation: Implementation) -> None:
    """Checks that an implementation takes :class:`~topt_vllm.attention.common.RowThetas`, for ``policy: sift``.

    Raises:
        ValueError: It doesn't.
    """
    if not getattr(implementation, "TAKES_ROW_THETAS", False):
        raise ValueError("this implementation takes no thresholds by row; cpu and reference do")


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
) -> torch.Tensor:
    """Top-Theta attention of the rows of a decode batch over a paged KV cache.

    Args:
        implementation: From :func:`load_implementation`.
        query: [R, H, D].
        cache: K, V and V sums of the layer.
        batch: Rows, context lengths and block table.
        thetas: Thresholds of the layer's query heads, or of each row, which needs an implementation that
            :func:`require_row_thetas` takes; None for θ = −inf, which keeps every row.
        policy: Selection and compensation.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
        out: [R, H, D] to write into; allocated when None.
        statistics: float64 accumulators to add to (:class:`~topt_vllm.attention.common.Stat`).
        reached: int64 [R, H], counters to add to: keys whose score is θ(n) or more, whatever else keeps them. Rows
            that are dense for their length add nothing. Needs an implementation that :func:`counting` takes, and
            no thresholds by row.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes or options that contradict each other.
    """
    _check(query, cache, batch, thetas, policy)
    if reached is not None and isinstance(thetas, RowThetas):
        raise ValueError("reached counts against thresholds of heads, not of rows; leave it out")
    if out is None:
        out = torch.empty_like(query)
    if not query.shape[0]:
        return out
    rest = policy, scale, softcap, out, statistics
    if isinstance(thetas, RowThetas):
        require_row_thetas(implementation)
    if reached is None:
        implementation.decode(query, cache, batch, thetas, *rest)
    else:
        counting(implementation).decode(query, cache, batch, thetas, *rest, reached)
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
    if cache.key.shape != cache.value.shape:
        raise ValueError(
            f"key cache {tuple(cache.key.shape)} and value cache {tuple(cache.value.shape)} differ"
        )
    if cache.posit8 != (cache.key.dtype == torch.uint8):
        raise ValueError(
            f"cache has posit8 = {cache.posit8} and holds {cache.key.dtype}; posits are stored as torch.uint8, and "
            "torch.uint8 is no other format: take a view with the fp8 dtype, or set posit8"
        )
    if value_dim != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            f"query [R, H={num_heads}, D={head_dim}] doesn't fit a cache with Hkv={num_kv_heads}, D={value_dim}"
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
        cache.value_sums is None or cache.value_sums.shape != (num_blocks, num_kv_heads, head_dim)
    ):
        raise ValueError(f"vmean needs value_sums [B={num_blocks}, Hkv={num_kv_heads}, D={head_dim}]")
