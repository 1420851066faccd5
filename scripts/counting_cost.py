#!/usr/bin/env python3
"""What the counters behind /metrics cost: decode calls of 30 layers with and without them, in turns."""

import argparse
import statistics
import time

import torch

from topt_vllm.attention import api
from topt_vllm.attention.common import Selection
from topt_vllm.benchmarks.cases import Shape, make_inputs, thetas_for

LAYERS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8, help="sequences; default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=6016, help="their tokens; default: %(default)s")
    parser.add_argument("--keep", type=float, default=0.1, help="share of V rows; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=200, help="default: %(default)s")
    args = parser.parse_args()

    _, implementation = api.load_implementation("cpu", "cpu")
    selection = Selection()
    case = make_inputs(Shape((args.seq_len,) * args.batch, 9, 3, 64, 128, torch.bfloat16))
    thetas = thetas_for(case, args.keep, selection)
    counted = [implementation.new_statistics("cpu") for _ in range(LAYERS)]
    out = torch.empty_like(case.query)

    def step(counters: list[torch.Tensor] | list[None]) -> float:
        started = time.perf_counter()
        for one in counters:
            api.decode(
                implementation,
                case.query,
                case.cache,
                case.batch,
                thetas,
                selection,
                case.scale,
                0.0,
                out,
                one,
            )
        return time.perf_counter() - started

    nothing = [None] * LAYERS
    step(counted), step(nothing)
    pairs = []
    for turn in range(args.pairs):
        if turn % 2:
            with_counters, without = step(counted), step(nothing)
        else:
            without, with_counters = step(nothing), step(counted)
        pairs.append((with_counters, without))
    ratios = statistics.quantiles([a / b for a, b in pairs], n=10)
    medians = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
    print(
        f"{LAYERS} layers with counters {medians[0]:.2f} ms, without {medians[1]:.2f} ms; "
        f"ratio of pairs: median {ratios[4]:.4f}, p10 {ratios[0]:.4f}, p90 {ratios[8]:.4f}"
    )


if __name__ == "__main__":
    main()
