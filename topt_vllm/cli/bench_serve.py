"""``topt-vllm bench serve``: the whole engine behind the OpenAI API, under the same long prompts."""

import argparse
from pathlib import Path
from typing import Any

from topt_vllm.cli.bench_output import provenance, write_json
from topt_vllm.cli.options import add_trust_remote_code, check_least, json_object

_SERVE = """Serves the model with the backend that vLLM picks and with TOPTHETA in turns, sends both the same long
prompts through the OpenAI API, and compares the time in which all requests decode. Prefix caching is off."""


def add_mode(modes: Any) -> None:
    """Adds the mode and its options."""
    parser = modes.add_parser("serve", help="the whole engine", description=_SERVE)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id")
    add(
        "--dataset",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="texts for the prompts, as for calibrating",
    )
    add("--concurrency", type=int, default=8, help="requests sent at once (default %(default)s)")
    add("--prompt-tokens", type=int, default=7000, help="of each prompt (default %(default)s)")
    add("--max-tokens", type=int, default=128, help="of each answer (default %(default)s)")
    add("--rounds", type=int, default=1, help="how often both are served (default %(default)s)")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of both servers (default %(default)s)",
    )
    add(
        "--toptheta",
        type=json_object('{"budget": 128}'),
        default={},
        metavar="JSON",
        help="settings, as in --additional-config",
    )
    add(
        "--speculative-config",
        type=json_object('{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'),
        metavar="JSON",
        help="drafts of TOPTHETA's server, as vllm serve takes them; the other one has none",
    )
    add_trust_remote_code(parser)
    add("--json", type=Path, metavar="FILE", help="write the result; the file must not exist")
    parser.set_defaults(bench=_run)


def _run(args: argparse.Namespace) -> int:
    check_least(args, {"concurrency": 1, "prompt_tokens": 1, "max_tokens": 2, "rounds": 1})
    from topt_vllm.benchmarks.serve import ServeBenchmark
    from topt_vllm.replay.texts import read_texts

    tokens = args.concurrency * args.prompt_tokens
    documents, _ = read_texts(tuple(args.dataset), tokens, stretches=1)
    text = "\n\n".join(documents)
    sizes = (args.concurrency, args.prompt_tokens, args.max_tokens, args.rounds)
    benchmark = ServeBenchmark(
        args.model,
        text,
        *sizes,
        args.toptheta,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        speculative=args.speculative_config,
    )
    benchmark.check()
    origin = provenance()
    outcome = benchmark.run(lambda line: print(line, flush=True))
    print("            tokens/s   ms between tokens   ms to first token   (medians)")
    for name in ("platform", "toptheta"):
        row = outcome[name]
        numbers = row["decode_tokens_per_second"], row["itl_ms_median"], row["ttft_ms_median"]
        print("{:10s} {:9.1f} {:19.1f} {:19.0f}".format(name, *numbers))
    print(f"decode throughput, toptheta / platform: {outcome['ratio_decode']:.2f}")
    write_json(args.json, {**outcome, "provenance": origin})
    return 0
