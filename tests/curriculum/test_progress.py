"""What comes next: by a walk that an independent little interpreter does as well."""

from __future__ import annotations

import itertools

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.curriculum.plan import Plan
from megatron_dlm.curriculum.progress import Done, End, Visit, following
from tests.curriculum.worlds import GATE, plan_of

CHECK = {"name": "check", "command": "evaluate"}
LOOP = {"otherwise": {"repeat": "b", "at_most": 2}}


def walk(plan: Plan, scores: list[float]) -> tuple[list[str], End, list[Visit]]:
    """Names of the folders of all visits, when evaluations score so one after the other; the end; the visits."""
    done, visits, scores = [], [], list(scores)
    while True:
        found, _ = following(plan, done)
        if isinstance(found, End):
            return [visit.folder for visit in visits], found, visits
        visits.append(found)
        score = scores.pop(0) if found.stage.command.name == "evaluate" else 0.0
        metrics = {"eval/score": score}
        done.append(Done(found.stage.name, found.round, found.stage.identity(), metrics=metrics))


def test_a_straight_line() -> None:
    plan = plan_of("run", {"name": "a"}, {"name": "b"}, CHECK)
    folders, end, visits = walk(plan, [0.0])
    assert folders == ["a", "b", "check"] and end.problem is None
    assert [visit.source for visit in visits] == [None, "a", "b"]


@pytest.mark.parametrize("scores", list(itertools.product((0.2, 0.7), repeat=3)))
def test_a_gate_sends_back_until_it_is_passed_or_has_done_so_twice(scores: tuple[float, ...]) -> None:
    plan = plan_of("run", {"name": "a"}, {"name": "b"}, CHECK | {"gate": GATE | LOOP}, {"name": "c"})
    folders, end, visits = walk(plan, list(scores))
    expected, passed = ["a"], False
    for round, score in enumerate(scores, start=1):
        mark = "" if round == 1 else f"@{round}"
        expected += [f"b{mark}", f"check{mark}"]
        passed = score >= 0.5
        if passed:
            break
    assert folders == expected + ["c"] * passed
    assert (end.problem is None) == passed
    if not passed:
        assert "after 2 repetitions" in end.problem and "0.2" in end.problem
    sources = {visit.folder: visit.source for visit in visits}
    assert sources["b"] == "a" and sources.get("b@2", "b") == "b" and sources.get("b@3", "b@2") == "b@2"
    assert sources["check"] == "b" and sources.get("check@2", "b@2") == "b@2"


def test_the_first_stage_again_goes_on_from_its_own_weights() -> None:
    gate = GATE | {"otherwise": {"repeat": "a", "at_most": 1}}
    plan = plan_of("run", {"name": "a", "checkpoint": {"load": "x"}}, CHECK | {"gate": gate})
    _, _, visits = walk(plan, [0.0, 1.0])
    assert [visit.source for visit in visits] == [None, "a", "a", "a@2"]


@pytest.mark.parametrize("otherwise", ["stop", "continue"])
def test_a_gate_that_does_not_send_back(otherwise: str) -> None:
    plan = plan_of("run", {"name": "a"}, CHECK | {"gate": GATE | {"otherwise": otherwise}}, {"name": "b"})
    folders, end, _ = walk(plan, [0.4])
    assert folders == ["a", "check", "b"][: 2 if otherwise == "stop" else 3]
    assert (end.problem is None) == (otherwise == "continue")


def test_loops_in_loops_end() -> None:
    inner = CHECK | {"gate": GATE | LOOP}
    outer = {"name": "last", "command": "evaluate", "gate": GATE | {"otherwise": {"repeat": "a", "at_most": 3}}}
    folders, end, _ = walk(plan_of("run", {"name": "a"}, {"name": "b"}, inner, outer), [0.0] * 99)
    assert end.problem is not None and len(folders) < 20


def test_pass_rates_and_value_models_come_from_the_last_stage_that_had_them() -> None:
    hard = {"curriculum": {"prompt_sampling": "difficulty"}}
    own = {"curriculum": {"prompt_sampling": "difficulty", "pass_rates": "there"}}
    plan = plan_of("run", {"name": "a", **hard}, {"name": "b"}, {"name": "c", **hard}, {"name": "d", **own})
    _, _, visits = walk(plan, [])
    assert [visit.rates for visit in visits] == [None, None, "a", None]


def test_a_finished_stage_cannot_become_another() -> None:
    before, other = ({"name": "a"}, {"name": "b"}), {"name": "a", "learning": {"steps": 9}}
    done = [Done("a", 1, plan_of("run", *before).stages[0].identity())]
    assert following(plan_of("run", before[0], {"name": "c"}), done)[0].stage.name == "c", "what is to come may change"
    with pytest.raises(ConfigError, match="--redo-from a"):
        following(plan_of("run", other, before[1]), done)
    with pytest.raises(ConfigError, match="has z where this run did a"):
        following(plan_of("run", {"name": "z"}, *before), done)


def test_a_gate_may_change_and_decides_anew() -> None:
    plan = lambda least: plan_of("run", {"name": "a"}, CHECK | {"gate": GATE | {"at_least": least}}, {"name": "b"})
    strict, loose = plan(0.9), plan(0.1)
    done = [
        Done("a", 1, strict.stages[0].identity()),
        Done("check", 1, strict.stages[1].identity(), metrics={"eval/score": 0.5}),
    ]
    assert following(strict, done)[0].problem and following(loose, done)[0].stage.name == "b"
