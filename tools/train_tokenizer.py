#!/usr/bin/env python
"""Train a tokenizer on text or JSON-lines files. See train_tokenizer.py and train_sentencepiece.py in data/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_dlm.config.errors import UserError
from megatron_dlm.data.train_sentencepiece import train_sentencepiece
from megatron_dlm.data.train_tokenizer import texts_of, train_tokenizer

TYPES = {"bpe": train_tokenizer, "sentencepiece": train_sentencepiece}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("See")[0])
    parser.add_argument("--input", required=True, nargs="+", metavar="FILE", help="text, .jsonl, or either with .gz")
    parser.add_argument(
        "--type",
        choices=sorted(TYPES),
        default="bpe",
        help="bpe: byte-level BPE, HuggingFace's format (default); sentencepiece: needs the package of that name",
    )
    parser.add_argument("--vocab-size", required=True, type=int, help="number of tokens, mask and stop included")
    parser.add_argument("--output", required=True, help="folder to save in")
    parser.add_argument(
        "--add-token",
        nargs="+",
        default=[],
        metavar="TEXT",
        help=r"strings that are always one token, such as '\boxed{'",
    )
    args = parser.parse_args()
    try:
        texts = (text for path in args.input for text in texts_of(path))
        size = TYPES[args.type](texts, args.vocab_size, args.output, args.add_token)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"Wrote a tokenizer of {size} tokens to {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
