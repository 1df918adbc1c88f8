"""How much memory an engine takes of what is free."""

from __future__ import annotations

import pytest

from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.rollout import RolloutConfig
from tests.tiny import make_session, one_process


@pytest.fixture
def free(monkeypatch) -> int:
    from megatron_dlm.rollout import sizing

    monkeypatch.setattr(sizing.memory, "available", lambda: 10_000_000)
    return 10_000_000


def test_what_others_will_take_is_not_free(free: int) -> None:
    from megatron_dlm.rollout.sizing import engine_options

    config, groups = RolloutConfig(kv_cache_memory_fraction=0.25), one_process()
    assert engine_options(config, groups, 64, False).kv_cache_bytes == 2_500_000
    assert engine_options(config, groups, 64, False, spoken_for=4_000_000).kv_cache_bytes == 1_500_000
    assert engine_options(config, groups, 64, False, spoken_for=free + 1).kv_cache_bytes == 0
    given = RolloutConfig(kv_cache_gib=2**-10)
    assert engine_options(given, groups, 64, False, spoken_for=free).kv_cache_bytes == 2**20


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_fresh_run_leaves_room_for_the_moments_of_its_optimizer(free: int, monkeypatch, offloaded: bool) -> None:
    from megatron_dlm.rollout import rig
    from megatron_dlm.training.sleep import sleep

    built = []
    monkeypatch.setattr(rig, "Engine", lambda model, vocabulary, options: built.append(options) or Stopped.now())
    session = make_session()
    state = session.train_state(OptimizerConfig(), 10)
    if offloaded:
        sleep(state)
    with pytest.raises(Stopped):
        rig.RolloutRig.open(session, state, RolloutConfig(kv_cache_memory_fraction=0.5), 8, 8)
    with pytest.raises(Stopped):
        rig.RolloutRig.open(session, state, RolloutConfig(kv_cache_memory_fraction=0.5), 8, 8, spoken_for=1_000_000)
    moments = 0 if offloaded else 2 * 4 * sum(parameter.numel() for _, parameter in state.named_parameters())
    assert built[0].kv_cache_bytes == (free - moments) // 2
    assert built[1].kv_cache_bytes == (free - moments - 1_000_000) // 2  # the moments of other optimizers


class Stopped(Exception):
    @classmethod
    def now(cls) -> None:
        raise cls
