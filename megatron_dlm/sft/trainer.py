"""The SFT loop: draw, pack, step, report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from megatron_dlm import platform
from megatron_dlm.config.block_schedule import BlockSchedule
from megatron_dlm.config.log import LoggingConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.config.sft_objective import num_masks
from megatron_dlm.sft.loader import Loader, open_loader
from megatron_dlm.sft.objective import sft_forward
from megatron_dlm.sft.updates import Place, Sampler, Update, Updates
from megatron_dlm.training import profile
from megatron_dlm.training.ledger import Ledger, hold_state
from megatron_dlm.training.pace import Pace
from megatron_dlm.training.report import Report
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import ForwardStep, StepResult, train_step

STAGE = "sft"


class SFTTrainer:
    """Trains `state` on the samples that `sampler` gives; `consumed` counts those seen since the start of the run.

    Args:
        sampler: at its place; that of a resumed run where it was.
        progress: of the run that is resumed, as `progress` returned it; None for a new one.
    """

    def __init__(
        self,
        session: Session,
        state: TrainState,
        sampler: Sampler,
        sft: SFTConfig,
        seed: int,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        self.session, self.state, self.sft = session, state, sft
        self.consumed = (progress or {}).get("consumed_samples", 0)
        groups, words = session.groups, session.tokenizer
        blocks = BlockSchedule.read(sft.block_size_schedule, session.model.block_size)
        place = Place(
            groups.data_rank,
            groups.data_size,
            session.row_multiple,
            session.rows_multiple,
            session.sharing,
            words.mask_id,
            words.pad_id,
        )
        self.updates = Updates(sampler, sft, blocks, place, seed)
        self.place = sampler.progress()
        self.loader: Loader | None = None

    def progress(self) -> dict[str, Any]:
        """What a resumed run needs besides the TrainState; JSON can hold it."""
        return {"consumed_samples": self.consumed, "blocks": self.sft.block_size_schedule, **self.place}

    def take(self) -> Update:
        """The next update, its rows on the device; its samples are then consumed."""
        if self.loader is None:
            self.updates.step = self.state.iteration
            self.loader = open_loader(self.updates, self.sft, platform.device())
        update = next(self.loader)
        self.consumed += update.samples
        self.place = update.progress
        return update

    def forward_step(self, update: Update) -> ForwardStep:
        """What is computed on its rows."""
        sft, session = self.sft, self.session
        causal_from = update.causal_from if sft.ar_loss_coef else None
        chunk = session.parallel.loss_chunk_size
        confidence = sft.confidence_coef / num_masks(sft)  # of each mask: the weights have that in them
        return sft_forward(session.vocabulary, update.num_predicted, chunk, causal_from, confidence)

    def step(self) -> tuple[StepResult, Update]:
        """One optimizer step: its result, and what was learned."""
        with profile.span("rows"):
            update = self.take()
        return train_step(self.state, update.rows, self.forward_step(update), update.length), update

    def _block_size(self, update: Update) -> dict[str, float]:
        """Blocks of the update, where they change in the run; 0 for full attention."""
        return {} if self.sft.block_size_schedule is None else {"train/block_size": float(update.block_size or 0)}

    def close(self) -> None:
        """End what prepares rows ahead."""
        if self.loader is not None:
            self.loader.close()
            self.loader = None

    def run(self, report: Report, logging: LoggingConfig, pace: Pace) -> None:
        """Train to --train-iters, or as long as `pace` lets it."""
        try:
            self._run(report, logging, pace)
        finally:
            self.close()

    def _run(self, report: Report, logging: LoggingConfig, pace: Pace) -> None:
        last, ledger = time.perf_counter(), Ledger()
        hold_state(ledger, self.state)
        with report.bar(self.sft.train_iters, "sft") as bar, pace, ledger.told_in_shortage():
            bar.update(self.state.iteration)
            while self.state.iteration < self.sft.train_iters:
                learning_rate = self.state.learning_rate()
                profile.begin_step(self.state.iteration)
                ledger.begin_step()
                with profile.phase("train"):
                    result, update = self.step()
                ledger.mark("train")
                now = time.perf_counter()
                iteration, seconds, last = self.state.iteration, now - last, now
                metrics = {
                    "train/loss": result.metrics["loss"],
                    **_per_target(result.metrics),
                    "train/grad_norm": result.grad_norm,
                    "train/lr": learning_rate,
                    "train/consumed_samples": self.consumed,
                    **self._block_size(update),
                    "train/row_tokens": update.tokens,
                    "perf/step_time": seconds,
                    "perf/samples_per_sec": update.samples / seconds,
                    "perf/tokens_per_sec": update.tokens / seconds,
                    **ledger.metrics(),
                }
                report.record(iteration, metrics)
                if iteration % logging.log_interval == 0 or iteration == self.sft.train_iters:
                    report.iteration(
                        iteration,
                        self.sft.train_iters,
                        {
                            "consumed samples": self.consumed,
                            "elapsed time per iteration (ms)": f"{1000 * seconds:.1f}",
                            "learning rate": f"{learning_rate:.6E}",
                            "global batch size": self.sft.global_batch_size,
                            "lm loss": f"{metrics['train/loss']:.6E}",
                            "masked-token nll": metrics["train/nll"],
                            "grad norm": f"{result.grad_norm:.3f}",
                        },
                    )
                    if logging.log_memory:
                        report.say(f"memory after iteration {iteration}: {ledger.phases['train']}")
                bar.update()
                if pace.after(iteration, metrics):
                    break
            pace.finish(self.state.iteration)


def _per_target(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over targets of an update's sums."""
    count = max(sums["targets"], 1)
    found = {"train/nll": sums["nll"] / count, "train/target_accuracy": sums["right"] / count}
    if "causal_nll" in sums:
        found["train/causal_nll"] = sums["causal_nll"] / max(sums["causal_targets"], 1)
    if "right_entropy" in sums:
        found["train/right_entropy"] = sums["right_entropy"] / max(sums["right"], 1)
    return found
