"""Compiles, before the first step, what later ones need: kernels depend on more than the layer."""

from collections.abc import Callable

import torch

from topt_vllm.attention.api import Implementation
from topt_vllm.attention.common import DecodeBatch, PagedCache

# From one of these sizes to the next kernels are others (``items_pad`` of attention/triton/calls.py). They are
# of a batch's items: a sequence is one, or several where it has many query rows.
_LARGER = (256, 2048, 16384)


class WarmUp:
    """Runs every kind of step once in each kind of layer, without rows; a graph that is captured is left alone.

    Args:
        max_sequences: Most sequences of a step.
        max_query_rows: Most query rows of a sequence that decodes.

    Attributes:
        sequences: Of its batches; between these, and beyond them, kernels are the same.
    """

    def __init__(self, max_sequences: int, max_query_rows: int) -> None:
        sizes = {size // items for size in _LARGER for items in range(1, max_query_rows + 1)}
        self.sequences = {min(sequences, max_sequences) for sequences in (1, *sizes, max_sequences)}
        self._query_rows = {1, max_query_rows}
        self._kinds_done: set[tuple[bool, ...]] = set()

    def run(
        self,
        kind: tuple[bool, ...],
        kernel: Implementation,
        decode: Callable[[torch.Tensor, DecodeBatch, torch.Tensor], object],
        query: torch.Tensor,
        cache: PagedCache,
        block_table: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Does it when it is first called with a layer of its kind.

        Args:
            kind: What kernels depend on that layers of a builder don't share.
            kernel: The operator.
            decode: Decodes a batch in one layer, from its query rows into its output.
            query: [R, H, D], of a step; for its type and layout.
            cache: Of the layer.
            block_table: int32 [S, max blocks], of the step; for its layout.
            out: [R, H, D], of the step; not written.
        """
        if kind in self._kinds_done or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self._kinds_done.add(kind)
        for sequences in self.sequences:
            # Apart, for Triton compiles anew for a pointer that isn't at a multiple of 16 bytes.
            starts, lengths = block_table.new_zeros(sequences + 1), block_table.new_zeros(sequences)
            table = block_table.new_empty_strided((sequences, block_table.shape[1]), block_table.stride())
            for query_rows in self._query_rows:
                batch = DecodeBatch(starts, lengths, table, query_rows)
                decode(query[:1], batch, out[:1])
                kernel.finish(cache, batch)
