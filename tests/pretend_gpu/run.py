"""Runs a program on the pretended GPU, and all Python processes that it starts:

    python -m tests.pretend_gpu.run benchmarks.gpu_check --precision fp32 --num-layers 2 --hidden-size 32 \
        --kv-channels 16 --vocab-size 60
    python -m tests.pretend_gpu.run megatron_dlm sft --config ...
    python -m tests.pretend_gpu.run torch.distributed.run --nproc-per-node 2 -m megatron_dlm sft --config ...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    paths = [str(ROOT / "tests" / "pretend_gpu" / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    where = "in workers too" if sys.argv[1].startswith("benchmarks.") else "1"  # theirs compute (benchmarks/workers.py)
    os.environ |= {"PRETEND_GPU": where, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])


if __name__ == "__main__":
    main()
