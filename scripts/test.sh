#!/usr/bin/env bash
# Everything that must hold before a change lands, from nothing: set-up, lint, types, tests.
#
# Usage: ./scripts/test.sh [--fast] [PYTEST OPTIONS]
#
#   --fast  leave out the tests marked slow and engine: all of it within a minute once .venv is there
#
# Everything after that goes to pytest: ./scripts/test.sh --fast -k operator -x; with -n 0 in one process, for --pdb.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FAST=""
case ${1:-} in
    --help | -h) show_help "$0"; exit 0 ;;
    --fast) FAST=1; shift ;;
esac

# check NAME COMMAND...: shows how long it took.
check() {
    local name=$1 started=$SECONDS
    shift
    "$@" || die "$name failed."
    say "  $name: passed in $((SECONDS - started)) s"
}

step "Environment"
"$ROOT/scripts/install.sh"
cd "$ROOT"

if [[ -z $FAST ]]; then
    step "Demo models and texts"
    "$VENV/bin/python" scripts/prepare_demo.py --model smollm2 gemma3
    step "Sources of the other vLLM versions"
    "$VENV/bin/python" scripts/fetch_vllm_sources.py || say "  Tests of their interfaces are skipped."
    step "Browser"
    find_chromium
fi

step "Lint and types"
check "ruff check" "$VENV/bin/ruff" check .
check "ruff format" "$VENV/bin/ruff" format --check .
check "mypy" "$VENV/bin/mypy" topt_vllm scripts

if [[ -n $FAST ]]; then
    run_tests -m "not slow and not engine" "$@"
else
    run_tests "$@"
fi
