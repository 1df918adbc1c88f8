"""Runs of stages that only pretend: order, command lines, resume, gates over restarts, what is told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_dlm.config.errors import CheckpointError, ConfigError, TrainingError
from megatron_dlm.curriculum import controller
from megatron_dlm.curriculum.controller import Controller
from megatron_dlm.curriculum.ranks import Alone
from megatron_dlm.curriculum.state import alone, discard_from, read_state
from megatron_dlm.curriculum.status import status
from tests.curriculum.worlds import GATE, Pretender, plan_of

CHECK = {"name": "check", "command": "evaluate"}
LOOP = {"otherwise": {"repeat": "b", "at_most": 2}}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(controller, "_POLL", 0.0)


def run(plan, world: Pretender, said: list[str] | None = None) -> int:
    return Controller(plan, Alone(), (said if said is not None else []).append, world).run()


def loop(save: Path):
    return plan_of(save, {"name": "a"}, {"name": "b"}, CHECK | {"gate": GATE | LOOP}, {"name": "c"}, run={"seed": 5})


def test_every_stage_is_a_command(tmp_path) -> None:
    world, said = Pretender([0.7]), []
    assert run(loop(tmp_path), world, said) == 0
    at = str(tmp_path)
    assert world.log == [
        ["learn", "--config", f"{at}/a/stage.yaml", "--save", f"{at}/a"],
        ["learn", "--config", f"{at}/b/stage.yaml", "--load", f"{at}/a", "--finetune", "--save", f"{at}/b"],
        ["evaluate", "--config", f"{at}/check/stage.yaml", "--load", f"{at}/b", "--metrics-jsonl",
         f"{at}/check/metrics.jsonl"],
        ["learn", "--config", f"{at}/c/stage.yaml", "--load", f"{at}/b", "--finetune", "--save", f"{at}/c"],
    ]  # fmt: skip
    assert any(f"python -m megatron_dlm learn --config {at}/b/stage.yaml" in line for line in said)
    assert said[-1] == f"The curriculum is done: 4 stages in {at}."
    world = Pretender()
    assert run(loop(tmp_path), world) == 0 and world.log == [], "a finished run has nothing left to do"


def test_a_repeated_stage_has_a_folder_and_a_seed_of_its_own(tmp_path) -> None:
    world = Pretender([0.1, 0.9])
    assert run(loop(tmp_path), world) == 0
    again = next(words for words in world.log if words[2].endswith("b@2/stage.yaml"))
    assert again[3:] == ["--load", f"{tmp_path}/b", "--finetune", "--save", f"{tmp_path}/b@2", "--seed", "6"]


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_it_does_what_it_would_have_done(tmp_path, seed: int) -> None:
    """Gates count over restarts; no step that was saved is done again; what is recorded is the same."""
    undisturbed, scores = tmp_path / "whole", [0.1, 0.2, 0.8]
    run(loop(undisturbed), Pretender(list(scores)))
    draw, folders = random.Random(seed), ["a", "b", "b@2", "b@3", "c"]
    world = Pretender(list(scores), {(draw.choice(folders), draw.randint(1, 4)): 137 for _ in range(6)})
    starts = 0
    while run(loop(tmp_path / "parts"), world):
        starts += 1
        assert starts <= 6
    whole, parts = read_state(undisturbed), read_state(tmp_path / "parts")
    told = lambda visit: (visit.stage, visit.round, visit.identity, visit.step, visit.metrics)
    assert [told(visit) for visit in whole.done] == [told(visit) for visit in parts.done]
    assert starts >= 1 and parts.running is None


def test_a_stage_goes_on_from_its_own_checkpoint_or_begins_again(tmp_path) -> None:
    plan, at, said = plan_of(tmp_path, {"name": "a"}, {"name": "b"}), str(tmp_path), []
    world = Pretender(dies={("b", 1): 137, ("b", 3): 1})
    assert run(plan, world, said) == 137 and "nothing of it was saved" in said[-1]
    assert run(plan, world, said) == 1 and "it has saved step 2" in said[-1]
    assert run(plan, world) == 0
    assert [words[3:6] for words in world.log[1:]] == [
        ["--load", f"{at}/a", "--finetune"],
        ["--load", f"{at}/a", "--finetune"],
        ["--load", f"{at}/b", "--save"],
    ]


def test_a_gate_that_stops(tmp_path) -> None:
    plan = plan_of(tmp_path, {"name": "a"}, CHECK | {"gate": GATE}, {"name": "b"})
    with pytest.raises(TrainingError, match=r"gate of stage check is not passed: eval/score is 0\.3"):
        run(plan, Pretender([0.3]))
    world = Pretender()
    with pytest.raises(TrainingError, match="is not passed"):  # and still does
        run(plan, world)
    assert world.log == [] and "The gate of check" in status(plan)


def test_until_ends_a_stage_early(tmp_path) -> None:
    plan = plan_of(tmp_path, {"name": "a", "until": {"metric": "eval/score", "at_least": 0.2}}, {"name": "b"})
    assert run(plan, Pretender()) == 0
    assert [visit.step for visit in read_state(tmp_path).done] == [2, 4]
    assert "done early  2/4" in status(plan)


def test_a_stage_that_stops_before_its_end_is_not_done(tmp_path) -> None:
    """A limit of its own: exit code 0, and steps are left."""
    plan, said = plan_of(tmp_path, {"name": "a"}, {"name": "b"}), []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "last.json").write_text("3")
    assert run(plan, Pretender(), said) == 0
    assert "has stopped early, at step 3 of 4" in said[-1] and read_state(tmp_path).done == []
    (tmp_path / "a" / "last.json").unlink()
    assert run(plan, Pretender()) == 0 and len(read_state(tmp_path).done) == 2


def test_redo_from_sets_aside(tmp_path) -> None:
    plan = plan_of(tmp_path, {"name": "a"}, {"name": "b"}, {"name": "c"})
    run(plan, Pretender())
    assert discard_from(tmp_path, read_state(tmp_path), ["b"], "b") == ["b", "c"]
    assert [visit.stage for visit in read_state(tmp_path).done] == ["a"]
    (kept,) = (tmp_path / "discarded").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["b", "c"] and not (tmp_path / "b").exists()
    changed = plan_of(tmp_path, {"name": "a"}, {"name": "b", "learning": {"length": 3}}, {"name": "c"})
    world = Pretender()
    assert run(changed, world) == 0 and len(world.log) == 2
    with pytest.raises(ConfigError, match="has not begun"):
        discard_from(tmp_path / "nowhere", read_state(tmp_path / "nowhere"), ["b"], "b")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(TrainingError, match="has not written"):
        run(plan_of(tmp_path, {"name": "a"}), Pretender())


def test_a_folder_that_looks_like_a_stages_is_not_cleared(tmp_path) -> None:
    """The name of a stage may be that of an older run."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(TrainingError, match="has not written"):
        run(plan_of(tmp_path, {"name": "a", "command": "make"}), Pretender())
    assert (tmp_path / "a" / "latest_checkpointed_iteration.txt").read_text() == "3"


def writes(save: Path, output: Path):
    wrote = {"name": "maps", "command": "write", "writing": {"output": str(output)}}
    return plan_of(save, {"name": "b"}, wrote, CHECK | {"gate": GATE | LOOP}, {"name": "c"})


def test_a_file_of_an_earlier_round_is_set_aside(tmp_path) -> None:
    output, world = tmp_path / "maps.jsonl", Pretender([0.1, 0.9])
    assert run(writes(tmp_path / "run", output), world) == 0
    assert [visit.folder for visit in read_state(tmp_path / "run").done][:5] == ["b", "maps", "check", "b@2", "maps@2"]
    assert output.read_text() == f"{tmp_path}/run/b@2"
    (aside,) = (tmp_path / "run" / "discarded").glob("*/maps.jsonl")
    assert aside.read_text() == f"{tmp_path}/run/b"


def test_a_file_of_somebody_else_is_not_taken_for_a_stages(tmp_path) -> None:
    output = tmp_path / "maps.jsonl"
    output.write_text("mine")
    for _ in range(2):
        with pytest.raises(TrainingError, match="was not written by this run"):
            run(writes(tmp_path / "run", output), Pretender([0.9]))
    assert output.read_text() == "mine" and len(read_state(tmp_path / "run").done) == 1


def test_until_keeps_all_digits(tmp_path) -> None:
    world = Pretender()
    run(plan_of(tmp_path, {"name": "a", "until": {"metric": "eval/score", "at_least": 1234564.5}}), world)
    assert world.log[0][-1] == "1234564.5"


def test_status_in_the_middle(tmp_path) -> None:
    plan = loop(tmp_path)
    assert "begins a" in status(plan)
    run(plan, Pretender(dies={("b", 3): 137}))
    text = status(plan)
    assert "3/4 (saved: 2)" in text and "goes on with b" in text and "train/loss 0.3333" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line and line[0] in "abc"}
    assert "done" in rows["a"] and "begun" in rows["b"] and "to come" in rows["check"] and "0/4" in rows["c"]


def test_a_damaged_record_is_refused(tmp_path) -> None:
    for content in ("{", json.dumps({"version": 2, "done": [], "running": None}), json.dumps([])):
        (tmp_path / "curriculum.json").write_text(content)
        with pytest.raises(CheckpointError, match="is no record of a curriculum"):
            read_state(tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path) -> None:
    with alone(tmp_path), pytest.raises(ConfigError, match="Another run"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
