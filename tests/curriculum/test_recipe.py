"""What a curriculum's YAML may say: every mistake is one sentence that names the place."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.curriculum.recipe import Gate, Reach, read_recipe, recipe_of
from tests.bad_inputs.bench import tells_what_to_do

GOOD = {"save": "run", "stages": [{"name": "a", "command": "learn"}]}


def stage(**keys: object) -> dict:
    return GOOD | {"stages": [{"name": "a", "command": "learn"}, {"name": "b", "command": "learn", **keys}]}


def test_what_is_written_is_read(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text(
        "save: run\n"
        "defaults: {run: {seed: 1}, logging: }\n"
        "stages:\n"
        "  - {name: a, command: learn, learning: {steps: 3}, until: {metric: m, at_least: 1}}\n"
        "  - name: b\n"
        "    command: evaluate\n"
        "    from: a\n"
        "    gate: {metric: m, at_least: 0.5, otherwise: {repeat: a, at_most: 2}}\n"
    )
    recipe = read_recipe(str(tmp_path / "c.yaml"))
    first, second = recipe.stages
    assert recipe.save == "run" and recipe.defaults == {"run": {"seed": 1}, "logging": {}}
    assert first.sections == {"learning": {"steps": 3}} and first.until == Reach("m", 1.0)
    assert second.source == "a" and second.gate == Gate(Reach("m", 0.5), "stop", "a", 2)


def test_changes_of_the_command_line() -> None:
    changes = ["b.learning.steps=7", "save=other", "defaults.run.seed=5", "b.grow.model.block_size=[8, 16]"]
    recipe = recipe_of(stage(learning={"length": 2}), "c.yaml", changes)
    assert recipe.save == "other" and recipe.defaults == {"run": {"seed": 5}}
    assert recipe.stages[1].sections["learning"] == {"length": 2, "steps": 7}
    assert recipe.stages[1].grow == {"model.block_size": [8, 16]}
    assert recipe_of(stage(until={"metric": "m", "at_least": 1}), "c.yaml", ["b.until=null"]).stages[1].until is None


def test_a_change_of_a_stage_with_dots_in_its_name() -> None:
    content = {"save": "run", "stages": [{"name": "v1.5", "command": "learn"}, {"name": "v1", "command": "learn"}]}
    recipe = recipe_of(content, "c.yaml", ["v1.5.learning.steps=2", "v1.learning.steps=3"])
    assert [one.sections["learning"]["steps"] for one in recipe.stages] == [2, 3]


def test_a_metric_that_is_no_number_is_not_enough() -> None:
    reach = Reach("m", 0.0)
    assert reach.met({"m": 0}) and not reach.met({"m": float("nan")}) and not reach.met({"m": None})
    assert not reach.met({})


MISTAKES = {
    "no stages": ({"save": "run"}, (), "lists no stages"),
    "no folder": ({"stages": GOOD["stages"]}, (), "where its run is kept"),
    "a key of the file": (GOOD | {"stage": []}, (), "no key stage"),
    "a stage that is text": ({"save": "run", "stages": ["sft"]}, (), "'sft'"),
    "two of one name": (stage(name="a"), (), "two stages of the name a"),
    "a name with a slash": (stage(name="a/b"), (), "'a/b'"),
    "a name that is taken": (stage(name="defaults"), (), "defaults"),
    "no command": (stage(command=None), (), "has no command"),
    "a section that is a number": (stage(learning=3), (), "learning in stage b"),
    "until without a metric": (stage(until={"at_least": 1}), (), "names no metric"),
    "until without a number": (stage(until={"metric": "m", "at_least": "much"}), (), "'much'"),
    "until with another key": (stage(until={"metric": "m", "at_most": 1}), (), "no key at_most"),
    "a loop without a limit": (stage(gate={"metric": "m", "at_least": 1, "otherwise": {"repeat": "a"}}), (), "limit"),
    "a loop of no times": (
        stage(gate={"metric": "m", "at_least": 1, "otherwise": {"repeat": "a", "at_most": 0}}),
        (),
        "at_most is 0",
    ),
    "a gate that does something else": (stage(gate={"metric": "m", "at_least": 1, "otherwise": "wait"}), (), "'wait'"),
    "lists of two lengths": (stage(grow={"a.b": [1, 2], "c.d": [1]}), (), "differ in length"),
    "growth of a section": (stage(grow={"learning": [1, 2]}), (), "SECTION.KEY"),
    "growth to one value": (stage(grow={"learning.steps": 3}), (), "list of values"),
    "a change of nothing": (GOOD, ("steps",), "--set steps"),
    "a change of an unknown stage": (GOOD, ("c.learning.steps=1",), "no stage of c.yaml"),
    "a change of a section": (GOOD, ("a.learning=1",), "SECTION.KEY"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str) -> None:
    content, changes, says = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        recipe_of(content, "c.yaml", changes)
    assert says in str(caught.value) and tells_what_to_do(str(caught.value)), caught.value
