"""How long a training step waits for its rows: prepared when they are asked for, by a process ahead, or through DALI.

    python -m benchmarks.loading --step-ms 100 --updates 30

There is no model: a step sleeps for as long as a device would compute, and leaves the processor to whoever prepares
rows. Texts are random tokens with lengths drawn as those of chain-of-thought answers are: log-normal, around 300.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from megatron_dlm import platform
from megatron_dlm.config.block_schedule import BlockSchedule
from megatron_dlm.config.errors import DependencyError
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sampler import EpochSampler, Position
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.context import Sharing
from megatron_dlm.sft.loader import check_loader, open_loader
from megatron_dlm.sft.updates import Place, Updates

VOCABULARY = 50_000
KINDS = {
    "in the process (0)": dict(num_workers=0),
    "a process ahead (1)": dict(num_workers=1),
    "DALI": dict(dataloader_type="dali"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-ms", type=float, default=100.0, help="time of a step without its rows")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--global-batch-size", type=int, default=128)
    parser.add_argument("--max-tokens-per-row", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--samples", type=int, default=2000)
    asked = parser.parse_args()
    print("| rows prepared | first update s | waited ms, median | mean | worst | rows | MB |")
    print("|---|---|---|---|---|---|---|")
    for name, settings in KINDS.items():
        sft = SFTConfig(
            global_batch_size=asked.global_batch_size, max_tokens_per_row=asked.max_tokens_per_row, **settings
        )
        try:
            check_loader(sft)
        except DependencyError as missing:
            print(f"| {name} | {missing} |")
            continue
        first, *waited = _waits(sft, asked)
        rows, size = waited.pop()
        print(
            f"| {name} | {first / 1e3:.1f} | {statistics.median(waited):.1f} | {statistics.fmean(waited):.1f} "
            f"| {max(waited):.1f} | {rows} | {size / 1e6:.1f} |"
        )


def _waits(sft: SFTConfig, asked: argparse.Namespace) -> Iterator:
    """Milliseconds until each update was there; at last the rows of the last one, and their bytes."""
    place = Place(0, 1, 1, 1, Sharing(1, 0, asked.block_size, 1, VOCABULARY + 1), VOCABULARY, VOCABULARY + 1)
    sampler = EpochSampler(_samples(asked), 1, Position("sft"))
    start = time.perf_counter()
    loader = open_loader(Updates(sampler, sft, BlockSchedule((asked.block_size,)), place, 1), sft, platform.device())
    try:
        for _ in range(asked.updates + 1):
            update = next(loader)
            platform.synchronize()
            yield 1e3 * (time.perf_counter() - start)
            time.sleep(asked.step_ms / 1e3)
            start = time.perf_counter()
    finally:
        loader.close()
    tensors = [tensor for row in update.rows for tensor in _tensors(row)]
    yield len(update.rows), sum(tensor.nbytes for tensor in tensors)


def _samples(asked: argparse.Namespace) -> list[Sample]:
    random = np.random.default_rng(0)
    prompts = random.integers(20, 150, asked.samples)
    answers = np.clip(random.lognormal(np.log(300), 0.6, asked.samples), 20, asked.max_tokens_per_row // 3).astype(int)
    words = lambda count: tuple(random.integers(0, VOCABULARY, count).tolist())
    return [Sample(f"s{n}", words(p), words(r)) for n, (p, r) in enumerate(zip(prompts, answers))]


def _tensors(row) -> list[torch.Tensor]:
    return [row.tokens, *(getattr(part, name) for part in (row.layout, row.targets) for name in part.__slots__)]


if __name__ == "__main__":
    main()
