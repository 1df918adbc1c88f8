from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.masking import MaskSchedule

POSITION = torch.arange(5, 21)
BLOCK = POSITION // 4  # blocks 1 to 5, the first and the last ragged


def draws(schedule: MaskSchedule, n: int) -> tuple[np.ndarray, np.ndarray]:
    """bool and float [n, R] over n streams."""
    pairs = [schedule.draw(stream(0, "mask", item), POSITION, BLOCK) for item in range(n)]
    return torch.stack([masked for masked, _ in pairs]).numpy(), torch.stack([weight for _, weight in pairs]).numpy()


def test_a_ratio_of_one_hides_everything() -> None:
    masked, weight = MaskSchedule(min_ratio=1.0).draw(stream(0, "mask"), POSITION, BLOCK)
    assert masked.dtype == torch.bool and masked.all()
    assert weight.dtype == torch.float64 and (weight == 1).all()


def test_one_ratio_per_block_or_per_sample() -> None:
    _, per_block = draws(MaskSchedule("block", max_weight=math.inf), 20)
    _, per_sample = draws(MaskSchedule("sample", max_weight=math.inf), 20)
    for row in per_block:
        for block in range(1, 6):
            assert len(set(row[(BLOCK == block).numpy()])) == 1
        assert len(set(row)) == 5
    assert all(len(set(row)) == 1 for row in per_sample)
    assert len(set(per_sample[:, 0])) == 20 and len(set(per_block[:, 0])) == 20


@pytest.mark.parametrize("per", ["block", "sample"])
def test_ratios_are_uniform_between_the_smallest_and_one(per: str) -> None:
    _, weight = draws(MaskSchedule(per, min_ratio=0.25, max_weight=math.inf), 2000)
    ratio = np.sort(1 / weight[:, 0])
    assert ratio[0] >= 0.25 and ratio[-1] < 1
    expected = 0.25 + 0.75 * (np.arange(2000) + 0.5) / 2000
    assert abs(ratio - expected).max() < 0.75 * 2.2 / math.sqrt(2000)


def test_a_ratio_for_each_token() -> None:
    """As the published code of TraceRL draws them: uniform between two bounds, and with a weight of 1."""
    masked, weight = draws(MaskSchedule("token", min_ratio=0.1, max_ratio=0.9, max_weight=math.inf), 2000)
    assert all(len(set(row)) == len(row) for row in weight[:50])
    ratio = np.sort(1 / weight[:, 3])
    expected = 0.1 + 0.8 * (np.arange(2000) + 0.5) / 2000
    assert ratio[0] >= 0.1 and ratio[-1] < 0.9 and abs(ratio - expected).max() < 0.8 * 2.2 / math.sqrt(2000)
    assert abs(np.corrcoef(1 / weight[:, 3], 1 / weight[:, 4])[0, 1]) < 0.08
    assert abs(masked.mean() - 0.5) < 0.02
    _, flat = draws(MaskSchedule("token", min_ratio=0.1, max_ratio=0.9, max_weight=1.0), 20)
    assert (flat == 1).all()


def test_weights_are_clipped_and_only_clipped() -> None:
    masked, weight = draws(MaskSchedule(max_weight=3.0), 200)
    all_masked, free = draws(MaskSchedule(max_weight=math.inf), 200)
    assert (masked == all_masked).all()
    assert (weight == np.minimum(free, 3.0)).all() and (weight == 3.0).any() and free.max() > 3


@pytest.mark.parametrize("per", ["block", "sample"])
def test_tokens_are_hidden_as_often_as_their_ratio_says(per: str) -> None:
    masked, weight = draws(MaskSchedule(per, max_weight=math.inf), 2000)
    ratio = 1 / weight
    for low in np.arange(0, 1, 0.2):
        chosen = (ratio >= low) & (ratio < low + 0.2)
        spread = math.sqrt((ratio * (1 - ratio))[chosen].sum())
        assert abs(masked[chosen].sum() - ratio[chosen].sum()) < 4.5 * spread


def test_hidden_tokens_of_one_block_are_independent_given_the_ratio() -> None:
    masked, weight = draws(MaskSchedule("sample", max_weight=math.inf), 3000)
    ratio = 1 / weight
    excess = masked - ratio
    together = (excess[:, :-1] * excess[:, 1:]).mean()
    assert abs(together) < 4.5 * (ratio * (1 - ratio)).mean() / math.sqrt(excess[:, 1:].size)


@pytest.mark.parametrize("per", ["block", "sample"])
def test_unbiased_where_the_clip_does_not_bind(per: str) -> None:
    masked, weight = draws(MaskSchedule(per, min_ratio=0.2, max_weight=10.0), 3000)
    spread = math.sqrt(math.log(5) / 0.8 - 1)  # of weight x masked, ratio uniform in [.2, 1]
    assert abs((masked * weight).mean() - 1) < 4.5 * spread / math.sqrt(masked.size)


def test_the_clip_costs_what_arithmetic_says() -> None:
    """Ratio uniform in [0, 1], weight at most 2: the mean is half of 1/2 plus a half of 1."""
    masked, weight = draws(MaskSchedule(min_ratio=0.0, max_weight=2.0), 3000)
    assert abs((masked * weight).mean() - 0.75) < 4.5 / math.sqrt(masked.size)


def test_ratio_and_mask_are_separate_draws_even_where_block_and_position_are_equal() -> None:
    """Blocks of one token: given its ratio, a token is still hidden by chance."""
    position = torch.arange(3000)
    masked, weight = MaskSchedule(min_ratio=0.2).draw(stream(0, "mask"), position, position)
    assert abs(float((masked * weight).mean()) - 1) < 4.5 / math.sqrt(3000)
    assert abs(float(masked.double().mean()) - 0.6) < 4.5 * 0.5 / math.sqrt(3000)


@pytest.mark.parametrize("per", ["block", "sample"])
def test_a_token_is_drawn_alike_whoever_is_drawn_with_it(per: str) -> None:
    schedule, key = MaskSchedule(per), stream(3, "mask")
    masked, weight = schedule.draw(key, POSITION, BLOCK)
    for i in range(len(POSITION)):
        one_masked, one_weight = schedule.draw(key, POSITION[i : i + 1], BLOCK[i : i + 1])
        assert one_masked[0] == masked[i] and one_weight[0] == weight[i]


def test_streams_differ() -> None:
    masked, _ = draws(MaskSchedule(), 200)
    assert len({tuple(row) for row in masked}) > 150
