#!/usr/bin/env bash
# Runs the test suite; sets up what it needs first. Arguments go to pytest:  bash tests/run.sh tests/diffusion -k layout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh
use_environment test
# Small tensors and several processes: more threads would only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Three at a time, each file by one of them, in the order of tests/conftest.py: one more than the processors of a small
# machine, because tests of several processes, of limits and of waits leave a processor idle again and again.
exec python -m pytest -rfEs --durations 10 --numprocesses "${TEST_PROCESSES:-3}" \
  --dist loadfile --no-loadscope-reorder "$@"
