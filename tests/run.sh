#!/usr/bin/env bash
# Runs the test suite; sets up what it needs first. Arguments go to pytest:  bash tests/run.sh tests/diffusion -k layout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh
use_environment test
exec python -m pytest "$@"
