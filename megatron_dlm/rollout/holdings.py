"""What the rollout engine holds of the device's memory, for the ledger (training/ledger.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.training import profile
from megatron_dlm.training.ledger import Ledger, hold_state


def hold_engine(ledger: Ledger, rig: RolloutRig) -> None:
    """Add what the engine of a rig has."""
    ledger.add("rollout weights", partial(_weights, rig))
    ledger.add("kv cache", partial(_kv_cache, rig))


@contextmanager
def generating(rig: RolloutRig, phase: str) -> Iterator[None]:
    """Around the work of a command that only generates: a phase with a ledger."""
    ledger = Ledger()
    hold_state(ledger, rig.state)
    hold_engine(ledger, rig)
    with ledger.told_in_shortage(), profile.phase(phase):
        yield


def _weights(rig: RolloutRig) -> list[Tensor]:
    """None of them counts where the engine reads the training parameters: the ledger has them already."""
    engine = rig.engine
    return [*engine.model.parameters(), *engine.model.buffers()] if isinstance(engine, Engine) else []


def _kv_cache(rig: RolloutRig) -> list[Tensor] | int:
    engine = rig.engine
    return [engine.cache.storage] if isinstance(engine, Engine) else engine.kv_cache_bytes
