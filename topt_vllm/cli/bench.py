"""``topt-vllm bench``: decode calls, and the whole engine, against the platform's."""

import argparse
import json
from pathlib import Path
from typing import Any

from topt_vllm.cli import (
    UserError,
    bench_autotune,
    bench_capture,
    bench_compile,
    bench_decode,
    bench_engine,
    bench_formats,
    bench_traffic,
)
from topt_vllm.cli.bench_output import provenance, refuse_existing, write_json
from topt_vllm.engines.process import EngineError

_MODES = (
    bench_decode,
    bench_capture,
    bench_formats,
    bench_compile,
    bench_traffic,
    bench_autotune,
    bench_engine,
)
_SERVE = """Serves the model with the backend that vLLM picks and with TOPTHETA in turns, sends both the same long
prompts through the OpenAI API, and compares the time in which all requests decode. Prefix caching is off."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command and its modes."""
    parser = subparsers.add_parser("bench", help="measure against the platform's backend")
    modes = parser.add_subparsers(title="modes", required=True, metavar="MODE", dest="mode")
    for mode in _MODES:
        mode.add_mode(modes)
    _add_serve(modes)
    return parser


def _add_serve(modes: Any) -> None:
    parser = modes.add_parser("serve", help="the whole engine", description=_SERVE)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id")
    add("--dataset", type=Path, nargs="+", required=True, metavar="TEXT", help="text files for the prompts")
    add("--concurrency", type=int, default=8, help="requests sent at once (default %(default)s)")
    add("--prompt-tokens", type=int, default=7000, help="of each prompt (default %(default)s)")
    add("--max-tokens", type=int, default=128, help="of each answer (default %(default)s)")
    add("--rounds", type=int, default=1, help="how often both are served (default %(default)s)")
    add("--toptheta", type=json.loads, default={}, metavar="JSON", help="settings, as in --additional-config")
    add("--json", type=Path, metavar="FILE", help="write the result; the file must not exist")
    parser.set_defaults(bench=_run_serve)


def run(args: argparse.Namespace) -> int:
    """Runs one mode and returns its exit status; what it writes must not exist, which is checked first."""
    refuse_existing(args.output if args.mode == "capture" else args.json)
    try:
        return args.bench(args)
    except (ValueError, EngineError) as error:
        raise UserError(str(error)) from error


def _run_serve(args: argparse.Namespace) -> int:
    from topt_vllm.benchmarks.serve import ServeBenchmark

    missing = [path for path in args.dataset if not path.is_file()]
    if missing:
        raise UserError(f"--dataset {missing[0]} is no file")
    origin = provenance()
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in args.dataset)
    sizes = (args.concurrency, args.prompt_tokens, args.max_tokens, args.rounds)
    benchmark = ServeBenchmark(args.model, text, *sizes, args.toptheta)
    outcome = benchmark.run(lambda line: print(line, flush=True))
    print("            tokens/s   ms between tokens   ms to first token   (medians)")
    for name in ("platform", "toptheta"):
        row = outcome[name]
        numbers = row["decode_tokens_per_second"], row["itl_ms_median"], row["ttft_ms_median"]
        print("{:10s} {:9.1f} {:19.1f} {:19.0f}".format(name, *numbers))
    print(f"decode throughput, toptheta / platform: {outcome['ratio_decode']:.2f}")
    write_json(args.json, {**outcome, "provenance": origin})
    return 0
