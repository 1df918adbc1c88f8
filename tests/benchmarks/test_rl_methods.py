"""Experiments with RL methods: their arithmetic, their plans, and how stages are run; no training."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from benchmarks import block_expansion, rl_methods
from benchmarks.rl_report import (
    Curves,
    at_equal_tokens,
    bands,
    curves,
    draw,
    end,
    end_of,
    figures,
    interval,
    markdown,
    roughness,
    spread,
    tables,
)
from benchmarks.stages import Stage, environment, run
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.flags import parse
from megatron_dlm.config.sections import SECTIONS, pick


# ----------------------------------------------------------------------------------------------------------- arithmetic
def test_intervals_are_those_of_students_t() -> None:
    """Mean 2 and standard deviation 1 of n = 3: 4.303 / sqrt(3) on either side."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(2.4842, abs=1e-3)
    assert str(found) == "2.0 ± 2.5" and found.signed() == "+2.0 ± 2.5"
    assert interval([-1.0, -3.0]).half == pytest.approx(12.7062, abs=1e-3)  # deviation sqrt(2), 12.706 / sqrt(2)
    assert interval([-1.0, -3.0]).signed().startswith("-2.0")
    many = [float(n % 2) for n in range(100)]
    assert interval(many).half == pytest.approx(2.131 * np.sqrt(25 / 99) / 10)  # not narrower than with 1.984


def test_one_seed_has_no_interval() -> None:
    assert interval([41.26]).half is None and str(interval([41.26])) == "41.3"
    assert spread([of_run(1.0, 1)]) is None


def test_the_end_of_a_curve_is_the_mean_of_its_last_stretch() -> None:
    x, y = np.array([0.0, 5.0, 9.0, 10.0]), np.array([7.0, 0.0, 4.0, 8.0])
    # from 8 to 9 it climbs from 3 to 4, from 9 to 10 to 8
    assert end_of(x, y, 10.0, 0.2) == pytest.approx((3.5 + 6.0) / 2)
    assert end_of(x, y, 10.0, 0.1) == pytest.approx(6.0)
    assert end_of(x, y, 5.0, 0.2) == pytest.approx(0.7)  # inside one segment, before the last point
    assert end_of(x, y, 5.0, 1.0) == pytest.approx(3.5)


def test_roughness_sees_noise_and_no_slope() -> None:
    steps = np.arange(4000.0)
    assert roughness(0.3 * steps - 7) == pytest.approx(0, abs=1e-9)
    noise = np.random.default_rng(0).normal(0, 2.5, len(steps))
    assert roughness(0.3 * steps + noise) == pytest.approx(2.5, rel=0.05)
    assert roughness(np.array([0.0, 3.0, 0.0])) == pytest.approx(6**0.5)  # 3 away from the middle: sqrt(2/3 * 9)
    assert roughness(np.array([1.0, 2.0])) is None


def of_run(slope: float, tokens_per_step: float, start: float = 30.0) -> Curves:
    steps = np.arange(0, 11, 2)
    return Curves(steps, start + slope * steps, tokens_per_step * steps, start + slope * np.arange(1, 11), 1.5, 60.0)


def test_equal_tokens_are_those_of_the_run_that_trained_on_fewer() -> None:
    fast, cheap = of_run(slope=4.0, tokens_per_step=200.0), of_run(slope=3.0, tokens_per_step=100.0)
    # 1000 tokens: cheap has taken 10 steps, fast 5; the last fifth begins at 8 and at 4
    assert at_equal_tokens(fast, cheap) == pytest.approx((30 + 4 * 4.5, 30 + 3 * 9))
    assert at_equal_tokens(cheap, fast) == pytest.approx((30 + 3 * 9, 30 + 4 * 4.5))
    assert end(fast) == pytest.approx(30 + 4 * 9)


def test_spread_is_of_gains_over_seeds() -> None:
    """Gains of 2, 4, 6, 8, 10 and of three times as much: a deviation of gain x sqrt(2), in the mean 6 sqrt(2)."""
    assert spread([of_run(1.0, 1, start=30), of_run(3.0, 1, start=50)]) == pytest.approx(6 * 2**0.5)
    assert spread([of_run(2.0, 1, start=30), of_run(2.0, 1, start=50)]) == pytest.approx(0)


def record(step: int, **values: float) -> dict:
    return {"step": step} | {name.replace("__", "/"): value for name, value in values.items()}


def test_curves_of_a_metrics_file() -> None:
    """A step in which nothing was learned trained on nothing."""
    learned = lambda step, tokens, **more: record(
        step,
        **dict(rollout__raw_reward=step / 10, rollout__tokens_per_step=1 + step, perf__step_time=2.0),
        **dict(train__tokens=tokens) if tokens else {},
        **more,
    )
    found = curves(
        [
            record(0, eval__dynamic__accuracy=0.4),
            learned(1, 1000.0),
            learned(2, 500.0, eval__dynamic__accuracy=0.5),
            learned(3, None),
            learned(4, 250.0, eval__dynamic__accuracy=0.75),
        ]
    )
    assert found.steps.tolist() == [0, 2, 4] and found.accuracy.tolist() == pytest.approx([40, 50, 75])
    assert found.tokens.tolist() == [0, 1500, 1750]
    assert found.reward.tolist() == pytest.approx([10, 20, 30, 40])
    assert (found.speed, found.seconds) == (5.0, 8.0)


def test_trained_tokens_are_not_taken_for_none() -> None:
    with pytest.raises(ValueError, match="train/tokens"):
        curves([record(0, eval__dynamic__accuracy=0.4), record(1, train__loss=0.1)])


def test_bands_go_as_far_as_all_curves() -> None:
    x, mean, spread = bands(
        [(np.array([0.0, 10.0]), np.array([0.0, 10.0])), (np.array([0.0, 4.0]), np.array([2.0, 6.0]))], points=5
    )
    assert x.tolist() == [0, 1, 2, 3, 4] and mean.tolist() == pytest.approx([1, 2, 3, 4, 5])
    assert spread.tolist() == pytest.approx([2**0.5] * 5)


# ----------------------------------------------------------------------------------------------------------- the report
def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_compare_seed_by_seed(tmp_path) -> None:
    runs = {
        "TraceRL": {1: of_run(4.0, 200, 30), 2: of_run(4.0, 200, 40)},
        "coupled": {1: of_run(3.0, 200, 30), 2: of_run(3.2, 200, 40), 3: of_run(1.0, 200, 90)},
    }
    learned, cost = tables(runs, "TraceRL").split("\n\n")
    head, _, base, coupled = map(cells, learned.split("\n"))
    at = {title: place for place, title in enumerate(head)}
    assert base[at["less TraceRL"]] == "" and base[at["seeds"]] == "2"
    assert coupled[at["seeds"]] == "3"
    assert coupled[at["less TraceRL"]].startswith("-8.1 ±")  # of seeds 1 and 2: -9 and -7.2, whatever seed 3 did
    assert coupled[at["less TraceRL at equal tokens"]].startswith("-8.1 ±")
    assert coupled[at["less TraceRL"] + 1] == "0 of 2"
    assert base[at["held out before, %"]].startswith("35.0 ±")
    assert base[at["mean over the run, %"]].startswith("55.0 ±")
    head, _, base, coupled = map(cells, cost.split("\n"))
    at = {title: place for place, title in enumerate(head)}
    assert base[at["spread over seeds"]] == "0.0"
    assert coupled[at["minutes"]] == "1.0" and coupled[at["tokens per denoising step"]] == "1.50"
    assert figures(runs)["TraceRL"]["2"]["end"] == pytest.approx(76)
    draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_markdown_table() -> None:
    assert markdown([("a", "bb"), ("ccc", "d")]).split("\n") == ["| a   |  bb |", "| --- | --: |", "| ccc |   d |"]


# ------------------------------------------------------------------------------------------------------------ the plans
def settings(stage: Stage) -> dict:
    """The settings that a stage's command reads; a flag that it does not know ends the test."""
    assert stage.arguments[:3] == ("-m", "megatron_dlm", stage.arguments[2])
    command = stage.arguments[2]
    if command == "sft":
        names = ("model", "parallel", "tokenizer", "sft", "optimizer", "checkpoint", "logging", "run")
    else:
        names = tuple(name for name in SECTIONS if name not in ("sft", "generate", "score", "trace", "preprocess"))
    return parse(command, pick(*names), list(stage.arguments[3:]))


@pytest.mark.parametrize("arm", rl_methods.ARMS)
def test_every_arm_has_flags_that_tracerl_knows(arm: str, tmp_path) -> None:
    options = rl_methods._parser().parse_args(["--output", str(tmp_path), "--arms", arm, "--seeds", "7"])
    plan, arms = rl_methods.stages(options)
    assert [stage.name.split(",")[0] for stage in plan[:2]] == ["data", "SFT"]
    config = settings(arms[arm, 7])
    assert config["run"].seed == 7 and config["rl"].num_rollout == options.rl_steps
    assert config["checkpoint"].load == str(plan[1].result) == settings(plan[1])["checkpoint"].save
    flags = rl_methods.ARMS[arm].flags
    assert config["rl"].rl_method == flags[flags.index("--rl-method") + 1]


def test_arms_differ_in_their_flags_alone(tmp_path) -> None:
    options = rl_methods._parser().parse_args(["--output", str(tmp_path), "--seeds", "1", "2"])
    plan, arms = rl_methods.stages(options)
    assert len(plan) == 2 + 2 + 2 * len(rl_methods.DEFAULT_ARMS)
    assert len({stage.folder for stage in plan}) == len(plan)
    for (arm, seed), stage in arms.items():
        own = set(rl_methods.ARMS[arm].flags)
        base = arms[rl_methods.BASE, seed]
        folder = lambda one: {word for word in one.arguments if str(one.folder) in word}
        different = set(stage.arguments) ^ set(base.arguments) ^ (folder(stage) ^ folder(base))
        assert different <= own | set(rl_methods.ARMS[rl_methods.BASE].flags)
        assert stage.after == base.after


def test_expansion_goes_from_rollouts_of_4_to_rollouts_of_8(tmp_path) -> None:
    options = block_expansion._parser().parse_args(["--output", str(tmp_path), "--seeds", "3", "5", "--direct"])
    plan, evaluations = block_expansion.stages(options)
    assert [one for n, stage in enumerate(plan) for one in stage.after if one not in plan[:n]] == []
    by_name = {stage.name: settings(stage) for stage in plan if "tracerl" in stage.arguments}
    blocks = {
        name: (config["model"].block_size, config["rollout"].rollout_block_size, config["rl"].num_rollout)
        for name, config in by_name.items()
        if name.endswith("seed 5")
    }
    first, second = options.phase_1, options.phase_2
    assert blocks == {  # None: as the checkpoint has it
        "base, seed 5": (None, None, options.base_steps),
        "after phase 1, seed 5": (8, 4, first),
        "expanded, seed 5": (None, None, first + second),
        "control, seed 5": (None, None, first + second),
        "direct, seed 5": (8, None, first + second),
    }
    goes_on = [name for name, config in by_name.items() if not config["checkpoint"].finetune]
    assert goes_on == ["expanded, seed 3", "expanded, seed 5"]
    assert len(evaluations) == 2 * 6 * 2
    loaded = evaluations["expanded", 8, 5].arguments
    assert loaded[loaded.index("--rollout-block-size") + 1] == "8"


def test_the_report_of_an_expansion(tmp_path) -> None:
    options = block_expansion._parser().parse_args(["--seeds", "1", "2"])
    accuracy = {("base", 4): 0.7, ("base", 8): 0.3, ("control", 4): 0.8, ("control", 8): 0.35, ("expanded", 8): 0.75}
    found = {
        key: {
            seed: {
                f"eval/{way}/{name}": value
                for way in block_expansion.WAYS
                for name, value in (("accuracy", base + seed / 100), ("tokens_per_step", 2.0))
            }
            for seed in (1, 2)
        }
        for key, base in accuracy.items()
    }
    text = block_expansion.report(found, options, failed=[])
    assert "- dynamic: the plain switch of the base to 8: -40.0 ± 0.0 points" in text
    assert "- static: expanded in 8 against the base in 4: +5.0 ± 0.0 points" in text
    assert "- dynamic: expanded in 8 against the control in 8: +40.0 ± 0.0 points" in text
    assert [cells(line)[:2] for line in text.split("\n") if line.startswith("| expanded")] == [["expanded", "8"]]


# --------------------------------------------------------------------------------------------------------------- stages
def python(tmp_path, name: str, code: str, *after: Stage) -> Stage:
    return Stage(name, tmp_path / name, ("-c", code.replace("HERE", repr(str(tmp_path / name)))), after)


def test_a_stage_is_run_once(tmp_path) -> None:
    count = "import pathlib; (p := pathlib.Path(HERE, 'count')).write_text('x')"
    first = python(tmp_path, "first", count)
    second = python(
        tmp_path, "second", "import pathlib; print(pathlib.Path(HERE, '../first/count').read_text())", first
    )
    heard: list[str] = []
    assert run([first, second], 2, environment(1, "cpu"), heard.append) == []
    assert [line.split(":")[0] for line in heard] == ["first", "second"]
    assert (second.folder / "log.txt").read_text() == "x\n" and second.seconds > 0
    heard.clear()
    assert run([first, second], 2, environment(1, "cpu"), heard.append) == []
    assert heard == ["2 of 2 stages are there already"]
    other = dataclasses.replace(first, arguments=(*first.arguments, "more"))
    again = dataclasses.replace(second, after=(other,))
    assert other.seconds is None and again.seconds is None  # what it builds on is another


def test_what_builds_on_a_failure_is_not_run_and_the_rest_is(tmp_path) -> None:
    bad = python(tmp_path, "bad", "import sys; print('because'); sys.exit(3)")
    child = python(tmp_path, "child", "pass", bad)
    grandchild = python(tmp_path, "grandchild", "pass", child)
    good = python(tmp_path, "good", "pass")
    heard: list[str] = []
    failed = run([bad, child, grandchild, good], 1, environment(1, "cpu"), heard.append)
    assert {stage.name for stage in failed} == {"bad", "child", "grandchild"}
    assert bad.seconds is None and not child.folder.exists() and good.seconds is not None
    assert any("exit code 3" in line and "because" in line for line in heard)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path) -> None:
    stage = python(tmp_path, "mine", "pass")
    stage.folder.mkdir()
    (stage.folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no earlier run"):
        run([stage], 1, environment(1, "cpu"), lambda line: None)
    assert (stage.folder / "thesis.txt").exists()


def test_a_stage_that_is_stopped_leaves_no_process(tmp_path) -> None:
    begun = "import os, time; open(HERE + '/pid', 'w').write(str(os.getpid())); time.sleep(600)"
    wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'long' / 'pid')!r}): time.sleep(0.02)"
    stage, other = python(tmp_path, "long", begun), python(tmp_path, "short", wait + "\ntime.sleep(0.2)")

    def say(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([stage, other], 2, environment(1, "cpu"), say)
    pid = int((stage.folder / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert stage.seconds is None


def test_stages_see_no_gpu_unless_asked_to(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert environment(2, "cpu")["CUDA_VISIBLE_DEVICES"] == "" and environment(2, "cpu")["OMP_NUM_THREADS"] == "2"
    assert environment(2, "auto")["CUDA_VISIBLE_DEVICES"] == "0"
