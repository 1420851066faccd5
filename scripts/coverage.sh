#!/usr/bin/env bash
# Branch coverage of the package's Python by the tests that start no engine, with the least covered files first.
#
# Usage: ./scripts/coverage.sh [PYTEST OPTIONS]
#
# Left out, for coverage can't see into them: Triton's device functions, which the interpreter runs through
# rewritten sources, and programs that tests start as processes of their own. Exit status 1 below 90 %.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ ${1:-} != --help && ${1:-} != -h ]] || { show_help "$0"; exit 0; }

"$ROOT/scripts/install.sh"
cd "$ROOT"
export COVERAGE_FILE="$(mktemp)"
trap 'rm -f "$COVERAGE_FILE"' EXIT
run_tests -m "not engine" --cov=topt_vllm --cov-branch --cov-report= "$@"
"$VENV/bin/python" -m coverage report --sort=cover --skip-covered --fail-under=90
