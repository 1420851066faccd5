#!/usr/bin/env bash
# Runs the kernel's tests with AddressSanitizer and UndefinedBehaviorSanitizer compiled into the CPU kernel.
# Extra arguments go to pytest. Needs g++ and ./scripts/install.sh; takes minutes.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
[[ ${1:-} != --help && ${1:-} != -h ]] || { show_help "$0"; exit 0; }
cd "$ROOT"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/sanitizing-g++" <<'EOF'
#!/bin/sh
exec g++ "$@" -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
EOF
chmod +x "$work/sanitizing-g++"

# Python itself is not instrumented, so the runtime is loaded first; what Python never frees is no leak of the kernel.
export CXX="$work/sanitizing-g++" TOPT_CACHE_DIR="$work/cache"
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# Tests on real models need them in the cache folder, which is fresh.
.venv/bin/python -m pytest -q -p no:cacheprovider tests/test_operator.py tests/test_key_screen.py tests/test_running_sums.py \
  -k "not triton" "$@"
