from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.unmasking import Remasking, UnmaskRules, scheduled_count, select


def naive_select(
    remasking: int,
    confidence: list[float],
    masked: list[bool],
    count: int = 1,
    threshold: float = 0.9,
    bound: float = 0.35,
    last: bool = False,
) -> list[bool]:
    """One row of `select`, in Python, with the two guards: masked positions only, and all of them at the last step."""
    candidates = [i for i in range(len(masked)) if masked[i]]
    count = max(count, 1)
    by_confidence = sorted(candidates, key=lambda i: (-confidence[i], i))
    if last:
        chosen = set(candidates)
    elif remasking == Remasking.SEQUENTIAL:
        chosen = set(candidates[:count])
    elif remasking == Remasking.ENTROPY_BOUNDED:
        chosen, spent = set(by_confidence[:1]), 0.0
        for i in by_confidence:
            spent += -confidence[i]
            if spent >= bound:
                break
            chosen.add(i)
    else:
        chosen = set(by_confidence[:count])
        if remasking == Remasking.DYNAMIC:
            above = {i for i in candidates if confidence[i] > threshold}
            chosen = above if len(above) >= count else above | chosen
    return [i in chosen for i in range(len(masked))]


def run(remasking: int, confidence: list[float], masked: list[bool], **options) -> list[bool]:
    values = dict(count=1, threshold=0.9, bound=0.35, last=False) | options
    rules = UnmaskRules(torch.tensor([int(remasking)]), *(torch.tensor([value]) for value in values.values()))
    return select(rules, torch.tensor([confidence], dtype=torch.float64), torch.tensor([masked]))[0].tolist()


def test_static_takes_the_most_confident() -> None:
    assert run(Remasking.STATIC, [0.1, 0.7, 0.3, 0.2], [True] * 4) == [False, True, False, False]


def test_dynamic_takes_all_above_the_threshold_or_the_best() -> None:
    assert run(Remasking.DYNAMIC, [0.95, 0.7, 0.3, 0.91], [True] * 4) == [True, False, False, True]
    assert run(Remasking.DYNAMIC, [0.1, 0.7, 0.3, 0.2], [True] * 4) == [False, True, False, False]
    assert run(Remasking.DYNAMIC, [0.95, 0.7, 0.3, 0.2], [True] * 4, count=2) == [True, True, False, False]


def test_the_threshold_is_strict() -> None:
    assert run(Remasking.DYNAMIC, [0.5, 0.5, 0.75, 0.5], [True] * 4, threshold=0.5) == [False, False, True, False]


def test_sequential_takes_the_first_masked() -> None:
    assert run(Remasking.SEQUENTIAL, [0.9, 0.1, 0.9, 0.9], [False, True, False, True]) == [False, True, False, False]
    assert run(Remasking.SEQUENTIAL, [0.9, 0.1, 0.9, 0.9], [False, True, False, True], count=2) == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("remasking", [Remasking.STATIC, Remasking.DYNAMIC, Remasking.SEQUENTIAL])
def test_equal_confidence_is_settled_by_the_lowest_index(remasking: Remasking) -> None:
    for count in range(1, 9):
        assert run(remasking, [1.0] * 8, [True] * 8, count=count, threshold=1.0) == [i < count for i in range(8)]
    assert run(remasking, [1.0] * 64, [False] * 5 + [True] * 59, count=7, threshold=1.0) == [
        5 <= i < 12 for i in range(64)
    ]


def test_the_entropy_bound_is_strict_and_lets_one_through() -> None:
    way = Remasking.ENTROPY_BOUNDED
    entropies = [-0.25, -0.0, -0.5, -0.125]
    assert run(way, entropies, [True] * 4, bound=0.5) == [True, True, False, True]
    assert run(way, entropies, [True] * 4, bound=0.375) == [False, True, False, True]
    assert run(way, entropies, [True] * 4, bound=0.3) == [False, True, False, True]
    assert run(way, entropies, [True, False, True, True], bound=0.01) == [False, False, False, True]
    assert run(way, entropies, [True] * 4, bound=100.0, count=1) == [True] * 4
    assert run(way, entropies, [True] * 4, bound=0.01, count=4) == [False, True, False, False]


def test_equal_entropies_are_taken_from_the_left() -> None:
    for fitting in range(1, 9):
        found = run(Remasking.ENTROPY_BOUNDED, [-0.25] * 8, [True] * 8, bound=0.25 * fitting + 0.125)
        assert found == [i < fitting for i in range(8)]


@pytest.mark.parametrize("seed", range(40))
def test_a_mixed_batch_against_the_naive_policy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, b = 25, int(rng.integers(1, 17))
    remasking = rng.integers(0, len(Remasking), n)
    confidence = rng.integers(0, 6, (n, b)) / 8 if seed % 2 else rng.random((n, b))  # with many ties, or none
    confidence = np.where((remasking == Remasking.ENTROPY_BOUNDED)[:, None], confidence - 0.75, confidence)
    confidence = np.where((remasking == Remasking.ENTROPY_BOUNDED)[:, None], confidence.clip(max=0), confidence)
    masked = rng.random((n, b)) < rng.random((n, 1))
    count = rng.integers(0, b + 3, n)
    threshold = rng.choice([0.0, 0.25, 0.5, 0.9, 1.0], n)
    bound = rng.choice([0.125, 0.375, 1.0, 3.0], n)
    last = rng.random(n) < 0.2
    confidence[~masked & (rng.random((n, b)) < 0.5)] = 2.0  # what stands at known positions must not matter
    rules = UnmaskRules(*(torch.from_numpy(x) for x in (remasking, count, threshold, bound, last)))
    chosen = select(rules, torch.from_numpy(confidence), torch.from_numpy(masked)).numpy()
    for row in range(n):
        options = (int(count[row]), float(threshold[row]), float(bound[row]), bool(last[row]))
        case = (int(remasking[row]), confidence[row].tolist(), masked[row].tolist(), *options)
        assert chosen[row].tolist() == naive_select(*case), case
    assert not (chosen & ~masked).any()
    assert (chosen.any(1) == masked.any(1)).all()
    assert (chosen[last] == masked[last]).all()


def test_confidence_at_known_positions_is_not_read() -> None:
    for remasking in Remasking:
        for junk in (float("nan"), float("inf"), -1.0):
            assert run(remasking, [junk, -0.3, junk, -0.4], [False, True, False, True]) == [False, True, False, False]


@pytest.mark.parametrize("block", [1, 2, 3, 4, 8, 32])
def test_the_schedule_spreads_a_block_over_its_steps(block: int) -> None:
    for steps in range(1, block + 1):
        counts = [
            int(scheduled_count(torch.tensor([block]), torch.tensor([steps]), torch.tensor([step]))[0])
            for step in range(steps)
        ]
        assert sum(counts) == block
        assert counts == sorted(counts, reverse=True) and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("remasking", list(Remasking))
@pytest.mark.parametrize("block", [1, 4, 8])
def test_a_block_is_full_after_its_denoising_steps(block: int, remasking: Remasking) -> None:
    rng = np.random.default_rng(block)
    for denoising_steps in range(1, block + 1):
        for known in range(block):
            masked = torch.arange(block)[None] >= known
            for step in range(denoising_steps):
                before = masked.clone()
                rules = UnmaskRules(
                    torch.tensor([int(remasking)]),
                    scheduled_count(torch.tensor([block]), torch.tensor([denoising_steps]), torch.tensor([step])),
                    torch.tensor([0.9]),
                    torch.tensor([0.35]),
                    torch.tensor([step == denoising_steps - 1]),
                )
                masked = masked & ~select(rules, -torch.from_numpy(rng.random((1, block))), masked)
                assert not before.any() or masked.sum() < before.sum()
            assert not masked.any()
