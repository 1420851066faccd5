"""``topt-vllm bench capture``: a real model's KV cache as a file, for ``bench decode --cache``."""

import argparse
from pathlib import Path
from typing import Any

from topt_vllm.cli.options import add_trust_remote_code

_CAPTURE = """Runs a model once over the beginning of a text and writes K and V of every full-attention layer and
the last token's query to a file, bfloat16, for `topt-vllm bench decode --cache`."""


def add_mode(modes: Any) -> None:
    """Adds the mode and its options."""
    parser = modes.add_parser("capture", help="a real model's KV cache, for replays", description=_CAPTURE)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a decoder-only model")
    add("--dataset", nargs="+", required=True, metavar="TEXT", help="texts, as for `topt-vllm calibrate`")
    add("--seq-len", type=int, default=8192, help="tokens (default %(default)s)")
    add("--device", help="where the model runs, as for `topt-vllm calibrate`")
    add_trust_remote_code(parser)
    add("--output", type=Path, required=True, metavar="FILE", help="safetensors file; it must not exist")
    parser.set_defaults(bench=_run)


def _run(args: argparse.Namespace) -> int:
    from topt_vllm.benchmarks.capture import capture

    cache = capture(args.model, tuple(args.dataset), args.seq_len, args.device, args.trust_remote_code)
    cache.save(args.output)
    print(
        f"wrote {args.output}: {len(cache.layers)} layers of {cache.identity.id} over {cache.seq_len} tokens of "
        f"{cache.text}"
    )
    return 0
