#!/usr/bin/env python
"""Make what the examples need at SIZE=tiny: sums to learn and to be judged, a tokenizer, and two checkpoints in
HuggingFace's format of random weights, a dense one (sdar) and one with experts (sdar-moe).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_dlm.commands.common import prepare_process
from megatron_dlm.config.errors import UserError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.data import quickstart

MODELS = {"sdar": "tiny", "sdar-moe": "tiny-moe"}  # folder -> preset


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder for the data, tokenizer/, sdar/ and sdar-moe/")
    folder = Path(parser.parse_args().output)
    try:
        prepare_process()
        print(quickstart.make(folder, None, seed=0, num_train=200, num_test=20))
        from megatron_dlm.checkpoint.hf.fresh import write_fresh
        from megatron_dlm.data.tokenizer import Tokenizer

        tokenizer = folder / "tokenizer"
        for name, preset in MODELS.items():
            model = ModelConfig(model_preset=preset, init_method_std=0.08)
            write_fresh(folder / name, model, tokenizer, Tokenizer(tokenizer).vocab_size)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
