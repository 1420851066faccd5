"""Entry point of ``topt-vllm``: finds the sub-command and turns the user's errors into one line.

A sub-command is a module with ``add_parser(subparsers)`` and ``run(args) -> int``. Modules are imported to build
the parser, so they import what is heavy inside ``run``.
"""

import argparse
import importlib
import io
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from topt_vllm.cli.examples import epilog
from topt_vllm.errors import UserError
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
    for stream in (sys.stdout, sys.stderr):
        # Names of files needn't be text, and θ is in no narrow locale.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        with _ended_as_by_ctrl_c():
            return args.run(args)
    except BrokenPipeError:
        # Nobody reads any more, as of `topt-vllm inspect … | head`; Python's own flush would complain again.
        sys.stderr.close()
        return 141
    except (UserError, OSError) as error:
        print(f"topt-vllm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("topt-vllm: interrupted", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM, and SIGHUP of a closed terminal, end what was started and remove what is half written."""

    def stop(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    # Only the main thread may; and nohup has SIGHUP ignored.
    allowed = threading.current_thread() is threading.main_thread()
    numbers = [
        n for n in (signal.SIGTERM, signal.SIGHUP) if allowed and signal.getsignal(n) == signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
