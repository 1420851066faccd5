"""Decode calls over a cache captured from a real model, with the thresholds of a table."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from topt_vllm.attention.common import Selection
from topt_vllm.benchmarks.cache_file import CapturedCache
from topt_vllm.benchmarks.cases import Inputs, Shape, SharedRows
from topt_vllm.benchmarks.comparison import ThetaSet, compare
from topt_vllm.benchmarks.devices import CPU, Device
from topt_vllm.benchmarks.screens import NO_SCREEN, OFF, Screens, plain_transform
from topt_vllm.replay.options import ReplayError
from topt_vllm.table.schema import ThresholdTable


def bench_replay(
    captured: CapturedCache,
    table: ThresholdTable,
    ks: Sequence[int | str],
    batch: int,
    selection: Selection,
    seconds: float,
    screens: Screens = NO_SCREEN,
    only_layers: Sequence[int] | None = None,
    block_size: int = 128,
    device: Device = CPU,
) -> Iterator[dict[str, Any]]:
    """Checks, then times the last token's attention over the table's sparse layers; a call is all of them in order.

    Args:
        captured: The cache.
        table: Thresholds of the same model.
        ks: Budgets of the table, by k or name.
        batch: Sequences: copies of the captured one in blocks of their own.
        selection: Selection and compensation.
        seconds: Time for the turns of each set of layers.
        screens: K screens to measure.
        only_layers: Layers to run; None for every sparse one.
        block_size: Tokens of a block.
        device: Where to measure.

    Returns:
        An iterator that runs them. One record per budget and screen; the first of each set of layers has every row
        kept.

    Raises:
        ReplayError: No layer is left, one that was named is not sparse, or the table doesn't know the keys that a K
            screen is to copy.
        ThresholdTableError: The table has no such budget.
        RuntimeError: As :func:`topt_vllm.benchmarks.comparison.compare`.
    """
    if table.key_statistics is None and any(name != OFF for name in screens.names):
        raise ReplayError(
            "--k-screen: the table has no key_statistics; add them with `topt-vllm calibrate --k-screen-only`"
        )
    known = table.key_statistics.transforms() if table.key_statistics is not None else {}
    # Budgets may differ in their dense layers; only calls over the same layers can be compared.
    by_layers: dict[tuple[int, ...], list[int | str]] = {}
    for k in ks:
        by_layers.setdefault(_layers(captured, table, k, only_layers), []).append(k)

    def run() -> Iterator[dict[str, Any]]:
        identity = {"model": captured.identity.id, "fingerprint": captured.identity.fingerprint}
        for indices, budgets in by_layers.items():
            layers = [layer_inputs(captured, index, batch, block_size, device) for index in indices]
            transforms = [known.get(index) or plain_transform(layers[0].shape) for index in indices]
            targets = [ThetaSet(1.0, [None] * len(layers))]
            targets += [_target(captured, table, k, indices) for k in budgets]
            yield from (
                record | identity
                for record in compare(layers, targets, screens, transforms, selection, seconds, device)
            )

    return run()


def _target(captured: CapturedCache, table: ThresholdTable, k: int | str, indices: Sequence[int]) -> ThetaSet:
    """A budget's thresholds, and the share that it is about to keep, for people."""
    budget = table.budget(k)
    if budget.k is not None:
        keep = min(1.0, budget.k / captured.seq_len)
    else:
        keep = budget.quality.v_rows_read if budget.quality is not None else 1.0
    thetas = budget.thetas(table.lengths)
    return ThetaSet(keep, [thetas[index] for index in indices], k)


def _layers(
    captured: CapturedCache, table: ThresholdTable, k: int | str, only: Sequence[int] | None
) -> tuple[int, ...]:
    sparse = [index for index in table.budget(k).thetas(table.lengths) if index in captured.layers]
    unknown = sorted(set(only or ()) - set(sparse))
    if not sparse:
        raise ReplayError(f"budget {k} skips in none of the layers in the file")
    if unknown:
        raise ReplayError(
            f"--layers {unknown} are not sparse with budget {k}; those in the file are {sparse}"
        )
    return tuple(sparse if only is None else sorted(set(only)))


def layer_inputs(
    captured: CapturedCache, index: int, batch: int, block_size: int, device: Device = CPU
) -> Inputs:
    """One layer's cache as vLLM would hold it on the device, in randomly scattered blocks."""
    layer = captured.layers[index]
    kv_heads, n, dim = layer.key.shape
    shape = Shape((n,) * batch, layer.query.shape[0], kv_heads, dim, block_size, layer.key.dtype)
    generator = torch.Generator().manual_seed(index)
    table = shape.block_table(torch.randperm(shape.total_blocks, generator=generator))
    # Slots behind the context hold zeros: the platform's kernel multiplies them by zero weights.
    padded = torch.zeros(2, kv_heads, shape.blocks * block_size, dim, dtype=layer.key.dtype)
    padded[0, :, :n], padded[1, :, :n] = layer.key, layer.value
    key, value = padded.unflatten(2, (shape.blocks, block_size)).transpose(1, 2)
    query = layer.query.expand(batch, -1, -1).contiguous()
    return device.placed(SharedRows(shape, query, key, value, table, captured.scale, captured.softcap))
