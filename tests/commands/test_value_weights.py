"""A value model's checkpoints: written and read with the policy's, in another layout too, and never for one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.convert import ExportConfig, VerifyConfig
from megatron_dlm.config.errors import CheckpointError
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from tests.harness import pool
from tests.small_model import whole
from tests.tiny import Words, disturb, make_session, model_config, vocabulary

OPTIMIZER = OptimizerConfig(lr=1e-2, adam_eps=1e-3, lr_warmup_iters=2)


def both(parallel: dict | None = None):
    """A session, a policy with weights of its own, and a value model."""
    if parallel is None:
        session = make_session()
    else:
        from megatron_dlm.parallel.groups import initialize
        from megatron_dlm.training.setup import Session

        settings = ParallelConfig(**parallel)
        session = Session(model_config(), settings, Words(), initialize(settings, seed=1), vocabulary())
    return session, session.train_state(OPTIMIZER, 9), session.value_state(OPTIMIZER, 9)


def saver(session, policy, value, folder: Path, **settings):
    from megatron_dlm.commands.weights import checkpointer

    where = CheckpointConfig(save=str(folder), **settings)
    return checkpointer(session, policy, where, "tracerl", lambda: {"rl_step": 4}, lambda line: None, value_state=value)


def resume(session, policy, value, folder: Path, value_load: str | None = None, **settings) -> tuple[dict, str]:
    from megatron_dlm.commands.value_weights import restore_value
    from megatron_dlm.commands.weights import restore

    where = CheckpointConfig(load=str(folder), **settings)
    restored = restore(policy, where, session.model, "tracerl")
    return restored, restore_value(value, policy, where, value_load, session.model, restored)


def learn(value) -> None:
    """An update by a made-up gradient that is the same in every layout."""
    from megatron_dlm.training.sleep import wake

    wake(value)
    for chunk in value.chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(0.01)
    from megatron_dlm import platform

    with platform.cuda_calls_on_cpu():
        value.optimizer.step()
        value.scheduler.step(increment=1)
    value.iteration += 1


def begin(parallel: dict, folder: Path) -> None:
    session, policy, value = both(parallel)
    for _ in range(3):
        learn(value)
    saver(session, policy, value, folder)(7, True)


def go_on(parallel: dict, folder: Path):
    """Weights, rate and count after one more update; layouts agree where clipping sees the same norm."""
    session, policy, value = both(parallel)
    restored, said = resume(session, policy, value, folder)
    assert restored["rl_step"] == 4 and "iteration 7" in said and value.iteration == 3
    first = whole(value, dict(value.named_parameters()))
    rate = value.learning_rate()
    learn(value)
    value.gather_parameters()
    return first, rate, whole(value, dict(value.named_parameters()))


def test_goes_on_in_another_layout(tmp_path: Path) -> None:
    """With its optimizer and its place in the schedule."""
    pool(1).run(begin, {}, tmp_path)
    first, rate, after = pool(1).run(go_on, {}, tmp_path)[0]
    assert rate == OPTIMIZER.lr and first["value_head.weight"].any() and "output_layer.weight" not in first
    for found, found_rate, later in pool(2).run(go_on, dict(pipeline_model_parallel_size=2), tmp_path):
        assert found_rate == rate and found.keys() == first.keys()
        assert all(torch.equal(found[name], weight) for name, weight in first.items())
        for name, weight in after.items():
            assert (later[name] - weight).norm() < 1e-5 * weight.norm(), name


def test_a_pair_is_written_and_deleted_together(tmp_path: Path) -> None:
    session, policy, value = both()
    save = saver(session, policy, value, tmp_path, keep_last_n=2)
    for step in (1, 2, 3):
        disturb(value.module, step)
        save(step, True)
    kept = ["iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"]
    assert sorted(path.name for path in (tmp_path / "value").iterdir()) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "value"]
    weights = {name: weight.clone() for name, weight in value.named_parameters()}
    for step in (2, 3):
        session, policy, value = both()
        resume(session, policy, value, tmp_path, ckpt_step=step)
        same = all(torch.equal(weight, weights[name]) for name, weight in value.named_parameters())
        assert same == (step == 3)


def test_a_crash_between_the_two_leaves_the_pair_before(tmp_path: Path, monkeypatch) -> None:
    from megatron_dlm.checkpoint import distributed

    session, policy, value = both()
    save = saver(session, policy, value, tmp_path)
    save(1, True)
    weights = {name: weight.clone() for name, weight in value.named_parameters()}
    disturb(value.module, 5)
    original = distributed.save

    def dies(state, *args, **options) -> None:
        if state is policy:
            raise RuntimeError("killed")
        original(state, *args, **options)

    monkeypatch.setattr(distributed, "save", dies)
    with pytest.raises(RuntimeError, match="killed"):
        save(2, True)
    monkeypatch.undo()
    session, policy, value = both()
    assert "iteration 1 " in resume(session, policy, value, tmp_path)[1]
    assert all(torch.equal(weight, weights[name]) for name, weight in value.named_parameters())


@pytest.mark.parametrize("sleeping", ["policy", "value", "both", "none"])
def test_only_one_optimizer_is_awake_while_a_pair_is_written(tmp_path: Path, monkeypatch, sleeping: str) -> None:
    """Where the two take turns, so that no checkpoint needs more memory than an update does."""
    from megatron_dlm.checkpoint import distributed
    from megatron_dlm.training.sleep import asleep, sleep

    session, policy, value = both()
    for state, name in ((policy, "policy"), (value, "value")):
        if sleeping in (name, "both"):
            sleep(state)
    original, found = distributed.write, []

    def write(*args, **options) -> None:
        found.append((asleep(policy), asleep(value)))
        original(*args, **options)

    monkeypatch.setattr(distributed, "write", write)
    saver(session, policy, value, tmp_path)(1, True)
    assert found == ([(False, False)] * 2 if sleeping == "none" else [(True, False), (False, True)])
    _, fresh, other = both()
    resume(session, fresh, other, tmp_path)
    for state, there in ((fresh, policy), (other, value)):
        weights = dict(there.named_parameters())
        assert all(torch.equal(weight, weights[name]) for name, weight in state.named_parameters())


def test_two_that_were_not_saved_together_are_refused(tmp_path: Path) -> None:
    session, policy, value = both()
    for folder in ("one", "other"):
        saver(session, policy, value, tmp_path / folder)(1, True)
    (tmp_path / "one" / "value").rename(tmp_path / "aside")
    (tmp_path / "other" / "value").rename(tmp_path / "one" / "value")
    with pytest.raises(CheckpointError, match="were not saved together"):
        resume(session, policy, value, tmp_path / "one")


def test_begins_with_a_value_model_of_another_run(tmp_path: Path) -> None:
    """Whose policy is not wanted; given with its folder or with that of the run. A resumed run has its own."""
    session, policy, value = both()
    learn(value)
    saver(session, policy, value, tmp_path / "old")(1, True)
    saver(session, policy, None, tmp_path / "new")(1, True)
    for named in ("old", "old/value"):
        session, policy, fresh = both()
        said = resume(session, policy, fresh, tmp_path / "new", str(tmp_path / named))[1]
        assert "old/value" in said and fresh.iteration == 0 and fresh.learning_rate() == 0.0
        there = dict(value.named_parameters())
        assert all(torch.equal(weight, there[name]) for name, weight in fresh.named_parameters())
    session, policy, fresh = both()
    assert "goes on" in resume(session, policy, fresh, tmp_path / "old", str(tmp_path / "nowhere"))[1]


def test_without_one_it_begins_with_the_policy(tmp_path: Path) -> None:
    session, policy, value = both()
    saver(session, policy, None, tmp_path)(1, True)
    session, policy, value = both()
    resume(session, policy, value, tmp_path)
    there = dict(policy.named_parameters())
    for name, weight in value.named_parameters():
        assert not weight.any() if name == "value_head.weight" else torch.equal(weight, there[name])


def test_a_policy_is_no_value_model(tmp_path: Path, monkeypatch) -> None:
    from megatron_dlm.checkpoint.hf.source import HFSource
    from megatron_dlm.commands.convert import export_hf, verify

    session, policy, value = both()
    saver(session, policy, value, tmp_path / "run")(1, True)
    saver(session, policy, None, tmp_path / "plain")(1, True)
    with pytest.raises(CheckpointError, match="holds a value model, not a policy. Give the folder above it"):
        resume(session, policy, value, tmp_path / "run" / "value")
    monkeypatch.setattr(HFSource, "open", lambda folder: None)
    for action, settings in (
        (export_hf, ExportConfig(load=str(tmp_path / "run" / "value"), save=str(tmp_path / "hf"))),
        (verify, VerifyConfig(load=str(tmp_path / "run" / "value"), hf_checkpoint="hf")),
    ):
        with pytest.raises(CheckpointError, match="--load .*value holds a value model, not a policy"):
            action(settings)
    with pytest.raises(CheckpointError, match="holds a policy, not a value model"):
        resume(session, policy, value, tmp_path / "plain", str(tmp_path / "plain"))
    with pytest.raises(CheckpointError, match="There is no checkpoint folder .*nowhere. Give --value-load"):
        resume(session, policy, value, tmp_path / "plain", str(tmp_path / "nowhere"))
