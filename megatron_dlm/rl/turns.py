"""Whose turn it is on the device: phases of an RL step take its memory one after the other.

    during = partial(turns.phase, watch=watch)
    with during("rollout"):              # --offload-train: the policy's gradients and optimizer sleep
        ...                              # --offload-rollout: the engine has its KV cache in here only
    with during("old_logprobs"):         # forward passes need neither
        ...
    with during("train"):                # gradients and optimizer are there, and the value model's sleep
        ...
    with during("train_value"):          # the other way round
        ...

A phase is a name: its seconds are `perf/NAME_time`, its memory is a line of the ledger. What sleeping and waking take
is a phase of its own in the seconds, `offload`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from megatron_dlm.config.rl import RLConfig
from megatron_dlm.platform import memory
from megatron_dlm.rl.learner import Models
from megatron_dlm.rollout.holdings import hold_engine
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.training import profile
from megatron_dlm.training.ledger import Ledger, hold_state
from megatron_dlm.training.report import Stopwatch
from megatron_dlm.training.sleep import sleep, wake

GENERATING = ("rollout", "eval")
TRAIN, TRAIN_VALUE = "train", "train_value"


class Turns:
    """One per run.

    Attributes:
        ledger: of the models and the engine.
    """

    def __init__(self, models: Models, rig: RolloutRig, rl: RLConfig) -> None:
        self.state, self.rig, self.value_state = models.policy, rig, models.value
        self.offload_train, self.offload_rollout = rl.offload_train, rl.offload_rollout
        self.offloads = rl.offload_train or rl.offload_rollout
        self.ledger = Ledger()
        teacher = None if models.teacher is None else models.teacher.state
        for prefix, state in (
            ("", models.policy),
            ("value ", models.value),
            ("reference ", models.reference),
            ("teacher ", teacher),
        ):
            if state is not None:
                hold_state(self.ledger, state, prefix)
        hold_engine(self.ledger, rig)

    @contextmanager
    def phase(self, name: str, watch: Stopwatch | None = None) -> Iterator[None]:
        """A phase, with the memory that it needs. Collective."""
        generating, updated = name in GENERATING, {TRAIN: self.state, TRAIN_VALUE: self.value_state}.get(name)
        timed = nullcontext if watch is None else lambda key: watch.phase(f"{key}_time")
        with self.ledger.told_in_shortage():
            if self.offloads and (generating or updated is not None):
                with timed("offload"):
                    if self.offload_train:
                        for state in (self.state, self.value_state):
                            if state is not None and state is not updated:
                                sleep(state)
                    if generating and self.offload_rollout:
                        self.rig.engine.wake()
                    if updated is not None:
                        wake(updated)
            with profile.phase(name), timed(name):
                yield
            self.ledger.mark(name)
            if generating and self.offload_rollout:
                with timed("offload"):
                    self.rig.engine.sleep()
                    memory.give_back()

    @contextmanager
    def judging(self, watch: Stopwatch) -> Iterator[None]:
        """The phase `reward`, which takes nothing of the device."""
        with profile.phase("reward"), watch.phase("reward_time"):
            yield
