"""Stages as they run: grown, merged, resolved; what cannot be is refused."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from tests.bad_inputs.bench import tells_what_to_do
from tests.curriculum.worlds import GATE, plan_of

CHECK = {"name": "check", "command": "evaluate"}


def test_growth_is_written_out() -> None:
    grow = {"model.block_size": [8, 16, 32], "learning.steps": [1, 2, 3]}
    plan = plan_of("run", {"name": "a"}, {"name": "b", "grow": grow, "learning": {"length": 5}}, CHECK)
    assert [stage.name for stage in plan.stages] == ["a", "b-1", "b-2", "b-3", "check"]
    assert [stage.parent for stage in plan.stages] == [None, "a", "b-1", "b-2", "b-3"]
    assert [stage.settings.get("model", {}).get("block_size") for stage in plan.stages] == [None, 8, 16, 32, 32]
    assert [stage.last_step for stage in plan.stages] == [4, 1, 2, 3, None]
    assert all(stage.settings["learning"]["length"] == 5 for stage in plan.stages[1:4])


def test_settings_of_stage_growth_weights_and_defaults_in_this_order() -> None:
    plan = plan_of(
        "run",
        {"name": "a", "model": {"block_size": 8}},
        {"name": "b"},
        {"name": "c", "from": "a", "model": {"block_size": 2}},
        CHECK,
        model={"block_size": 1, "width": 2},
        checkpoint={"save_interval": 3},
        learning={"steps": 9},
    )
    assert [stage.settings["model"] for stage in plan.stages] == [
        {"block_size": 8, "width": 2},
        {"block_size": 8, "width": 2},
        {"block_size": 2, "width": 2},
        {"block_size": 2, "width": 2},
    ]
    assert [stage.last_step for stage in plan.stages] == [9, 9, 9, None]
    assert "checkpoint" not in plan.stages[3].settings, "an evaluation has no save_interval"


def test_weights_come_from_where_it_says() -> None:
    own = {"name": "c", "checkpoint": {"load": "there", "ckpt_step": 7}}
    last = {"name": "d", "command": "evaluate", "checkpoint": {"hf_checkpoint": "hf"}}
    plan = plan_of("run", {"name": "a"}, {"name": "b", "from": "a"}, own, last, checkpoint={"hf_checkpoint": "base"})
    assert [stage.start for stage in plan.stages] == [
        ("--hf-checkpoint", "base"),
        (),
        ("--load", "there", "--ckpt-step", "7", "--finetune"),
        ("--hf-checkpoint", "hf"),
    ]
    assert [stage.parent for stage in plan.stages] == [None, "a", None, None]


def test_from_a_grown_stage_is_from_its_last_part() -> None:
    grown = {"name": "a", "grow": {"model.block_size": [8, 16]}}
    plan = plan_of("run", grown, {"name": "b"}, {"name": "c", "from": "a"}, {"name": "d", "from": "a-1"})
    assert [stage.source for stage in plan.stages[2:]] == [None, "a-2", "a-1"]


def test_a_stage_is_another_when_its_results_may_be() -> None:
    of = lambda **keys: plan_of("run", {"name": "a", **keys}).stages[0].identity()
    assert of() != of(learning={"steps": 5}) != of(learning={"steps": 6})
    assert of() != of(until={"metric": "m", "at_least": 1})
    assert of() == of(logging={"log_interval": 3}) == of(checkpoint={"save_interval": 3})
    assert of() == of(run={"exit_interval": 3}) != of(run={"seed": 3})


LOOP = GATE | {"otherwise": {"repeat": "a", "at_most": 2}}
MISTAKES = {
    "an unknown command": ([{"name": "a", "command": "lern"}], {}, "Did you mean learn?"),
    "an unknown section": ([{"name": "a", "lerning": {}}], {}, "lerning"),
    "an unknown key": ([{"name": "a", "learning": {"step": 1}}], {}, "stage a of c.yaml has no key step"),
    "a value of another type": ([{"name": "a", "learning": {"steps": "many"}}], {}, "learning.steps in stage a"),
    "an unknown default": ([{"name": "a"}], {"lerning": {"steps": 1}}, "lerning"),
    "an unknown key of a default": ([{"name": "a"}], {"learning": {"step": 1}}, "no key step"),
    "a default that no stage reads": ([CHECK | {"checkpoint": {"load": "x"}}], {"learning": {}}, "learning"),
    "a setting of another command": ([{"name": "a"}, CHECK | {"learning": {"steps": 1}}], {}, "learning"),
    "a stage that comes later": ([{"name": "a", "from": "b"}, {"name": "b"}], {}, "from in stage a"),
    "weights of an evaluation": ([{"name": "a"}, CHECK, {"name": "b", "from": "check"}], {}, "no weights"),
    "weights twice": ([{"name": "a"}, {"name": "b", "from": "a", "checkpoint": {"load": "x"}}], {}, "Leave one out"),
    "two starts": ([{"name": "a", "checkpoint": {"load": "x", "hf_checkpoint": "y"}}], {}, "both load and"),
    "an evaluation of nothing": ([CHECK], {}, "has no weights"),
    "a folder of its own": ([{"name": "a", "checkpoint": {"save": "x"}}], {}, "checkpoint.save"),
    "a default folder": ([{"name": "a"}], {"checkpoint": {"save": "x"}}, "checkpoint.save"),
    "an end by hand": ([{"name": "a", "run": {"exit_metric": "m"}}], {}, "until"),
    "a part like a stage": ([{"name": "a-1"}, {"name": "a", "grow": {"learning.steps": [1]}}], {}, "name a-1"),
    "growth of what is set": (
        [{"name": "a", "learning": {"steps": 1}, "grow": {"learning.steps": [1]}}],
        {},
        "Leave one of the two out",
    ),
    "growth of the unknown": ([{"name": "a", "grow": {"learning.step": [1]}}], {}, "no key step"),
    "an end of an evaluation": ([{"name": "a"}, CHECK | {"until": GATE}], {}, "takes no steps"),
    "a gate that trains": ([{"name": "a", "gate": GATE}], {}, "Put the gate"),
    "back to the unknown": (
        [{"name": "a"}, CHECK | {"gate": GATE | {"otherwise": {"repeat": "z", "at_most": 1}}}],
        {},
        "repeats z",
    ),
    "back to what comes later": ([CHECK | {"checkpoint": {"load": "x"}, "gate": LOOP}, {"name": "a"}], {}, "repeats a"),
    "back to the same again": ([{"name": "z"}, {"name": "a", "from": "z"}, CHECK | {"gate": LOOP}], {}, "same weights"),
    "back to an evaluation": ([{"name": "z"}, CHECK | {"name": "a"}, CHECK | {"gate": LOOP}], {}, "nothing is trained"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str) -> None:
    stages, defaults, says = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        plan_of("run", *stages, **defaults)
    told = str(caught.value)
    assert says in told and (tells_what_to_do(told) or " needs a whole number, not " in told), told
