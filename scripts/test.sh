#!/usr/bin/env bash
# Everything that must hold before a change lands, from nothing: set-up, lint, types, tests.
#
# Usage: ./scripts/test.sh [--fast | --gpu] [PYTEST OPTIONS]
#
#   --fast  leave out the tests marked slow and engine: all of it within a minute once .venv is there
#   --gpu   the tests of the GPU's kernels and adapter alone, on the GPU
#
# Where a Python on PATH has a vLLM and a torch that sees a GPU, it runs those tests there, in a whole run too;
# TOPT_TEST_PYTHON names another. Nothing is installed in it. Elsewhere they run in Triton's interpreter, on the CPU.
#
# Everything after that goes to pytest: ./scripts/test.sh --fast -k operator -x; with -n 0 in one process, for --pdb.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODE=""
case ${1:-} in
    --help | -h) show_help "$0"; exit 0 ;;
    --fast | --gpu) MODE=$1; shift ;;
esac

# check NAME COMMAND...: shows how long it took.
check() {
    local name=$1 started=$SECONDS
    shift
    "$@" || die "$name failed."
    say "  $name: passed in $((SECONDS - started)) s"
}

# run_gpu_tests PYTEST OPTIONS...: several at a time, for most of it is compiling.
run_gpu_tests() {
    step "Tests on the GPU, by $GPU_PYTHON"
    run_pytest "$GPU_PYTHON" -n 4 "$@" -m gpu
}

cd "$ROOT"
if [[ $MODE != --fast ]]; then
    find_gpu_python
    [[ -n $GPU_PYTHON ]] || say "No GPU, for $NO_GPU: its tests run in Triton's interpreter, on the CPU."
fi
if [[ $MODE == --gpu && -n $GPU_PYTHON ]]; then
    run_gpu_tests "$@"
    exit
fi

step "Environment"
"$ROOT/scripts/install.sh"
if [[ $MODE == --gpu ]]; then
    run_tests "$@" -m gpu
    exit
fi

if [[ -z $MODE ]]; then
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

if [[ $MODE == --fast ]]; then
    run_tests -m "not slow and not engine" "$@"
    exit
fi
run_tests "$@"
# 5: the options selected none of these.
[[ -z $GPU_PYTHON ]] || run_gpu_tests "$@" || (($? == 5))
