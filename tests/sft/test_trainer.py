from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from megatron_dlm.config.log import LoggingConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.run import TrainingRunConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.training.pace import Pace
from tests.tiny import disturb, make_session, quiet, sampler_of

SFT = SFTConfig(data_path=["x"], train_iters=60, global_batch_size=8, max_tokens_per_row=256, max_loss_weight=5.0)


def samples(count: int = 8) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(f"s{n}", (n, n + 1), tuple(rng.integers(0, 40, 5 + n % 3).tolist()) + (49,)) for n in range(count)]


def make_trainer(sft: SFTConfig = SFT, lr: float = 1e-2, progress: dict | None = None):
    from megatron_dlm.sft.trainer import SFTTrainer

    session = make_session()
    state = session.train_state(OptimizerConfig(lr=lr), sft.train_iters)
    disturb(state.module, 0)
    return SFTTrainer(session, state, sampler_of(samples(), 5, progress), sft, seed=5, progress=progress)


def test_a_memorisable_set_is_memorised() -> None:
    trainer = make_trainer()
    losses = []
    for _ in range(60):
        result, update = trainer.step()
        losses.append(result.metrics["nll"] / result.metrics["targets"])
        assert update.tokens > 0 and np.isfinite(result.grad_norm)
    assert np.mean(losses[:5]) > np.log(51) * 0.8
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5]), losses
    assert trainer.consumed == 60 * 8 and trainer.state.iteration == 60


@pytest.mark.parametrize("budget", [64, 4096])
def test_the_row_budget_changes_nothing(budget: int) -> None:
    one, other = make_trainer(lr=1e-3), make_trainer(dataclasses.replace(SFT, max_tokens_per_row=budget), lr=1e-3)
    for _ in range(2):
        (first, _), (second, _) = one.step(), other.step()
        assert second.metrics["targets"] == first.metrics["targets"]
        assert second.metrics["loss"] == pytest.approx(first.metrics["loss"], rel=1e-4)
        assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-3)


def test_an_update_in_which_nothing_was_hidden_is_taken_in_stride() -> None:
    """Ratios near 0 hide nothing: no row, no loss, and the run goes on."""
    trainer = make_trainer(dataclasses.replace(SFT, min_mask_ratio=1e-12, max_mask_ratio=1e-12, max_loss_weight=2.0))
    result, _ = trainer.step()
    assert result.metrics["targets"] == 0 and result.metrics["loss"] == 0
    assert trainer.consumed == 8


def test_run_records_and_saves(tmp_path) -> None:
    sft = dataclasses.replace(SFT, train_iters=3)
    trainer, saved = make_trainer(sft), []
    with quiet(metrics_jsonl=str(tmp_path / "metrics.jsonl")) as report:
        trainer.run(report, LoggingConfig(log_interval=2), Pace(TrainingRunConfig(), lambda *call: saved.append(call)))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["train/consumed_samples"] for record in records] == [8, 16, 24]
    assert all(
        record["train/lr"] == 0.01 and record["train/loss"] > 0 and record["train/nll"] > 0 for record in records
    )
    assert saved[-1] == (3, True) and [step for step, force in saved if not force] == [1, 2, 3]


def test_a_finished_run_does_nothing_more() -> None:
    trainer, saved = make_trainer(dataclasses.replace(SFT, train_iters=2)), []
    trainer.state.iteration = 2
    trainer.run(quiet(), LoggingConfig(), Pace(TrainingRunConfig(), lambda *call: saved.append(call)))
    assert trainer.consumed == 0 and saved == [(2, True)]


@pytest.mark.parametrize("masks", [dict(mask_draws=4), dict(complementary_masks=True)], ids=str)
def test_more_masks_weigh_no_more(masks: dict) -> None:
    """Neither in the objective nor in what makes sure: all tokens are hidden, and a complement hides nothing."""
    sft = dataclasses.replace(SFT, min_mask_ratio=1 - 1e-9, confidence_coef=2.0, loss_on_pad=False)
    one, more = (make_trainer(settings).step()[0] for settings in (sft, dataclasses.replace(sft, **masks)))
    share = 0.5 if "complementary_masks" in masks else 1.0
    assert more.metrics["loss"] == pytest.approx(share * one.metrics["loss"], rel=1e-5)
    assert one.metrics["right_entropy"] > 0


@pytest.mark.parametrize("redraw", [True, False])
def test_masks_that_stay_are_the_same_in_every_epoch(redraw: bool) -> None:
    """Batches of all samples; without learning, fixed masks give the same loss at each step."""
    trainer = make_trainer(dataclasses.replace(SFT, redraw_masks=redraw), lr=1e-12)
    results = [trainer.step()[0].metrics for _ in range(4)]
    losses, targets = ({round(float(one[name]), 4) for one in results} for name in ("loss", "targets"))
    assert (len(losses) == 1) == (not redraw) and (len(targets) == 1) == (not redraw)


def test_the_noise_is_that_of_the_settings() -> None:
    """Ratios of 1 hide everything, whatever they are drawn for."""
    for per in ("block", "sample", "token"):
        whole = dataclasses.replace(SFT, mask_ratio_per=per, min_mask_ratio=1.0, loss_on_pad=False)
        assert make_trainer(whole).step()[0].metrics["targets"] == sum(len(s.response_ids) for s in samples())
        less = dataclasses.replace(whole, min_mask_ratio=0.01, max_mask_ratio=0.2)
        assert 0 < make_trainer(less).step()[0].metrics["targets"] < 0.3 * sum(len(s.response_ids) for s in samples())


def test_a_resumed_run_sees_what_the_next_step_would_have_seen() -> None:
    whole = make_trainer(lr=1e-12)
    whole.step()
    resumed = make_trainer(lr=1e-12, progress=json.loads(json.dumps(whole.progress())))
    assert resumed.consumed == 8
    resumed.state.iteration = 1
    (one, _), (other, _) = whole.step(), resumed.step()
    assert other.metrics["targets"] == one.metrics["targets"]
    assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-6)
