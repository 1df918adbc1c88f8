#!/usr/bin/env bash
# Runs the test suite; sets up what it needs first. Arguments go to pytest:  bash tests/run.sh tests/diffusion -k layout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh
use_environment test
# Small tensors and several processes: more threads would only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Two at a time, each file by one of them; more would start a pool of processes for parallel code each.
exec python -m pytest -rfEs --durations 10 --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile "$@"
