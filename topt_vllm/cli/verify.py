"""``topt-vllm verify``: whether this installation serves a model as it should."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from topt_vllm.cli.options import add_trust_remote_code
from topt_vllm.errors import UserError
from topt_vllm.replay.options import table_name


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "verify",
        help="check installation, table and engine with a model; exit status 1 when a check fails",
        description="Checks installation, entry points, kernel and table; starts vLLM with the model and compares "
        "TOPTHETA without thresholds with stock vLLM; decodes a built-in text with the table, and compares rows "
        "and loss with what the table promises. Exit status 0 when all is well, 1 when a check fails.",
    )
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument(
        "--thresholds",
        type=table_name,
        help='table, or "none" for θ = −inf; default: the one that a server would find',
    )
    parser.add_argument(
        "--k-screen", choices=("int4", "int4+4"), help="decode the built-in text with a K screen"
    )
    add_trust_remote_code(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object: passed, and the checks")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints each check when it is made."""
    from topt_vllm.config import TopThetaConfig
    from topt_vllm.table.search import chooses_no_table
    from topt_vllm.verify.run import verify

    if args.k_screen is not None and chooses_no_table(TopThetaConfig(thresholds=args.thresholds)):
        raise UserError(
            f"--k-screen {args.k_screen}: θ = −inf leaves nothing to screen; leave --thresholds none (or "
            "TOPT_THRESHOLDS) out"
        )
    checks = []
    options = {"k_screen": args.k_screen, "trust_remote_code": args.trust_remote_code}
    for check in verify(args.model, args.thresholds, **options):
        checks.append(check)
        if not args.json:
            print(f"{'PASS' if check.passed else 'FAIL'} {check.name}: {check.detail}", flush=True)
    failed = [check.name for check in checks if not check.passed]
    if args.json:
        report = {"passed": not failed, "checks": [asdict(check) for check in checks]}
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print(f"FAIL: {', '.join(failed)}" if failed else "PASS")
    return 1 if failed else 0
