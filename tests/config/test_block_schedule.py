from __future__ import annotations

import pytest

from megatron_dlm.config.block_schedule import BlockSchedule
from megatron_dlm.config.errors import ConfigError


def test_without_a_schedule_there_is_one_size() -> None:
    assert [BlockSchedule.read(None, 4).at(step) for step in (0, 7, 10**9)] == [4] * 3
    assert BlockSchedule.read(None, None).at(3) is None


def test_sizes_hold_for_their_steps() -> None:
    schedule = BlockSchedule.read(["1:2", "4:3", "full:1", "32"], 32)
    assert [schedule.at(step) for step in range(8)] == [1, 1, 4, 4, 4, None, 32, 32]
    assert schedule.at(10**6) == 32


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["1:2", "4"], "ends in blocks of 4, and the model's are of 32"),
        (["1:2", "full"], "ends in blocks of full"),
        (["1:2", "32:5"], "'32:5' where a size alone"),
        (["1", "32"], "'1' where SIZE:STEPS"),
        (["0:3", "32"], "'0:3'"),
        (["4:0", "32"], "'4:0'"),
        (["four:3", "32"], "'four:3'"),
        (["4:-1", "32"], "'4:-1'"),
    ],
)
def test_what_is_no_schedule_is_refused(stages: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BlockSchedule.read(stages, 32)
