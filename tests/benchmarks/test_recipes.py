"""benchmarks/recipes.py: its data, its plan, and what it makes of figures; no training."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from benchmarks import long_sums, recipe_stages, recipes
from benchmarks.recipes import Figures, collect, differences, plan, report
from benchmarks.stages import DONE
from megatron_dlm.commands import evaluate, sft, trace
from megatron_dlm.config.flags import parse
from megatron_dlm.config.sections import pick, pick_for_rows, pick_parts
from megatron_dlm.data.jsonl import read_jsonl

SECTIONS = {
    "sft": pick(*sft.SECTIONS),
    "trace": pick_for_rows(*trace.SECTIONS),
    "evaluate": pick_parts(*evaluate.SECTIONS),
}


def test_long_sums_are_right_and_nothing_held_out_is_trained_on(tmp_path) -> None:
    flags = ["--num-train", "60", "--num-more", "40", "--num-test", "30"]
    assert long_sums.main(["--output", str(tmp_path), *flags]) == 0
    records = {
        name: [record for _, record in read_jsonl(tmp_path / f"{name}.jsonl")] for name in ("sft", "more", "heldout")
    }
    assert {name: len(some) for name, some in records.items()} == {"sft": 60, "more": 40, "heldout": 30}
    terms = [tuple(sorted(one["question"].split("+"))) for some in records.values() for one in some]
    assert len(set(terms)) == 130
    for one in records["sft"]:
        first, *steps = one["response"].replace("\\boxed{", "").replace("}", "").split(";")
        numbers = [int(word) for word in one["question"].split("+")]
        assert first == f"{numbers[0]}+{numbers[1]}={numbers[0] + numbers[1]}"
        for before, step in pairwise([first, *steps]):
            left, total = step.split("=")
            assert left.split("+")[0] == before.split("=")[1] and sum(map(int, left.split("+"))) == int(total)
        assert one["response"].endswith(f"\\boxed{{{sum(numbers)}}}")


def chains(tmp_path, *flags: str) -> tuple:
    options = recipes._parser().parse_args(["--output", str(tmp_path / "out"), "--seeds", "1", "2", *flags])
    return options, [recipe_stages.chain(seed, options) for seed in options.seeds]


def test_every_command_of_the_plan_can_be_parsed_and_follows_what_it_needs(tmp_path) -> None:
    _, made = chains(tmp_path)
    stages = plan(made)
    assert len(stages) == len({stage.folder for stage in stages})
    for place, stage in enumerate(stages):
        assert all(one in stages[:place] for one in stage.after)
        if stage.arguments[0] == "-m":
            verb = stage.arguments[2]
            assert parse(verb, SECTIONS[verb], list(stage.arguments[3:]))
    for part, comparisons in recipes.COMPARISONS.items():
        for one, block, other, its_block in comparisons:
            assert {(one, block), (other, its_block)} <= made[0].evaluations.keys(), part


def test_a_part_leaves_the_models_of_others_out(tmp_path) -> None:
    _, made = chains(tmp_path, "--parts", "growth")
    names = {stage.name for stage in plan(made)}
    assert "shift kept, seed 1" in names and "blocks of 16 at once in blocks of 16, seed 2" in names
    assert not any("dropped" in name or "trace" in name for name in names)


def figures(accuracy: float) -> Figures:
    return Figures({"static": accuracy, "dynamic": accuracy - 10}, {"static": 1.0, "dynamic": 2.0}, 5000.0)


def test_differences_are_taken_seed_by_seed() -> None:
    jump, stepwise = (recipe_stages.JUMP, 16), (recipe_stages.STEPWISE, 16)
    found = {
        jump: {1: figures(50.0), 2: figures(90.0)},
        stepwise: {2: figures(92.0), 1: figures(52.0), 3: figures(0.0)},
    }
    (line,) = differences(found, "growth")
    assert line.endswith("static +2.0 ± 0.0, dynamic +2.0 ± 0.0 points")


def test_a_report_has_what_ended_well(tmp_path) -> None:
    options, made = chains(tmp_path, "--parts", "growth")
    for name, block, share in ((recipe_stages.JUMP, 16, 0.5), (recipe_stages.STEPWISE, 16, 0.75)):
        stage, model = made[0].evaluations[name, block], made[0].models[name]
        for one in (stage, model):
            one.folder.mkdir(parents=True)
            (one.folder / DONE).write_text(json.dumps({"recipe": one.recipe, "seconds": 1.0}))
        metrics = {
            f"eval/{way}/{what}": share for way in ("static", "dynamic") for what in ("accuracy", "tokens_per_step")
        }
        stage.metrics.write_text(json.dumps({"step": 1} | metrics) + "\n")
        learned = [{"step": step, "train/row_tokens": 700.0} for step in (1, 2)]
        model.metrics.write_text("".join(json.dumps(record) + "\n" for record in learned))
    found = collect(made)
    assert found.keys() == {(recipe_stages.JUMP, 16), (recipe_stages.STEPWISE, 16)}
    text = report(found, options, [made[1].data])
    assert "static +25.0, dynamic +25.0 points" in text and "Missing: data, seed 2" in text
    assert any(
        line.split("|")[-2].strip() == "1" for line in text.splitlines() if recipe_stages.JUMP in line and "|" in line
    )


@pytest.mark.parametrize("flags", [["--parts", "nothing"], ["--seeds", "0"]])
def test_mistakes_on_the_command_line(flags, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        recipes.main(flags)
    assert ended.value.code == 2 and flags[0] in capsys.readouterr().err
