"""Entry point of ``topt-vllm``: finds the sub-command and turns the user's errors into one line.

A sub-command is a module with ``add_parser(subparsers)`` and ``run(args) -> int``. Modules are imported to build
the parser, so they import what is heavy inside ``run``.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from topt_vllm.cli import UserError
from topt_vllm.cli.examples import epilog
from topt_vllm.version import __version__

_COMMANDS = ("calibrate", "inspect", "evaluate", "report", "verify", "bench")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command."""
    parser = argparse.ArgumentParser(prog="topt-vllm", description="Top-Theta sparse attention for vLLM.")
    parser.add_argument("--version", action="version", version=f"topt-vllm {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        module = importlib.import_module(f"topt_vllm.cli.{name}")
        command = module.add_parser(subparsers)
        command.set_defaults(run=module.run)
        command.epilog = epilog(name)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"topt-vllm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("topt-vllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `topt-vllm inspect … | head`: nobody reads any more. Python's own flush at exit would complain again.
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
