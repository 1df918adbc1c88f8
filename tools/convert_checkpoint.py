"""HuggingFace checkpoints in and out: the `convert` command under the name that users of Megatron-LM look for.

python tools/convert_checkpoint.py hf-to-megatron --hf-checkpoint DIR --save DIR
torchrun --nproc-per-node 8 tools/convert_checkpoint.py megatron-to-hf --load DIR --save DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_dlm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
