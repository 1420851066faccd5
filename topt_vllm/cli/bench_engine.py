"""``topt-vllm bench engine``: decode steps of the whole engine, offline, with dummy weights or a model's own."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from topt_vllm.benchmarks.model_shapes import SHAPES, write_checkpoint
from topt_vllm.cli.bench_output import provenance, write_json
from topt_vllm.cli.options import add_trust_remote_code, check_least, json_object
from topt_vllm.errors import UserError
from topt_vllm.evaluation.options import SCREENS
from topt_vllm.shares import read_part

_ENGINE = """Times decode steps of whole engines, each in a process of its own, one after the other: vLLM with the
backend that it picks, and with TOPTHETA. A step is the difference between answers of --tokens tokens and of one,
over all but the first token; prompts are random tokens that are cached beforehand, so prefill isn't in it.
Thresholds are found in an engine of the same model, from the queries and keys of its decode steps, so that the
share of V rows is read; what was read is counted. Nothing is said about quality: weights of --shape are dummies."""


def add_mode(modes: Any) -> None:
    """Adds the mode and its options."""
    parser = modes.add_parser("engine", help="decode steps of the whole engine", description=_ENGINE)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", choices=sorted(SHAPES), help="a known model's shape, with dummy weights")
    model.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a model's folder; dummy weights where it has none"
    )
    add("--batch", type=int, default=8, help="sequences decoded at once (default %(default)s)")
    add("--context", type=int, default=8192, help="tokens of each prompt (default %(default)s)")
    add("--tokens", type=int, default=32, help="of each answer (default %(default)s)")
    add(
        "--keep",
        type=_share,
        nargs="+",
        default=(1.0, 0.1),
        metavar="SHARE",
        help="shares of V rows; 1.0: thresholds none, in our kernel by name; none: thresholds none, with "
        "implementation auto (default 1.0 0.1)",
    )
    add("--k-screen", nargs="+", choices=SCREENS, default=["off"], help="as in the settings (default off)")
    add(
        "--first-length",
        type=int,
        metavar="TOKENS",
        help="context length from which thresholds hold; beyond --context every row is dense in our kernel "
        "(default: --context)",
    )
    add("--turns", type=int, default=3, help="measurements of each engine (default %(default)s)")
    add("--rounds", type=int, default=1, help="how often all engines are started (default %(default)s)")
    add(
        "--engine",
        type=json_object('{"enforce_eager": true}'),
        default={},
        metavar="JSON",
        help="more arguments of vllm.LLM, for all engines",
    )
    add_trust_remote_code(parser)
    add("--json", type=Path, metavar="FILE", help="write the result; the file must not exist")
    parser.set_defaults(bench=_run)


def _share(text: str) -> float | str:
    try:
        return text if text == "none" else read_part(text)
    except argparse.ArgumentTypeError:
        problem = f"{text!r}: a share above 0 and up to 1 is expected, or none"
        raise argparse.ArgumentTypeError(problem) from None


def _run(args: argparse.Namespace) -> int:
    _check(args)
    from topt_vllm.benchmarks.engine import EngineBenchmark, our_kernel

    origin = provenance()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or write_checkpoint(args.shape, Path(folder))
        sizes = (args.batch, args.context, args.tokens, tuple(args.keep), our_kernel())
        trust = {"trust_remote_code": True} if args.trust_remote_code else {}
        how = (tuple(args.k_screen), args.first_length, args.rounds, args.turns, args.engine | trust)
        benchmark = EngineBenchmark(model, *sizes, *how)
        outcome = benchmark.run(lambda line: print(line, flush=True))
    _print(outcome)
    write_json(args.json, {**outcome, "provenance": origin})
    return 0


def _check(args: argparse.Namespace) -> None:
    check_least(args, {"batch": 1, "context": 1, "tokens": 2, "turns": 1, "rounds": 1, "first_length": 1})
    if len(set(args.keep)) != len(args.keep):
        raise UserError(f"--keep {' '.join(map(str, args.keep))}: a share is named twice")
    if all(keep in (1.0, "none") for keep in args.keep) and (args.first_length or args.k_screen != ["off"]):
        raise UserError(
            "--first-length and --k-screen are for thresholds, and every --keep is without; add a share below 1"
        )
    if args.model and not (args.model / "config.json").is_file():
        raise UserError(
            f"--model {args.model}: there is no config.json in it; name a model's folder, or use --shape"
        )


def _print(outcome: dict[str, Any]) -> None:
    settings = outcome["settings"]
    weights = "dummy weights" if settings["dummy_weights"] else "its own weights"
    print(
        f"{settings['model']}, {weights}, {settings['batch']} x {settings['context']} tokens, "
        f"{settings['tokens']} tokens an answer"
    )
    print(f"{'':24s} backend          ms/step (least-most)        × platform   V rows  prefill s  start s")
    for r in outcome["engines"]:
        rows = "-" if r["v_rows_read"] is None else f"{r['v_rows_read']:.2%}"
        turns = r["ms_per_step_turns"]
        spread = f"({min(turns):.3f}-{max(turns):.3f})"
        print(
            f"{r['name']:24s} {r['backend']:14s} {r['ms_per_step']:9.3f} {spread:19s} {r['ratio_platform']:11.2f} "
            f"{rows:>8s} {r['prefill_seconds']:10.1f} {r['start_seconds']:8.1f}"
        )
        for reason, share in r["dense_rows"].items():
            print(f"  {share:.1%} of its rows are dense, reason: {reason}")
