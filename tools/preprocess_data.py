"""Training data as token ids, indexed on the disk: the `preprocess` command under the name that users of Megatron-LM
look for.

python tools/preprocess_data.py --input FILE.jsonl --output PREFIX --tokenizer-model FOLDER --workers 8
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_dlm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
