# Shared by the scripts beside it; sourced, not run.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${TOPT_VENV:-$ROOT/.venv}"
# Of the user's entry in passwd, as Python has it.
[[ -n ${HOME:-} ]] || HOME=~
CACHE="${TOPT_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/topt_vllm}"
CACHE="${CACHE/#\~/$HOME}"
DEMO_MODEL="$CACHE/models/SmolLM2-135M-Instruct"
CHILD=""
# What shipped tables are made with.
CALIBRATION_PLAYS=(hamlet lear othello henry_v coriolanus twelfth_night winters_tale)
CALIBRATED_BUDGETS=(--budget auto --k 64 128 256 --max-loss 1% 0.2%)
CALIBRATED_ROWS=10%

say() { printf '%s\n' "$*"; }

step() { printf '\n== %s\n' "$*"; }

# die MESSAGE...: one line each, to stderr, then exit 1.
die() {
    printf 'error: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '       %s\n' "$@" >&2
    exit 1
}

# plays NAME...: the demo's texts, a line each.
plays() {
    local play
    for play in "$@"; do printf '%s\n' "$CACHE/texts/$play.txt"; done
}

# command_line WORD...: to paste into a shell.
command_line() {
    local word
    for word in "$@"; do
        if [[ $word =~ ^[[:alnum:]_./:=,+@%-]+$ ]]; then printf '%s ' "$word"; else printf '%s ' "${word@Q}"; fi
    done
}

# settings TABLE BUDGET: what --additional-config takes.
settings() {
    "$VENV/bin/python" -c 'import json, sys; print(json.dumps({"toptheta": {"thresholds": sys.argv[1], "budget": sys.argv[2]}}, ensure_ascii=False))' "$@"
}

# Prints the comment at the head of a script, which is its help text.
show_help() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"; }

# The interpreter for .venv: $PYTHON, or the first of these that vLLM's CPU build has wheels for.
find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3.14 python3)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "Python 3.11 to 3.14 was not found (looked for: ${candidates[*]})." \
        "Install it (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev), or name it: PYTHON=/path/to/python $0"
}

# What .venv is made with must have venv and, for the kernels compiled on first use, the headers.
check_python() {
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$1 can't make virtual environments." "Install them (Debian, Ubuntu: apt-get install python3-venv)."
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        die "$1 has no header Python.h, which compiling kernels needs." \
            "Install it (Debian, Ubuntu: apt-get install python3-dev)."
}

check_compiler() {
    local wanted=${CXX:-g++}
    command -v "$wanted" >/dev/null || die "no C++ compiler was found (looked for: $wanted)." \
        "The CPU kernel is compiled on first use. Install one (Debian, Ubuntu: apt-get install g++), or name it with CXX."
}

# A test looks at a page in a browser. Root on Debian gets one; Ubuntu's package is a stub for snap.
find_chromium() {
    local candidate log
    for candidate in chromium chromium-browser google-chrome; do
        if command -v "$candidate" >/dev/null; then return; fi
    done
    if ((EUID == 0)) && command -v apt-get >/dev/null && grep -qx ID=debian /etc/os-release; then
        log="$(mktemp)"
        say "Installing Debian's chromium, for a test of a page (log: $log)"
        if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
            >"$log" 2>&1; then
            rm -f "$log"
            return
        fi
        say "  That failed: $(last_line "$log")"
    fi
    say "There is no Chromium: the test that looks at a page in a browser is skipped (Debian: apt-get install chromium)."
}

# forward COMMAND...: runs it so that signals to this shell take effect at once (bash holds them back while a
# foreground command runs).
forward() {
    "$@" &
    CHILD=$!
    local status=0
    wait "$CHILD" || status=$?
    CHILD=""
    return "$status"
}

stop_child() {
    [[ -z $CHILD ]] || kill -TERM "$CHILD" 2>/dev/null || true
}

# logged LABEL LOG COMMAND...: output goes to LOG; a line of progress every 15 seconds.
logged() {
    local label=$1 log=$2 started=$SECONDS next=15 status=0
    shift 2
    say "$label (log: $log)"
    "$@" >>"$log" 2>&1 &
    CHILD=$!
    while kill -0 "$CHILD" 2>/dev/null; do
        sleep 0.5
        if ((SECONDS - started >= next)); then
            say "  $((SECONDS - started)) s: $(last_line "$log")"
            next=$((next + 15))
        fi
    done
    wait "$CHILD" || status=$?
    CHILD=""
    return "$status"
}

# Last line of a log that says something; pip's warnings about optional folders don't.
last_line() { tail -c 4096 "$1" | tr '\r' '\n' | grep -vE '^[[:space:]]*$|^WARNING: Location' | tail -n 1 | cut -c 1-110 || true; }

# run_tests PYTEST OPTIONS...: two files of tests side by side, each with one thread. Where programs share the cores,
# threads that spin while they wait cost more than they compute, and an engine mostly starts, on one core.
run_tests() {
    step "Tests"
    run_pytest "$VENV/bin/python" -n 2 --dist loadfile --no-loadscope-reorder "$@"
}

# run_pytest PYTHON OPTIONS...
run_pytest() {
    local python=$1
    shift
    # A table in the caller's environment would take the place of the one that a test expects.
    env -u TOPT_THRESHOLDS OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
        "$python" -m pytest -p no:cacheprovider --durations=8 -rs "$@"
}

# find_gpu_python: sets GPU_PYTHON to the Python that runs the tests on a GPU, $TOPT_TEST_PYTHON or one on PATH with a
# vLLM and a torch that sees a GPU. Where none on PATH has, it is empty and NO_GPU says why. Nothing is installed there.
find_gpu_python() {
    local candidate status candidates=(python3 python)
    [[ -z ${TOPT_TEST_PYTHON:-} ]] || candidates=("$TOPT_TEST_PYTHON")
    GPU_PYTHON=""
    for candidate in "${candidates[@]}"; do
        status=0
        NO_GPU="$("$candidate" "$ROOT/scripts/gpu_environment.py" 2>/dev/null)" || status=$?
        case $status in
            0) GPU_PYTHON=$candidate; return ;;
            2) die "$NO_GPU" ;;
        esac
        : "${NO_GPU:=$candidate does not run}"
        [[ -z ${TOPT_TEST_PYTHON:-} ]] || die "TOPT_TEST_PYTHON can't run the tests on a GPU: $NO_GPU."
    done
}
