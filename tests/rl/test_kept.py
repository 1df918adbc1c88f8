"""Responses that wait for the next step, in a checkpoint: a resumed run goes on with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.errors import CheckpointError
from megatron_dlm.rl import kept
from tests.rl.test_supply import DROPPING, OVER
from tests.rl.test_trainer import comparable, make_trainer
from tests.rollout.test_engine import same
from tests.tiny import quiet


def save(trainer, folder: Path) -> None:
    from megatron_dlm.commands.weights import checkpointer

    where = CheckpointConfig(save=str(folder))
    files = trainer.supply.files
    checkpointer(trainer.session, trainer.state, where, "tracerl", trainer.progress, print, files)(
        trainer.step_index, True
    )


def resume(folder: Path, make) -> tuple[object, list[str]]:
    """A trainer that goes on from a checkpoint, as the command makes it; and what is said then."""
    from megatron_dlm.checkpoint import distributed, places
    from megatron_dlm.commands.tracerl import resume_rollouts

    extra = distributed.read_extra(places.find(folder))
    trainer, said = make(extra), []
    distributed.load(trainer.state, folder)
    resume_rollouts(trainer.supply, CheckpointConfig(load=str(folder)), extra, said.append)
    return trainer, said


@pytest.mark.parametrize("config", [OVER, DROPPING], ids=["keeping", "dropping"])
def test_a_resumed_run_goes_on_with_what_was_in_work(tmp_path, config) -> None:
    whole = make_trainer(rollout=config)
    for _ in range(3):
        whole.step(quiet())
    assert bool(whole.supply.kept) == config.partial_rollout
    save(whole, tmp_path)
    resumed, said = resume(tmp_path, lambda extra: make_trainer(rollout=config, progress=extra))
    assert not said and resumed.rig.engine.weight_version == whole.rig.engine.weight_version
    for one, other in zip(whole.supply.kept, resumed.supply.kept, strict=True):
        assert (one.key, one.step, list(one.traces)) == (other.key, other.step, list(other.traces))
        for sample, trace in one.traces.items():
            same(trace, other.traces[sample], tolerance=0)
            assert trace.sampling == other.traces[sample].sampling
    for _ in range(3):
        one, other = comparable(whole.step(quiet())), comparable(resumed.step(quiet()))
        assert one == other


@pytest.mark.parametrize(
    "changes",
    [
        dict(partial_rollout=False),
        dict(over_sampling_batch_size=None, partial_rollout=False),
        dict(rollout_temperature=0.9),
        dict(n_samples_per_prompt=2),
    ],
)
def test_what_does_not_fit_the_resumed_run_starts_anew(tmp_path, changes: dict) -> None:
    whole = make_trainer(rollout=OVER)
    for _ in range(2):
        whole.step(quiet())
    in_work = [group.key for group in whole.supply.kept]
    save(whole, tmp_path)
    config = dataclasses.replace(OVER, **changes)
    resumed, said = resume(tmp_path, lambda extra: make_trainer(rollout=config, progress=extra))
    assert not resumed.supply.kept and set(in_work) <= set(resumed.supply.progress()["owed"]) and len(in_work) >= 2
    assert f"{len(in_work)} of the prompts in work start anew" in said[0]
    assert resumed.step(quiet())["rollout/partial_ratio" if config.over_sampling_batch_size else "rollout/reward"] >= 0
    assert len(resumed.supply.progress()["owed"]) < len(in_work) + 4


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["trace"].update(mood="fine"),
        lambda record: record["trace"]["sampling"].update(min_p=0.1),
        lambda record: record["trace"].pop("steps"),
        lambda record: record["trace"]["sampling"].update(stop_token_ids=None),
        lambda record: record.update(trace=[1]),
        lambda record: record.update(trace="p0"),
    ],
)
def test_fields_that_are_others_than_ours_are_refused(tmp_path, change) -> None:
    trainer = make_trainer(rollout=OVER)
    trainer.step(quiet())
    trainer.supply.files()(tmp_path)
    file = tmp_path / kept.FILE
    records = [json.loads(line) for line in file.read_text().splitlines()]
    change(records[-1])
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(CheckpointError, match="is damaged"):
        kept.read(tmp_path)


def test_a_damaged_file_of_kept_responses_is_refused(tmp_path) -> None:
    trainer = make_trainer(rollout=OVER)
    trainer.step(quiet())
    write = trainer.supply.files()
    write(tmp_path)
    assert {group.key for group in kept.read(tmp_path)} == {group.key for group in trainer.supply.kept}
    file = tmp_path / kept.FILE
    file.write_text(file.read_text()[:-20])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is damaged"):
            kept.read(tmp_path)
        file.unlink(missing_ok=True)
