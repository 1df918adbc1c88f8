"""Which curves a run is shown by, and that a picture comes of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.training.curves import Curve, Panel, draw, panels, smoothed

SFT = [
    {"step": n, "train/loss": 3 / n, "train/nll": 2 / n, "train/grad_norm": 1.0 + n, "train/lr": 0.001 * n}
    for n in range(1, 6)
]


def rl_step(step: int, learned: bool = True) -> dict:
    record = {
        "step": step,
        "rollout/raw_reward": 0.1 * step,
        "rollout/reward": 0.05 * step,
        "rollout/tokens_per_step": 1.0 + step,
        "rollout/response_len/mean": 10.0,
        "rollout/response_len/p90": 12.0 + step,
        "perf/rollout_time": 2.0,
        "perf/reward_time": 0.5,
        "perf/step_time": 9.0,
    }
    if learned:
        record |= {"train/k3": 0.01 / step, "train/entropy": 0.3, "train/loss": -0.1, "train/grad_norm": 0.7}
        record |= {"train/train_rollout_logprob_abs_diff": 1e-7, "perf/train_time": 1.0 * step}
    return record


def by_title(records: list[dict]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    return {
        panel.title: {curve.name: (curve.steps, curve.values) for curve in panel.curves} for panel in panels(records)
    }


def colours(path: Path) -> int:
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 300
    return len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0))


def test_fine_tuning_is_shown_by_its_loss_gradient_and_rate() -> None:
    found, steps = by_title(SFT), [1, 2, 3, 4, 5]
    assert found["loss, nats per token"] == {
        "loss": (steps, [3 / n for n in steps]),
        "nll of masked tokens": (steps, [2 / n for n in steps]),
    }
    assert found["gradient norm"] == {"gradient norm": (steps, [1.0 + n for n in steps])}
    assert found["learning rate"] == {"learning rate": (steps, [0.001 * n for n in steps])}
    assert len(found) == 3  # nobody recorded tokens per second


def test_tracerl_is_shown_by_answers_reward_speed_policy_and_seconds() -> None:
    records = [{"step": 0, "eval/dynamic/accuracy": 0.25, "eval/static/accuracy": 0.5}]
    records += [rl_step(1), rl_step(2, learned=False), rl_step(3) | {"eval/dynamic/accuracy": 0.75}]
    found = by_title(records)
    assert found["right answers, %"] == {
        "rollouts": ([1, 2, 3], pytest.approx([10.0, 20.0, 30.0])),
        "held out, dynamic": ([0, 3], [25.0, 75.0]),
        "held out, static": ([0], [50.0]),
    }
    assert found["reward"] == {"reward": ([1, 2, 3], pytest.approx([0.05, 0.1, 0.15]))}
    assert found["tokens per denoising step"] == {"tokens per denoising step": ([1, 2, 3], [2.0, 3.0, 4.0])}
    assert found["response length, tokens"]["90th percentile"] == ([1, 2, 3], [13.0, 14.0, 15.0])
    assert found["k3 between old and new policy"] == {"k3 between old and new policy": ([1, 3], [0.01, 0.01 / 3])}
    assert found["entropy of the policy, nats"]["entropy of the policy, nats"] == ([1, 3], [0.3, 0.3])


def test_the_seconds_of_all_phases_have_the_same_steps() -> None:
    found = by_title([rl_step(1), rl_step(2, learned=False), rl_step(3) | {"perf/eval_time": 4.0}])
    assert found["seconds per RL step"] == {
        "rollout": ([1, 2, 3], [2.0, 2.0, 2.0]),
        "reward": ([1, 2, 3], [0.5, 0.5, 0.5]),
        "train": ([1, 2, 3], [1.0, 0.0, 3.0]),
        "evaluation": ([1, 2, 3], [0.0, 0.0, 4.0]),
    }


@pytest.mark.parametrize("records", [[], [{"step": 60, "eval/dynamic/accuracy": 0.5}]])
def test_without_training_steps_there_is_nothing_to_show(records: list[dict]) -> None:
    assert panels(records) == []


@pytest.mark.parametrize("count", [1, 7, 40, 41, 100, 333])
def test_smoothing_is_a_mean_over_a_twentieth(count: int) -> None:
    values = np.random.default_rng(0).normal(size=count).tolist()
    half = count // 40
    for place, value in enumerate(smoothed(values)):
        reach = min(half, place, count - 1 - place)
        assert value == pytest.approx(np.mean(values[place - reach : place + reach + 1]))


@pytest.mark.parametrize(
    "records",
    [
        SFT,
        SFT[:1],
        [record | {"step": n, "train/loss": np.sin(n)} for n, record in enumerate(SFT * 40)],
        [rl_step(1, learned=False)],
        [rl_step(n) | {"eval/dynamic/accuracy": 0.1} for n in range(1, 100)],
        [rl_step(n) | {"train/k3": 0.0, "train/train_rollout_logprob_abs_diff": 0.0} for n in range(1, 4)],
    ],
    ids=["sft", "one step", "long", "nothing learned", "tracerl", "zeros"],
)
def test_any_run_makes_a_picture(records: list[dict], tmp_path: Path) -> None:
    draw(panels(records), tmp_path / "curves.png", "a run")
    assert colours(tmp_path / "curves.png") > 10


def test_a_curve_that_is_there_colours_the_picture(tmp_path: Path) -> None:
    """The same axes with and without a line: the blue of the line is in one picture only."""
    from matplotlib.image import imread

    blues = []
    for name, values in (("with", [1.0, 2.0]), ("without", [])):
        draw([Panel("p", [Curve("c", list(range(len(values))), values)], "linear")] if values else [Panel("p", [])],
             tmp_path / name)  # fmt: skip
        red, green, blue = imread(tmp_path / name)[..., :3].reshape(-1, 3).T
        blues.append(int(((blue > 0.6) & (red < 0.3) & (green < 0.6)).sum()))
    assert blues[0] > 100 and blues[1] == 0


def test_no_window_is_wanted(tmp_path: Path, monkeypatch) -> None:
    for name in ("DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    draw(panels(SFT), tmp_path / "curves.png")
    assert os.path.getsize(tmp_path / "curves.png") > 5000
