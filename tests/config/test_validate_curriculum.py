"""Every refusal of a curriculum, and the combinations that must pass."""

from __future__ import annotations

import pytest

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.validate_curriculum import check_curriculum


def check(over: int | None = None, sources: str = "a.jsonl b.jsonl", **settings: object) -> None:
    rl, rollout = RLConfig(prompt_data=sources.split()), RolloutConfig(over_sampling_batch_size=over)
    check_curriculum(CurriculumConfig(**settings), rl, rollout)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(over=80),
        dict(prompt_weights=[2.0, 0.5]),
        dict(prompt_weights=[1.0], sources="a.jsonl"),
        dict(sources="a.jsonl a.jsonl"),  # without weights a source may stand twice
        dict(prompt_sampling="difficulty", difficulty_floor=0.0, difficulty_momentum=0.0),
        dict(prompt_sampling="difficulty", over=80),
        dict(dynamic_sampling=True, max_sampling_rounds=2),
        dict(dynamic_sampling=True, prompt_sampling="difficulty", prompt_weights=[1.0, 3.0]),
    ],
)
def test_what_can_work_passes(settings: dict) -> None:
    check(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(prompt_weights=[1.0]), "--prompt-weights has 1 entries, and --prompt-data 2"),
        (dict(prompt_weights=[1.0, 2.0, 3.0]), "--prompt-weights has 3 entries, and --prompt-data 2"),
        (dict(prompt_weights=[1.0, 0.0]), "gives b.jsonl the weight 0.0"),
        (dict(prompt_weights=[-1.0, 1.0]), "gives a.jsonl the weight -1.0"),
        (dict(prompt_weights=[1.0, 1.0], sources="a.jsonl a.jsonl"), "names a.jsonl 2 times"),
        (dict(prompt_sampling="difficulty", difficulty_floor=-0.1), "--difficulty-floor is -0.1"),
        (dict(prompt_sampling="difficulty", difficulty_momentum=1.0), "--difficulty-momentum is 1.0"),
        (dict(difficulty_floor=0.5), "--difficulty-floor 0.5 does nothing without --prompt-sampling difficulty"),
        (dict(difficulty_momentum=0.5), "--difficulty-momentum 0.5 does nothing without --prompt-sampling"),
        (dict(dynamic_sampling=True, max_sampling_rounds=1), "--max-sampling-rounds is 1. Use 2"),
        (dict(max_sampling_rounds=4), "--max-sampling-rounds 4 does nothing without --dynamic-sampling"),
        (dict(dynamic_sampling=True, over=80), "--dynamic-sampling and --over-sampling-batch-size 80"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(**settings)
    assert says in str(refused.value)
