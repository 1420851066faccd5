"""The decode operator: choice of implementation and the checks that all of them share."""

import importlib
import importlib.util
from typing import Protocol, cast

import torch

from topt_vllm.attention.common import (
    Capabilities,
    DecodeArguments,
    DecodeBatch,
    LargestBatch,
    PagedCache,
    RowThetas,
    Stat,
    Thetas,
)
from topt_vllm.attention.screen import ScreenFormat

IMPLEMENTATIONS = {
    "reference": "topt_vllm.attention.reference",
    "cpu": "topt_vllm.attention.cpu.launcher",
    "triton": "topt_vllm.attention.triton.launcher",
}
_AUTO = {"cpu": "cpu", "cuda": "triton"}


class Implementation(Protocol):
    """The operator on some device: a module named in ``IMPLEMENTATIONS``, or what its ``allocate`` gives."""

    @property
    def capabilities(self) -> Capabilities:
        """What it does beyond what all do; :func:`require` asks for it."""
        ...

    def prepare(self, device_type: str) -> None:
        """One-time work such as compiling; modules only.

        Raises:
            RuntimeError: It can't run here; the message has the remedy.
        """
        ...

    def decode(self, given: DecodeArguments) -> None:
        """Writes ``given.out``, and adds to its accumulators."""
        ...

    def finish(self, cache: PagedCache, batch: DecodeBatch) -> None:
        """Brings what is stored beside K and V up to date after the rows of a batch were written to them.

        Sequence s had its rows at positions [seq_lens[s] − rows, seq_lens[s]) written, decoded ones or a prompt's.
        Every state of ``value_sums`` whose last row is among them is written, from V and the state before it,
        and each row's codes of ``key_screen``, from K. Bits don't depend on how rows were cut into batches.
        Rewritten rows, drafts that were rejected say, need nothing but another call. Call it before
        :func:`decode`: behind the first of several query rows, one may need what that finishes.

        Args:
            cache: The layer's cache.
            batch: All sequences that were written since the last call: one may have blocks of another's as its
                prefix, even those that the other filled in the same step. Sequences of length 0 are padding,
                whatever their rows.
        """
        ...

    def new_statistics(self, device: torch.device | str) -> torch.Tensor:
        """Zeroed accumulators of one layer, float64 [slots, 8]; their sum over slots counts."""
        ...

    def screen_unasked(self, heads_per_kv: int) -> ScreenFormat | None:
        """The K screen that was measured to pay here, for so many query heads to a KV head; modules only."""
        ...

    def screen_bytes(self, format: ScreenFormat, head_dim: int, block_size: int) -> int:
        """Bytes of ``KeyScreen.codes`` for one KV head of one block; 0 where they aren't stored.

        Args:
            format: One of its capabilities; :func:`require` says so.
            head_dim: D.
            block_size: P.

        Raises:
            ValueError: It has no screen for such heads or blocks.
        """
        ...

    def allocate(self, largest: LargestBatch) -> "Implementation":
        """The implementation on buffers for batches of up to these sizes; with the capability ``graphs``.

        It allocates nothing when it runs, and reads nothing back. Layers that run one after another can share it.
        """
        ...

    def copy_to_amx(self, cache: PagedCache, blocks: torch.Tensor, copy: torch.Tensor) -> None:
        """Copies blocks of K and V into the layout of vLLM's AMX kernels; with the capability ``amx_copies``.

        Args:
            cache: Of two bytes an element or one, K of a block stored [D, P], V [P, D].
            blocks: int64 [n], physical blocks.
            copy: [n, Hkv, P, 2 D], contiguous; written.

        Raises:
            RuntimeError: Other shapes or dtypes, or a block that the cache doesn't have.
        """
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
    implementation = cast(Implementation, importlib.import_module(IMPLEMENTATIONS[chosen]))
    implementation.prepare(device_type)
    return chosen, implementation


def require(
    implementation: Implementation, *, narrow_values: bool = False, screen: ScreenFormat | None = None
) -> None:
    """Checks that an implementation can do what is asked of it; arguments as :class:`Capabilities` has them.

    Raises:
        ValueError: It can't; the message names implementations that can.
    """
    offered = implementation.capabilities
    if narrow_values and not offered.narrow_values:
        raise ValueError("this implementation needs heads of K and V of one size; triton and reference don't")
    if screen is not None and screen not in offered.screens:
        known = ", ".join(offered.screens) or "none"
        raise ValueError(f"this implementation has no K screen {screen!r}; it has: {known}")


def decode(implementation: Implementation, given: DecodeArguments) -> None:
    """Top-Theta attention of the rows of a decode batch over a paged KV cache.

    Args:
        implementation: From :func:`load_implementation`; its ``finish`` has brought up to date what lies beside K
            and V.
        given: What is decoded.

    Raises:
        ValueError: Shapes or options that contradict each other, or that the implementation doesn't take.
    """
    _check(given)
    cache = given.cache
    require(
        implementation,
        narrow_values=cache.key.shape[3] != cache.value.shape[3],
        screen=cache.key_screen.format if cache.key_screen is not None else None,
    )
    if given.query.shape[0]:
        implementation.decode(given)


def _check(given: DecodeArguments) -> None:
    query, cache, batch, thetas = given.query, given.cache, given.batch, given.thetas
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, key_dim = cache.value.shape[1], cache.key.shape[3]
    if cache.key.shape[:3] != cache.value.shape[:3]:
        raise ValueError(
            f"key cache {tuple(cache.key.shape)} and value cache {tuple(cache.value.shape)} differ"
        )
    if cache.key.dtype == torch.uint8:
        raise ValueError("the cache holds torch.uint8, which names no format: take a view with the fp8 dtype")
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
    if given.vmean and cache.rows_per_state is None:
        raise ValueError(
            "vmean needs value_sums [B, Hkv, P / T, Dv]; give the cache some, or set the compensation to none"
        )
    statistics, sinks = given.statistics, given.sinks
    if statistics is not None and (statistics.dim() != 2 or statistics.shape[1] != len(Stat)):
        raise ValueError(f"statistics {tuple(statistics.shape)} must be [slots, {len(Stat)}]")
    if given.reached is not None and isinstance(thetas, RowThetas):
        raise ValueError("reached counts against thresholds of heads, not of rows; leave it out")
    if sinks is not None and (sinks.shape != query.shape[1:2] or not sinks.is_floating_point()):
        raise ValueError(
            f"sinks {tuple(sinks.shape)} of {sinks.dtype} must be floating point, [H={num_heads}]"
        )
    if cache.key_screen is not None:
        for name, part in (
            ("mean", cache.key_screen.transform.mean),
            ("scale", cache.key_screen.transform.scale),
        ):
            if part.shape != (num_kv_heads, key_dim) or part.dtype != torch.float32:
                raise ValueError(
                    f"key_screen: {name} {tuple(part.shape)} of {part.dtype} must be float32 [Hkv={num_kv_heads}, "
                    f"D={key_dim}]"
                )
