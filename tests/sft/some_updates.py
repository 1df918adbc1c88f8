"""Updates of tiny samples for the tests of loaders; in a module of its own, for another process imports it."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dlm.config.block_schedule import BlockSchedule
from megatron_dlm.config.errors import DataError
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sampler import EpochSampler, Position
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.context import Sharing
from megatron_dlm.sft.updates import Place, Update, Updates
from tests.diffusion.oracles import MASK_ID, PAD_ID

MISTAKE = "x.jsonl, line 7: 'response' is missing. Add it."


def samples(count: int = 13) -> list[Sample]:
    """Some with one prompt, some without any."""
    rng = np.random.default_rng(0)
    word = lambda length: tuple(rng.integers(0, 40, length).tolist())
    return [Sample(f"s{n}", (n // 2,) * (n % 5), word(3 + 2 * (n % 7)) + (49,)) for n in range(count)]


def updates(
    rank: int = 0,
    ranks: int = 1,
    *,
    saved: dict | None = None,
    step: int = 0,
    context: tuple[int, int] = (0, 1),
    blocks: tuple[int | None, ...] = (4,),
    starts: tuple[int, ...] = (),
    **settings: Any,
) -> Updates:
    """Those of one rank. saved: `Update.progress` after `step` of them. context: rank in, and size of, its group."""
    sft = SFTConfig(**{"global_batch_size": 8, "max_tokens_per_row": 96, **settings})
    sampler = EpochSampler(samples(), 3, Position.read("sft", (saved or {}).get("position")))
    sharing = Sharing(context[1], context[0], 4, 8, PAD_ID)
    place = Place(rank, ranks, 8, 1, sharing, MASK_ID, PAD_ID)
    return Updates(sampler, sft, BlockSchedule(blocks, starts), place, seed=5, step=step)


def of_many_kinds() -> list[Updates]:
    """Several epochs of each: blocks that grow up to full attention, a loss of next tokens beside, parts of rows."""
    return [
        updates(blocks=(1, 4, 8, None), starts=(2, 4, 6)),
        updates(1, 2, ar_loss_coef=0.5, complementary_masks=True),
        updates(context=(1, 2), blocks=(2, 4), starts=(3,)),
    ]


class Several:
    """Some of each, one after the other, and then a user's mistake."""

    def __init__(self, kinds: list[Updates], of_each: int) -> None:
        self.kinds, self.of_each = kinds, of_each

    def __iter__(self) -> Iterator[Update]:
        for kind in self.kinds:
            for _ in range(self.of_each):
                yield next(kind)
        raise DataError(MISTAKE)


def content(value: Any) -> Any:
    """Everything in an update, in a form that == compares bit by bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if dataclasses.is_dataclass(value):
        return [content(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [content(one) for one in value] if isinstance(value, list) else value


def check_a_process_ahead(open_loader, of_each: int = 8) -> None:
    """All that a loader with a process of its own promises, with one process, for they take seconds to start.

    Args:
        open_loader: from updates to a loader.
    """
    import pytest

    from megatron_dlm.config.errors import ResourceError

    before = set(multiprocessing.active_children())  # other tests' libraries keep some
    random, loader = torch.get_rng_state(), open_loader(Several(of_many_kinds(), of_each))
    try:
        (process,) = processes = set(multiprocessing.active_children()) - before
        expected = [next(kind) for kind in of_many_kinds() for _ in range(of_each)]
        for number, update in enumerate(expected):
            assert content(next(loader)) == content(update), number
            if number == 3:  # a scheduler sends it to the whole job, and a terminal Ctrl-C
                subprocess.run(["kill", "-s", "TERM", str(process.pid)], check=True)
                subprocess.run(["kill", "-s", "INT", str(process.pid)], check=True)
        assert torch.equal(random, torch.get_rng_state()), "the training's random numbers have moved"
        with pytest.raises(DataError) as told:
            next(loader)
        assert str(told.value) == MISTAKE
        process.kill()
        with pytest.raises(ResourceError, match="--num-workers 0"):
            for _ in range(8):  # what was ready before is the mistake again
                with pytest.raises(DataError):
                    next(loader)
    finally:
        loader.close()
    assert not any(one.is_alive() for one in processes) and set(multiprocessing.active_children()) <= before
    loader.close()


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only its remains."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def spawned(pid: int) -> list[int]:
    """The Python processes that this one has spawned, in the order of their start."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
            if int(words[1]) == pid and b"spawn_main" in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append((int(words[19]), int(name)))
    return [child for _, child in sorted(found)]
