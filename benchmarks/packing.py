"""How much of the rows of fine-tuning is padding.

    python -m benchmarks.packing --tokenizer-model FOLDER gsm8k_train.jsonl math_train.jsonl

Goes over the samples as a run does (draws masks, packs rows) and counts tokens of all ranks. Without files it takes
texts of made-up lengths, distributed about as those of GSM8K and MATH with worked solutions are. Lines hold `question`
and `response`, or `solution`, or else `ground_truth_answer`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.config.block_schedule import BlockSchedule
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.jsonl import read_jsonl
from megatron_dlm.data.sampler import EpochSampler, Position
from megatron_dlm.data.sft_data import Sample, sample_of
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.diffusion.context import Sharing
from megatron_dlm.diffusion.planner import row_multiple
from megatron_dlm.sft.updates import Place, Updates

MASK_ID, PAD_ID = 8, 9  # of made-up texts
LENGTHS = ((60, 0.45, 118, 0.47), (75, 0.75, 190, 0.75))
"""Of GSM8K and MATH: mean tokens of a prompt and spread of their logarithm, and the same of a response."""


@dataclass(frozen=True, slots=True)
class Waste:
    """Share of padding in all rows of some updates, and in those of the worst of them."""

    mean: float
    worst: float
    rows: float


def made_up(count: int, seed: int = 0) -> list[Sample]:
    """Samples of two kinds, as many of each."""
    rng, samples = np.random.default_rng(seed), []
    for number in range(count):
        prompt, prompt_spread, response, response_spread = LENGTHS[number % len(LENGTHS)]
        sizes = [
            int(np.clip(rng.lognormal(math.log(mean) - spread**2 / 2, spread), 4, 1000))
            for mean, spread in ((prompt, prompt_spread), (response, response_spread))
        ]
        ids = [tuple(rng.integers(0, MASK_ID, size).tolist()) for size in sizes]
        samples.append(Sample(f"{number:032x}", *ids))
    return samples


def read(paths: Sequence[str], tokenizer: Tokenizer) -> list[Sample]:
    """The samples of some files."""
    samples = []
    for path in paths:
        for line, record in read_jsonl(path):
            answer = record.get("response") or record.get("solution") or f"\\boxed{{{record['ground_truth_answer']}}}"
            pair = {"question": record["question"], "response": answer}
            samples.append(sample_of(pair, f"{path}, line {line}", tokenizer, "{question}", False))
    return samples


def measure(
    samples: list[Sample],
    budget: int,
    block_size: int,
    batch: int,
    ranks: int,
    mask_id: int = MASK_ID,
    pad_id: int = PAD_ID,
    updates: int | None = None,
    attention: str = "dense",
) -> Waste:
    """Waste of an epoch, or of its first updates, in rows of `budget` tokens for `ranks` data-parallel ranks.

    attention: backend of rows, whose lengths it decides.
    """
    sft = SFTConfig(data_path=["-"], global_batch_size=batch, max_tokens_per_row=budget)
    place = Place(
        0, ranks, row_multiple(1, attention=attention), 1, Sharing(1, 0, block_size, 1, pad_id), mask_id, pad_id
    )
    source = Updates(EpochSampler(samples, 1, Position("sft")), sft, BlockSchedule((block_size,)), place, 1)
    shares, used, held, rows = [], 0, 0, 0
    for _ in range(updates or len(samples) // batch):
        update = next(source)
        slots = len(update.rows) * ranks * update.length
        used, held, rows = used + update.tokens, held + slots, rows + len(update.rows) * ranks
        shares.append(1 - update.tokens / slots)
    return Waste(1 - used / held, max(shares), rows / len(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="JSON lines; made-up lengths without any")
    parser.add_argument("--tokenizer-model", help="folder of the tokenizer for the files")
    parser.add_argument("--max-tokens-per-row", type=int, default=4096)
    parser.add_argument("--attention-backend", choices=("dense", "flex"), default="dense")
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--data-parallel", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    if bool(args.files) != bool(args.tokenizer_model):
        parser.error("files need --tokenizer-model, and it needs files")
    words = Tokenizer(args.tokenizer_model) if args.files else None
    samples = read(args.files, words) if words else made_up(10_000)
    ids = (words.mask_id, words.pad_id) if words else (MASK_ID, PAD_ID)
    print(f"{len(samples)} samples; {args.max_tokens_per_row} tokens per row, blocks of {args.block_size}")
    print("global batch  data parallel  rows per update  padding  worst update")
    for batch in args.global_batch_size:
        for ranks in args.data_parallel:
            sizes = args.max_tokens_per_row, args.block_size, batch, ranks
            found = measure(samples, *sizes, *ids, attention=args.attention_backend)
            print(f"{batch:12}  {ranks:13}  {found.rows:15.1f}  {found.mean:7.2%}  {found.worst:12.2%}")


if __name__ == "__main__":
    main()
