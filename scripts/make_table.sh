#!/usr/bin/env bash
# A table of one model and what shows its worth, into one folder: calibrates, evaluates on texts that the calibration
# never saw, hides facts in a long prompt, and draws the report. configs/README.md says what to look at.
#
# Usage: ./scripts/make_table.sh MODEL FOLDER [--calibrate TEXT...] [--evaluate TEXT...]
#                                [--length N] [--samples N] [--target-rows N] [--device NAME] [--dtype NAME]
#
#   --calibrate TEXT...  texts to calibrate on (default: seven plays of the demo's)
#   --evaluate TEXT...   texts to evaluate on (default: another play, and code)
#   --length N           tokens of a sequence (default 8192)
#   --samples N          sequences to calibrate on (default 16)
#   --target-rows N      percent, as in topt-vllm calibrate (default 10); none: no such budget, for models whose sliding
#                        windows alone read more, which calibrate then says
#   --device, --dtype    as in topt-vllm calibrate (default: a GPU where there is one; float32)
#
# MODEL is a folder or a hub id, of which FOLDER gets NAME.yaml, evaluation.json and report.html. What is there already
# is kept: a run that was killed goes on, but for the evaluation, which begins anew.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

BUDGETS=(128 loss-1% loss-0.2%)
TARGET=()
LENGTH=8192
SAMPLES=16
DTYPE=float32
DEVICE=()
WORDS=()
CALIBRATE=()
EVALUATE=()

parse() {
    local into=WORDS
    while (($# > 0)); do
        case $1 in
            --help | -h) show_help "$0"; exit 0 ;;
            --calibrate) into=CALIBRATE ;;
            --evaluate) into=EVALUATE ;;
            --length | --samples)
                [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 needs a number of at least 1, got '${2:-}'"
                if [[ $1 == --length ]]; then LENGTH=$2; else SAMPLES=$2; fi
                shift
                ;;
            --target-rows)
                [[ ${2:-} =~ ^([1-9][0-9]?%?|none)$ ]] || die "$1 needs a percentage from 1 to 99, or none, got '${2:-}'"
                CALIBRATED_ROWS=$2
                shift
                ;;
            --device | --dtype)
                [[ -n ${2:-} ]] || die "$1 needs a name"
                if [[ $1 == --device ]]; then DEVICE=(--device "$2"); else DTYPE=$2; fi
                shift
                ;;
            -*) die "unknown option $1; see $0 --help" ;;
            *) declare -n list=$into; list+=("$1") ;;
        esac
        shift
    done
    ((${#WORDS[@]} == 2)) || die "a model and a folder are wanted, got ${#WORDS[@]} words; see $0 --help"
    MODEL=${WORDS[0]}
    FOLDER=${WORDS[1]}
    [[ $CALIBRATED_ROWS != none ]] || return 0
    TARGET=(--target-rows "$CALIBRATED_ROWS")
    BUDGETS+=("rows-${CALIBRATED_ROWS%\%}%")
}

# Texts that were not named: the demo's.
demo_texts() {
    "$VENV/bin/python" "$ROOT/scripts/prepare_demo.py"
    ((${#CALIBRATE[@]} > 0)) || mapfile -t CALIBRATE < <(plays "${CALIBRATION_PLAYS[@]}")
    ((${#EVALUATE[@]} > 0)) || mapfile -t EVALUATE < <(plays romeo_and_juliet human_eval)
}

# once FILE COMMAND...: unless a run before this one made the file.
once() {
    local file=$1
    shift
    if [[ -e $file ]]; then
        say "  $file is there; remove it to make it again."
        return
    fi
    forward "$@" || die "that failed; run the same command again to go on."
}

main() {
    parse "$@"
    trap stop_child EXIT
    step "1/4 Environment"
    forward "$ROOT/scripts/install.sh"
    ((${#CALIBRATE[@]} > 0 && ${#EVALUATE[@]} > 0)) || demo_texts
    mkdir -p "$FOLDER"
    local run="$VENV/bin/topt-vllm" name table
    name="$(basename "$(realpath -ms "$MODEL")")"
    table="$FOLDER/$name.yaml"
    # Thresholds begin at 512 tokens or later.
    local needles=("$LENGTH")
    ((LENGTH < 4096)) || needles+=("$((LENGTH / 4))")
    local model=(--model "$MODEL" --max-seq-length "$LENGTH" --dtype "$DTYPE" "${DEVICE[@]}")

    step "2/4 Thresholds"
    once "$table" "$run" calibrate "${model[@]}" --dataset "${CALIBRATE[@]}" --num-samples "$SAMPLES" \
        "${CALIBRATED_BUDGETS[@]}" "${TARGET[@]}" --output "$table" --resume
    step "3/4 What they cost on other texts"
    # Under another name until it is whole: its records are written as they come.
    local unfinished="$FOLDER/evaluation.unfinished.json"
    rm -f "$unfinished"
    once "$FOLDER/evaluation.json" "$run" evaluate "${model[@]}" --thresholds "$table" --dataset "${EVALUATE[@]}" \
        --rules toptheta --rows --budget "${BUDGETS[@]}" --k-screen off int4 int4+4 \
        --needles "${needles[@]}" --json "$unfinished"
    [[ ! -e $unfinished ]] || mv "$unfinished" "$FOLDER/evaluation.json"
    step "4/4 The report"
    once "$FOLDER/report.html" "$run" report "$table" --evaluation "$FOLDER/evaluation.json" -o "$FOLDER/report.html"
    say ""
    say "$FOLDER has the table, the evaluation and the report. To serve with it:"
    say "  $(command_line vllm serve "$MODEL" --attention-backend TOPTHETA \
        --additional-config "$(settings "$(realpath "$table")" loss-1%)")"
}

main "$@"
