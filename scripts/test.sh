#!/usr/bin/env bash
# Everything that must hold before a change lands, from nothing: set-up, lint, types, tests.
#
# Usage: ./scripts/test.sh [--fast] [PYTEST OPTIONS]
#
#   --fast  leave out the tests that start a vLLM engine on a real model
#
# Everything after that goes to pytest: ./scripts/test.sh --fast -k operator -x
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

# A table in the caller's environment would take the place of the one that a test expects.
unset TOPT_THRESHOLDS
# Where several programs share the cores, threads that spin while they wait cost more than they compute.
export OMP_WAIT_POLICY=passive

# run_tests NAME PYTEST OPTIONS...: it is no failure that the caller's options select none of these.
ran=""
run_tests() {
    local status=0
    step "$1"
    shift
    "$VENV/bin/python" -m pytest --durations=8 -rs "$@" || status=$?
    ((status == 5)) || ran=1
    ((status == 0 || status == 5)) || exit "$status"
}

run_tests "Tests" -m "not engine" "$@"
if [[ -z $FAST ]]; then
    # An engine mostly starts, on one core; two run side by side, each with one thread, wherever there is room.
    export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
    run_tests "Tests that start engines" -m engine -n 2 --dist loadfile "$@"
fi
[[ -n $ran ]] || die "no test was selected."
