#!/usr/bin/env python
"""Make a small data set to try the system with: three-term sums, or a file of questions and answers, split.

See megatron_dlm/data/quickstart.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_dlm.config.errors import UserError
from megatron_dlm.data import quickstart


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("See")[0])
    parser.add_argument(
        "--output", required=True, help="folder for sft.jsonl, prompts.jsonl, heldout.jsonl and tokenizer/"
    )
    parser.add_argument(
        "--source",
        help="JSON lines with question, ground_truth_answer and, if any, solution; default: sums of two-digit numbers",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--num-train",
        type=int,
        help=f"default: {quickstart.DEFAULT_SUMS} sums, or all of --source that is not held out",
    )
    parser.add_argument("--num-test", type=int, default=500)
    parser.add_argument("--num-sft", type=int, help="supervised samples; default: as many as prompts")
    parser.add_argument("--slips", type=float, default=0.0, help="share of supervised sums in which the teacher slips")
    args = parser.parse_args()
    try:
        print(
            quickstart.make(
                args.output, args.source, args.seed, args.num_train, args.num_test, args.num_sft, args.slips
            )
        )
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
