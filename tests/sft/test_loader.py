"""Loaders: the same updates whoever prepares them and however many ranks there are, and no process that stays."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.sft.loader import InProcess, num_processes, open_loader
from megatron_dlm.sft.updates import Update
from tests.sft.some_updates import check_a_process_ahead, content, of_many_kinds, updates

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", range(3))
def test_in_the_process_of_the_training(kind: int) -> None:
    loader, expected = open_loader(of_many_kinds()[kind], SFTConfig(num_workers=0), CPU), of_many_kinds()[kind]
    assert isinstance(loader, InProcess)
    for _ in range(8):
        assert content(next(loader)) == content(next(expected))
    loader.close()


def test_a_process_ahead() -> None:
    check_a_process_ahead(lambda many: open_loader(many, SFTConfig(num_workers=1), CPU))


def test_who_prepares_by_default() -> None:
    from megatron_dlm import platform

    assert num_processes(SFTConfig()) == int(platform.is_cuda())
    assert num_processes(SFTConfig(dataloader_type="dali")) == 1
    assert [num_processes(SFTConfig(num_workers=count)) for count in (0, 1)] == [0, 1]


def learned(ranks: list[Update]) -> list[tuple]:
    """Targets of an update over all its ranks: item, index in it, label and weight."""
    columns = [
        zip(*(getattr(row.targets, name).tolist() for name in ("response", "index", "label", "weight")))
        for update in ranks
        for row in update.rows
    ]
    return sorted(itertools.chain.from_iterable(columns))


@pytest.mark.parametrize("settings", [{}, {"ar_loss_coef": 0.5}, {"sft_objective": "random_masking"}])
def test_order_targets_and_weights_do_not_depend_on_data_parallelism(settings: dict) -> None:
    """13 samples in updates of 8: five epochs."""
    jobs = {size: [updates(rank, size, **settings) for rank in range(size)] for size in (1, 2, 4)}
    for _ in range(8):
        found = {size: [next(rank) for rank in job] for size, job in jobs.items()}
        whole = found[1][0]
        for size, ranks in found.items():
            assert learned(ranks) == learned([whole]), size
            assert len({len(one.rows) for one in ranks}) == 1 and len({one.length for one in ranks}) == 1
            for one in ranks:
                assert (one.progress, one.num_predicted, one.causal_from, one.samples, one.block_size) == (
                    *(whole.progress, whole.num_predicted, whole.causal_from, whole.samples, whole.block_size),
                )


def test_a_resumed_run_with_other_ranks_sees_what_would_have_come_next() -> None:
    whole = updates(blocks=(2, 4), starts=(4,))
    for step in range(1, 8):
        saved = next(whole).progress
        rest = [updates(rank, 2, saved=saved, step=step, blocks=(2, 4), starts=(4,)) for rank in range(2)]
        after = updates(saved=saved, step=step, blocks=(2, 4), starts=(4,))
        for _ in range(2):
            expected = next(after)
            assert learned([next(rank) for rank in rest]) == learned([expected])
        again = updates(blocks=(2, 4), starts=(4,))
        assert content(expected) == content(list(itertools.islice(again, step + 2))[-1])
