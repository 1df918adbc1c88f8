# Sourced by scripts that a newcomer starts: a Python environment with this package in it.
#   use_environment [EXTRA,...]    extras of setup.py
# An active virtual environment is used as it is; otherwise .venv is made in the repository. Nothing is installed twice.

use_environment() {
    local extras=${1:-} root python stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        for python in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
            [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        done
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "Python 3.11 or newer was not found. Install it, or name it: PYTHON=/path/to/python bash $0" >&2
            return 2
        fi
        [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" || return 2
        # shellcheck disable=SC1091
        . "$root/.venv/bin/activate"
    fi
    stamp="$VIRTUAL_ENV/.megatron-dlm-${extras:-base}-$(cksum <"$root/setup.py" | cut -d' ' -f1)"
    [ -e "$stamp" ] && return 0
    echo "Installing megatron_dlm${extras:+[$extras]} into $VIRTUAL_ENV ..."
    # torch first and pinned: the newest torch may be a build with gigabytes of CUDA libraries.
    python -c 'import torch' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check torch==2.13.0 || return 2
    python -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}" || return 2
    touch "$stamp"
}
