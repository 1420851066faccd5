#!/usr/bin/env bash
# From nothing to an answer through Top-Theta attention: sets up .venv, prepares a small model, serves it with an
# unmodified `vllm serve --attention-backend TOPTHETA` and asks it a question about a long text.
#
# Usage: ./scripts/quickstart.sh [--calibrate] [--chat] [--keep] [--port N]
#
#   --calibrate  calibrate the model first (minutes) instead of using the shipped table
#   --chat       then talk to the model about that text, with the cost of each answer; Ctrl-D ends it
#   --keep       leave the server running, and say how to talk to it and how to stop it
#   --port N     serve on this port of 127.0.0.1 (default 8000)
#
# The last line is QUICKSTART and a JSON object: v_rows_read, decode_tokens_per_second, answer.
# Environment: TOPT_CACHE_DIR is where model, texts and kernels go (default ~/.cache/topt_vllm), as
# models/SmolLM2-135M-Instruct, texts/*.txt and kernels/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

PORT=8000
KEEP=""
CALIBRATE=""
CHAT=""
BUDGET=loss-1%
SHIPPED="$ROOT/configs/SmolLM2-135M-Instruct.yaml"
OWN_TABLE="$CACHE/tables/SmolLM2-135M-Instruct.yaml"
TABLE="$SHIPPED"
PLAY="$CACHE/texts/romeo_and_juliet.txt"
SERVER=""
SCRATCH=""
LOG=""

parse() {
    while (($# > 0)); do
        case $1 in
            --calibrate) CALIBRATE=1 ;;
            --chat) CHAT=1 ;;
            --keep) KEEP=1 ;;
            --port)
                [[ ${2:-} =~ ^[0-9]+$ ]] && ((10#$2 >= 1 && 10#$2 <= 65535)) ||
                    die "--port needs a number from 1 to 65535, got '${2:-}'"
                PORT=$2
                shift
                ;;
            --help | -h) show_help "$0"; exit 0 ;;
            *) die "unknown option $1; see $0 --help" ;;
        esac
        shift
    done
}

check_port() {
    "$1" - "$PORT" <<'PYTHON' || die "port $PORT of 127.0.0.1 is taken or not allowed." "Stop what listens there, or choose another: $0 --port N"
import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
PYTHON
}

# Stops the server and all its processes.
stop_server() {
    local waited=0
    [[ -n $SERVER ]] || return 0
    kill -TERM -- "-$SERVER" 2>/dev/null || true
    while kill -0 -- "-$SERVER" 2>/dev/null && ((waited < 100)); do
        sleep 0.1
        waited=$((waited + 1))
    done
    kill -KILL -- "-$SERVER" 2>/dev/null || true
    SERVER=""
}

cleanup() {
    local status=$?
    trap '' HUP INT TERM
    stop_child
    [[ -n $KEEP && $status == 0 ]] || stop_server
    [[ -z $SCRATCH || -n $SERVER ]] || rm -rf "$SCRATCH"
    exit "$status"
}

prepare_table() {
    # The options that the shipped table was made with.
    local texts calibrate
    mapfile -t texts < <(plays "${CALIBRATION_PLAYS[@]}")
    calibrate=("$VENV/bin/topt-vllm" calibrate --model "$DEMO_MODEL" --dataset "${texts[@]}" --num-samples 16
        --max-seq-length 8192 --dtype float32 "${CALIBRATED_BUDGETS[@]}" --target-rows "$CALIBRATED_ROWS"
        --output "$OWN_TABLE" --force)
    if [[ -z $CALIBRATE ]]; then
        say "The shipped table is used: configs/${SHIPPED##*/}. To calibrate one, run with --calibrate, or:"
        say "  $(command_line "${calibrate[@]}")"
        return
    fi
    mkdir -p "${OWN_TABLE%/*}"
    TABLE="$OWN_TABLE"
    forward "${calibrate[@]}" || die "the calibration failed."
}

# Without AVX-512 vLLM multiplies bfloat16 at an eighth of float32's speed, and the prompt takes three times as long.
server_dtype() {
    if [[ $(uname -m) == x86_64 && -r /proc/cpuinfo ]] && ! grep -qw avx512f /proc/cpuinfo; then
        printf float32
    else
        printf bfloat16
    fi
}

start_server() {
    local command
    # vLLM would fill nearly all memory with the cache, and leave one core of a few to its other processes.
    # Eager, for compiling the model takes longer than the one answer; serve without it for a longer run.
    command=(env VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}"
        VLLM_CPU_NUM_OF_RESERVED_CPU="${VLLM_CPU_NUM_OF_RESERVED_CPU:-0}" "$VENV/bin/vllm"
        serve "$DEMO_MODEL" --served-model-name SmolLM2-135M-Instruct
        --attention-backend TOPTHETA --additional-config "$(settings "$TABLE" "$BUDGET")"
        --max-model-len 8192 --dtype "$(server_dtype)" --enforce-eager --host 127.0.0.1 --port "$PORT")
    # Here the workers leave their counters, which the server adds to its /metrics. Each server needs an empty folder of
    # its own, so the command to paste makes one.
    say "  PROMETHEUS_MULTIPROC_DIR=\"\$(mktemp -d)\" $(command_line "${command[@]}")"
    mkdir "$SCRATCH/prometheus"
    : >"$LOG"
    PROMETHEUS_MULTIPROC_DIR="$SCRATCH/prometheus" setsid "${command[@]}" >"$LOG" 2>&1 </dev/null &
    SERVER=$!
}

is_healthy() {
    "$VENV/bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "http://127.0.0.1:$PORT/health" 2>/dev/null
}

# What the server is at, by lines of vLLM's log (0.31 to 0.33).
stage() {
    if grep -q 'Starting to load model' "$LOG"; then
        say "loading the model"
    elif grep -q 'Initializing a V1 LLM engine' "$LOG"; then
        say "starting the engine"
    else
        say "checking model, table and kernel"
    fi
}

wait_for_health() {
    local started=$SECONDS next=10
    say "Waiting for the server, which compiles the decode kernel the first time (log: $LOG)"
    until is_healthy; do
        # The engine can die and leave a front end that waits for it.
        if ! kill -0 "$SERVER" 2>/dev/null || grep -q 'EngineCore failed to start' "$LOG"; then
            show_log
            die "the server failed to start; the end of its log is above."
        fi
        if ((SECONDS - started > 900)); then
            show_log
            die "the server was not ready after 15 minutes; the end of its log is above."
        fi
        if ((SECONDS - started >= next)); then
            say "  $((SECONDS - started)) s: $(stage)"
            next=$((next + 10))
        fi
        sleep 1
    done
    grep -o 'TOPTHETA: .* kernel.*' "$LOG" | head -n 1 || true
}

show_log() {
    say "--- last lines of $LOG" >&2
    tail -n 40 "$LOG" >&2
    say "---" >&2
}

explain_keep() {
    local url="http://127.0.0.1:$PORT"
    cat <<TEXT
The server keeps running at $url/v1 (log: $LOG).
  talk about the play: $(command_line "$VENV/bin/python" "$ROOT/scripts/chat.py" --url "$url" --text "$PLAY")
  from Python: OpenAI(base_url="$url/v1", api_key="none").chat.completions.create(…); short prompts skip nothing
  stop it: kill -- -$SERVER; rm -r $(printf '%q' "$SCRATCH")
    kill ends the server with all its processes; the folder has its workers' counters, and nothing else needs it
TEXT
}

main() {
    parse "$@"
    local python
    python="$(find_python)"
    check_port "$python"
    check_compiler
    [[ -n $CALIBRATE || -f $SHIPPED ]] || die "the shipped table $SHIPPED is missing." "Run with --calibrate to make one."
    trap cleanup EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # A proxy must not see what goes to this machine itself.
    export NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}" no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}"
    SCRATCH="$(mktemp -d)"
    mkdir -p "$CACHE/logs"
    LOG="$CACHE/logs/quickstart-$PORT.log"

    step "1/5 Environment"
    forward "$ROOT/scripts/install.sh"
    step "2/5 Model and texts"
    forward "$VENV/bin/python" "$ROOT/scripts/prepare_demo.py"
    step "3/5 Thresholds"
    prepare_table
    step "4/5 Server"
    start_server
    wait_for_health
    step "5/5 A question about a long text"
    forward "$VENV/bin/python" "$ROOT/scripts/ask.py" --url "http://127.0.0.1:$PORT" \
        --text "$PLAY" --result "$SCRATCH/result.json"
    if [[ -n $CHAT ]]; then
        say ""
        # In the foreground, for it reads the terminal.
        "$VENV/bin/python" "$ROOT/scripts/chat.py" --url "http://127.0.0.1:$PORT" --text "$PLAY" || true
    fi
    if [[ -n $KEEP ]]; then
        say ""
        explain_keep
    else
        stop_server
        say ""
        say "The server is stopped; --keep leaves it running."
    fi
    say ""
    say "QUICKSTART $(<"$SCRATCH/result.json")"
}

main "$@"
