"""``topt-vllm bench``: decode calls, and the whole engine, against the platform's."""

import argparse
import importlib
from typing import Any

from topt_vllm.cli.bench_output import check_output
from topt_vllm.errors import UserError

_MODES = ("decode", "capture", "compile", "autotune", "engine", "serve")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command and its modes."""
    parser = subparsers.add_parser("bench", help="measure against the platform's backend")
    modes = parser.add_subparsers(title="modes", required=True, metavar="MODE", dest="mode")
    for name in _MODES:
        importlib.import_module(f"topt_vllm.cli.bench_{name}").add_mode(modes)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs one mode and returns its exit status; what it writes is checked first."""
    check_output(args.output if args.mode == "capture" else args.json)
    try:
        return args.bench(args)
    # Engines, compilers and checks of results raise RuntimeError, as does torch where memory runs out.
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
