"""The SFT loop: draw, pack, step, report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from megatron_dlm import platform
from megatron_dlm.config.log import LoggingConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sampler import EpochSampler, Position
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.balance import load_of
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.planner import check_budget, pack
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.sft.objective import largest_item, sft_forward, sft_items
from megatron_dlm.training.ledger import Ledger, hold_state
from megatron_dlm.training.pace import Pace
from megatron_dlm.training.report import Report
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import ForwardStep, StepResult, train_step

STAGE = "sft"


class SFTTrainer:
    """Trains `state` on samples; `consumed` counts the samples seen since the start of the run.

    Args:
        progress: of the run that is resumed, as `progress` returned it; None for a new one.
    """

    def __init__(
        self,
        session: Session,
        state: TrainState,
        samples: list[Sample],
        sft: SFTConfig,
        seed: int,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        self.session, self.state, self.sft, self.seed = session, state, sft, seed
        progress = progress or {}
        self.sampler = EpochSampler(samples, seed, Position.read(STAGE, progress.get("position")))
        self.schedule = MaskSchedule(
            sft.mask_ratio_per, sft.min_mask_ratio, sft.max_loss_weight, max_ratio=sft.max_mask_ratio
        )
        self.consumed = progress.get("consumed_samples", 0)
        check_budget(max(largest_item(sample, session.grid) for sample in samples), sft.max_tokens_per_row)

    def progress(self) -> dict[str, Any]:
        """What a resumed run needs besides the TrainState; JSON can hold it."""
        return {"consumed_samples": self.consumed, "position": self.sampler.position.as_dict()}

    def take_rows(self) -> tuple[list[Row], int, ForwardStep, int]:
        """Of the next update, whose samples are then consumed: this rank's rows, their length, what is computed on
        them, and the tokens of all ranks, padding left out.
        """
        samples = self.sampler.take(self.sft.global_batch_size)
        session, words, groups = self.session, self.session.tokenizer, self.session.groups
        drawn = sft_items(
            samples,
            self.state.iteration,
            self.seed,
            session.grid,
            self.schedule,
            words.pad_id,
            self.sft.loss_on_pad,
            self.sft.redraw_masks,
        )
        loads, budget = [load_of(item) for item in drawn.items], self.sft.max_tokens_per_row
        plan = pack(loads, budget, groups.data_size, session.row_multiple, session.rows_multiple)
        rows = []
        for members in plan.ranks[groups.data_rank]:
            items = [(index, drawn.items[index]) for index in members]
            row, _ = session.sharing.part(build_row(items, plan.length, words.mask_id, words.pad_id))
            rows.append(row.to(platform.device()))
        self.consumed += len(samples)
        forward_step = sft_forward(session.vocabulary, drawn.num_tokens, session.parallel.loss_chunk_size)
        return rows, session.sharing.length(plan.length), forward_step, plan.tokens

    def step(self) -> tuple[StepResult, int]:
        """One optimizer step. Returns its result and the number of tokens in its rows, over all ranks."""
        rows, length, forward_step, tokens = self.take_rows()
        return train_step(self.state, rows, forward_step, length), tokens

    def run(self, report: Report, logging: LoggingConfig, pace: Pace) -> None:
        """Train to --train-iters, or as long as `pace` lets it."""
        last, ledger = time.perf_counter(), Ledger()
        hold_state(ledger, self.state)
        with report.bar(self.sft.train_iters, "sft") as bar, pace, ledger.told_in_shortage():
            bar.update(self.state.iteration)
            while self.state.iteration < self.sft.train_iters:
                learning_rate = self.state.learning_rate()
                ledger.begin_step()
                result, tokens = self.step()
                ledger.mark("train")
                now = time.perf_counter()
                iteration, seconds, last = self.state.iteration, now - last, now
                metrics = {
                    "train/loss": result.metrics["loss"],
                    "train/nll": result.metrics["nll"] / max(result.metrics["targets"], 1),
                    "train/grad_norm": result.grad_norm,
                    "train/lr": learning_rate,
                    "train/consumed_samples": self.consumed,
                    "perf/step_time": seconds,
                    "perf/samples_per_sec": self.sft.global_batch_size / seconds,
                    "perf/tokens_per_sec": tokens / seconds,
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
                if pace.after(iteration):
                    break
            pace.finish(self.state.iteration)
