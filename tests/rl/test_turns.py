"""RL steps whose phases take turns on the device are the steps of those that do not."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.run import TrainingRunConfig
from megatron_dlm.rl.learner import Models
from megatron_dlm.training.pace import Pace
from tests.harness import pool
from tests.rl.test_trainer import RL, Always, comparable, make_trainer
from tests.tiny import make_state, quiet

OFFLOAD = {"offload_train": True, "offload_rollout": True}


def without_memory(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in comparable(metrics).items() if not name.startswith("memory/")}


def optimizer_state(state) -> list[torch.Tensor]:
    from megatron_dlm.training.sleep import optimizer_tensors, wake

    wake(state)
    return [tensor.detach().clone() for tensor in optimizer_tensors(state)]


class FakeEngine:
    """Writes down what is asked of it, and who is awake then."""

    kv_cache_bytes = 5

    def __init__(self, state, calls: list) -> None:
        self.state, self.calls = state, calls

    def sleep(self) -> None:
        self.calls.append("engine sleeps")

    def wake(self) -> None:
        from megatron_dlm.training.sleep import asleep

        self.calls.append(f"engine wakes, policy {'asleep' if asleep(self.state) else 'awake'}")


def test_each_phase_has_what_it_needs_and_no_more() -> None:
    from megatron_dlm.rl.turns import Turns
    from megatron_dlm.training.report import Stopwatch
    from megatron_dlm.training.sleep import asleep

    state, calls = make_state(torch.float32), []
    rig = SimpleNamespace(engine=FakeEngine(state, calls))
    turns, watch = Turns(Models(state), rig, RLConfig(offload_train=True, offload_rollout=True)), Stopwatch()
    found = []
    for name in ("rollout", "old_logprobs", "train", "update_weights", "eval", "rollout"):
        with turns.phase(name, watch):
            found.append((name, asleep(state)))
            calls.append(name)
    assert found == [
        ("rollout", True),
        ("old_logprobs", True),
        ("train", False),
        ("update_weights", False),
        ("eval", True),
        ("rollout", True),
    ]
    wakes = "engine wakes, policy asleep"
    first = [wakes, "rollout", "engine sleeps", "old_logprobs", "train", "update_weights"]
    assert calls == [*first, wakes, "eval", "engine sleeps", wakes, "rollout", "engine sleeps"]
    assert set(watch.seconds) == {f"{name}_time" for name, _ in found} | {"offload_time"}
    ledger = turns.ledger.phases
    assert ledger["rollout"].held["kv cache"].device == 5 and ledger["train"].held["gradients"].device > 0
    assert ledger["rollout"].held["gradients"].device == 0


def test_a_value_model_and_the_policy_take_turns() -> None:
    from megatron_dlm.rl.turns import Turns
    from megatron_dlm.training.sleep import asleep, wake
    from tests.tiny import make_session

    state, value, calls = make_state(torch.float32), make_session().value_state(OptimizerConfig(), 9), []
    phases, found = ("rollout", "values", "train_value", "train", "train_value", "eval"), {}
    for offload in (True, False):
        rig, rl = SimpleNamespace(engine=FakeEngine(state, calls)), RLConfig(offload_train=offload)
        turns = Turns(Models(state, value), rig, rl)
        found[offload] = []
        for name in phases:
            with turns.phase(name):
                found[offload].append((asleep(state), asleep(value)))
        held = turns.ledger.phases
        assert held["train"].held["value parameters"].device > 0
        assert (held["train"].held["value gradients"].device > 0) == (not offload)
        assert held["train_value"].held["value gradients"].device > 0
        for one in (state, value):
            wake(one)
    both = (True, True)
    assert found[True] == [both, both, (True, False), (False, True), (True, False), both]
    assert found[False] == [(False, False)] * len(phases)


def test_the_ledger_knows_all_models() -> None:
    from megatron_dlm.rl.turns import Turns
    from tests.tiny import make_session

    session, state = make_session(), make_state(torch.float32)
    reference, teacher = (session.train_state(None, 1) for _ in range(2))
    models = Models(state, session.value_state(OptimizerConfig(), 9), reference, SimpleNamespace(state=teacher))
    turns = Turns(models, SimpleNamespace(engine=FakeEngine(state, [])), RLConfig())
    held = turns.ledger.read().held
    weights = sum(parameter.nbytes for parameter in reference.module.parameters())
    for name in ("reference", "teacher"):
        assert held[f"{name} parameters"].device >= weights and held[f"{name} gradients"].device == 0
    assert held["value parameters"].device > 0


def test_each_model_begins_anew_with_its_optimizer_in_its_own_turn(monkeypatch) -> None:
    from megatron_dlm.config.value import ValueConfig
    from megatron_dlm.rl import learner
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.training.sleep import asleep, wake
    from tests.rl.test_trainer import ROLLOUT, EvenFirst, prompts
    from tests.tiny import disturb, make_session

    session, forgotten, original = make_session(), [], learner.forget_optimizer
    state, value = session.train_state(OptimizerConfig(), 9), session.value_state(OptimizerConfig(), 9)
    names = {id(state): "policy", id(value): "value"}

    def forget(one) -> None:
        forgotten.append((names[id(one)], asleep(state), asleep(value)))
        original(one)

    monkeypatch.setattr(learner, "forget_optimizer", forget)
    disturb(state.module, 0)
    rig = RolloutRig.open(session, state, ROLLOUT, 6, ROLLOUT.rollout_max_response_len)
    rl = dataclasses.replace(RL, reset_optimizer=True, **OFFLOAD)
    with_values = dict(models=Models(state, value), value=ValueConfig(use_value_model=True))
    trainer = TraceRLTrainer(session, state, rig, EvenFirst(), prompts(13), rl, ROLLOUT, seed=5, **with_values)
    for _ in range(2):
        assert trainer.step(quiet())["train/updates"] == 2
    assert forgotten == 2 * [("value", True, False), ("policy", False, True)]
    for one in (state, value):
        wake(one)
        parts = getattr(one.optimizer, "chained_optimizers", [one.optimizer])
        counts = {float(kept["step"]) for part in parts for kept in part.optimizer.state.values()}
        assert counts == {2.0}  # updates since it last began


def test_a_failing_phase_keeps_its_error() -> None:
    """An engine that is not idle cannot sleep; it is not asked to."""
    from megatron_dlm.rl.turns import Turns

    state, calls = make_state(torch.float32), []
    turns = Turns(Models(state), SimpleNamespace(engine=FakeEngine(state, calls)), RLConfig(offload_rollout=True))
    with pytest.raises(torch.OutOfMemoryError) as error, turns.phase("rollout"):
        raise torch.OutOfMemoryError("no room")
    assert calls == ["engine wakes, policy awake"] and "kv cache" in error.value.__notes__[0]


def test_steps_are_the_same_to_the_last_bit() -> None:
    plain, offloading = make_trainer(), make_trainer(rl=dataclasses.replace(RL, **OFFLOAD))
    for _ in range(3):
        one, other = plain.step(quiet()), offloading.step(quiet())
        assert without_memory(one) == without_memory(other) and one["train/updates"] == 2
    weights = zip(plain.state.named_parameters(), offloading.state.named_parameters())
    assert all(torch.equal(value, same) for (_, value), (_, same) in weights)
    for value, same in zip(optimizer_state(plain.state), optimizer_state(offloading.state), strict=True):
        assert torch.equal(value, same)
    assert "perf/offload_time" in other and "perf/offload_time" not in one
    # Weights that the engine reads from the training parameters are nobody else's.
    assert one["memory/rollout_weights_gib"] == 0 < one["memory/parameters_gib"]
    assert one["memory/rollout_gib"] == one["memory/train_gib"] and one["memory/host_gib"] == 0
    least = other["memory/parameters_gib"] + other["memory/kv_cache_gib"]
    assert other["memory/rollout_gib"] == pytest.approx(least)
    assert other["memory/host_gib"] == one["memory/optimizer_gib"] == other["memory/optimizer_gib"] > 0


def test_the_cache_is_there_while_responses_are_generated_only() -> None:
    trainer = make_trainer(rl=dataclasses.replace(RL, offload_rollout=True))
    trainer.step(quiet())  # in which Adam makes its state
    metrics = trainer.step(quiet())
    assert trainer.rig.engine.kv_cache_bytes == 0 < metrics["memory/kv_cache_gib"]
    assert metrics["memory/rollout_gib"] - metrics["memory/train_gib"] == pytest.approx(metrics["memory/kv_cache_gib"])


def test_a_step_that_learns_nothing_wakes_nobody() -> None:
    from megatron_dlm.training.sleep import asleep

    trainer = make_trainer(Always(False), rl=dataclasses.replace(RL, offload_train=True))
    metrics = trainer.step(quiet())
    assert asleep(trainer.state) and metrics["memory/gradients_gib"] == 0 and "memory/train_gib" not in metrics


def test_a_run_prints_a_line_for_each_phase(capsys) -> None:
    trainer = make_trainer(rl=dataclasses.replace(RL, num_rollout=2, **OFFLOAD))
    trainer.run(quiet(), Pace(TrainingRunConfig(), lambda *call: None), None, log_memory=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory after")]
    phases = ["rollout", "old_logprobs", "train", "update_weights"]
    assert [line.split(":")[0].split()[-1] for line in lines] == 2 * phases
    asleep, awake = lines[4], lines[6]  # in the first step Adam has no state yet
    assert "in host memory" in asleep and "gradients" not in asleep
    assert "in host memory" not in awake and "gradients" in awake


LAYOUTS = {
    "dp2 overlap": (2, dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)),
    "tp2 pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


def steps(parallel: dict, rl: RLConfig) -> tuple:
    """Metrics of two RL steps, and this rank's weights, optimizer state and memory."""
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig
    from tests.parallel.test_tracerl import make_state
    from tests.rl.test_trainer import ROLLOUT, EvenFirst, prompts

    session, state = make_state(parallel)
    rig = RolloutRig.open(session, state, ROLLOUT, 6, 9)
    trainer = TraceRLTrainer(session, state, rig, EvenFirst(), prompts(13), rl, ROLLOUT, seed=5)
    metrics = [trainer.step(quiet()) for _ in range(2)]
    state.gather_parameters()
    tensors = [parameter.detach().clone() for _, parameter in state.named_parameters()] + optimizer_state(state)
    return [without_memory(step) for step in metrics], tensors, metrics[-1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_the_same_in_every_layout(layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    plain = pool(world).run(steps, parallel, RL)
    offloading = pool(world).run(steps, parallel, dataclasses.replace(RL, **OFFLOAD))
    for (one, tensors, memory), (other, same, offloaded) in zip(plain, offloading, strict=True):
        assert one == other and all("train/loss" in step for step in one)
        assert len(tensors) == len(same) and all(map(torch.equal, tensors, same))
        assert offloaded["memory/rollout_gib"] < memory["memory/rollout_gib"]
        weights = memory["memory/rollout_weights_gib"]
        assert weights > 0 if "pp2" in layout else weights == 0
