"""A process that makes rollouts and TraceRL updates when it is told to, and says what they took.

tracerl_update.py starts one for each layout (on CUDA one for all, whose allocator tells the peaks apart), so that a
process's memory is that of one layout, and gives them their turns.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import PACKED
from megatron_dlm import platform
from megatron_dlm.commands.common import prepare_process
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.training.report import Stopwatch

PHASES = ("rows", "old log-probs", "forward+backward", "optimizer", "refit")


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured.

    Attributes:
        model: sizes. head_scale: how sure it is (common.draw_weights).
        prompts, samples: groups, and responses of each. prompt_length: tokens of the longest prompt; the others are
            shorter by a few, so that every remainder modulo the block occurs.
        rollout: how responses are drawn; `remasking` is set per measurement.
        max_tokens_per_row: row budget of all layouts.
        parallel: how the trained model computes.
    """

    model: ModelConfig
    head_scale: float
    prompts: int
    samples: int
    prompt_length: int
    rollout: RolloutConfig
    max_tokens_per_row: int
    seed: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True, slots=True)
class Generated:
    traces: list[Trace]
    seconds: float


@dataclass(frozen=True, slots=True)
class Updated:
    """One update: seconds per phase, peak memory in bytes up to the end of backward, `rows` rows of `length` tokens, of
    which `tokens` in all are not padding.
    """

    seconds: dict[str, float]
    peak: int
    rows: int
    length: int
    tokens: int
    loss: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Bench:
    """One model with its optimizer and its engine."""

    def __init__(self, job: Job) -> None:
        prepare_process()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        from benchmarks.common import build_state, open_session
        from megatron_dlm.rollout.rig import RolloutRig

        self.job = job
        self.session = open_session(job.model, job.parallel, job.seed)
        # The weights hardly move, so that every repetition does the same work.
        self.state = build_state(self.session, OptimizerConfig(lr=1e-7), 10_000, job.head_scale)
        self.rig = RolloutRig.open(
            self.session, self.state, job.rollout, job.prompt_length, job.rollout.rollout_max_response_len
        )

    def describe(self) -> tuple[int, int, str]:
        """Parameters, how many of them are embedding and head, and the device."""
        sizes = {name: parameter.numel() for name, parameter in self.state.named_parameters()}
        tables = sum(size for name, size in sizes.items() if "embedding" in name or "output_layer" in name)
        device = torch.cuda.get_device_name() if platform.is_cuda() else f"CPU, {torch.get_num_threads()} threads"
        return sum(sizes.values()), tables, device

    def generate(self, remasking: str, longest: int | None = None) -> Generated:
        """Responses to all prompts, on the weights as they are.

        Args:
            longest: tokens per response where it is not the job's (a short rollout warms up).
        """
        from benchmarks.common import random_prompts
        from megatron_dlm.rollout import replicas

        job, block = self.job, self.session.model.block_size
        config = dataclasses.replace(job.rollout, remasking=remasking)
        if longest is not None:
            config = dataclasses.replace(config, rollout_max_response_len=longest)
        sampling = dataclasses.replace(self.rig.sampling(config), ignore_eos=True)
        lengths = lambda n: max(1, job.prompt_length - n % block)
        prompts = random_prompts(job.prompts, lengths, job.model.vocab_size, job.seed)
        requests = replicas.requests_for(prompts, job.samples, sampling, replicas.Job(job.seed, 0))
        watch = Stopwatch()
        with watch.phase("rollout"):
            traces = self.rig.engine.run(requests)
            platform.synchronize()
        place = {(request.prompt_key, request.sample): index for index, request in enumerate(requests)}
        traces.sort(key=lambda trace: place[trace.prompt_key, trace.sample])
        return Generated(traces, watch.seconds["rollout"])

    def update(self, layout: str, traces: list[Trace], keep_gradients: str | None) -> Updated:
        """One TraceRL update on all traces.

        Args:
            keep_gradients: file that is given the gradient of every parameter before the optimizer uses it.
        """
        from benchmarks.common import made_up_advantages, whole_tensors
        from benchmarks.layouts import lay_out
        from benchmarks.memory import Peak
        from megatron_dlm.rl.update import policy_forward, with_old_logprobs
        from megatron_dlm.training.step import accumulate_gradients

        state, session, settings = self.state, self.session, self._settings()
        watch, vocabulary, words = Stopwatch(), session.vocabulary, session.tokenizer
        advantages = made_up_advantages(traces)
        with Peak() as peak:
            with watch.phase("rows"):
                rows, length, tokens = lay_out(
                    layout, traces, advantages, settings, session.groups, words.mask_id, words.pad_id
                )
                platform.synchronize()
            with watch.phase("old log-probs"):
                rows = with_old_logprobs(state, rows, length, vocabulary, settings)
                platform.synchronize()
            with watch.phase("forward+backward"):
                metrics = accumulate_gradients(state, rows, policy_forward(vocabulary, settings), length)
                platform.synchronize()
        # What follows takes the same memory in every layout.
        if keep_gradients is not None:
            found = {name: parameter.main_grad for name, parameter in state.named_parameters()}
            torch.save(whole_tensors(state, found), Path(keep_gradients))
        with watch.phase("optimizer"), platform.cuda_calls_on_cpu():
            state.optimizer.step()
            state.scheduler.step(increment=1)
            platform.synchronize()
        with watch.phase("refit"):
            self.rig.refit()
            platform.synchronize()
        return Updated(watch.seconds, peak.bytes, len(rows), length, tokens, metrics["loss"])

    def differences(self, traces: list[Trace]) -> Tensor:
        """How far the log-probabilities of the rollout are from those of the training model, one per token."""
        from benchmarks.common import made_up_advantages
        from benchmarks.layouts import lay_out
        from megatron_dlm.rl.update import with_old_logprobs

        session, settings, words = self.session, self._settings(), self.session.tokenizer
        advantages = made_up_advantages(traces)
        rows, length, _ = lay_out(PACKED, traces, advantages, settings, session.groups, words.mask_id, words.pad_id)
        again = with_old_logprobs(self.state, rows, length, session.vocabulary, settings)
        both = [
            (row.old_logprob.float().cpu() - known.rollout_logprob.float().cpu()).abs()
            for row, known in zip(again, rows)
        ]
        return torch.cat(both)

    def _settings(self):
        from benchmarks.common import loss_chunk
        from megatron_dlm.diffusion.layout import Grid
        from megatron_dlm.rl.methods import replay
        from megatron_dlm.rl.objective import PolicyObjective
        from megatron_dlm.rl.update import UpdateSettings

        job = self.job
        return UpdateSettings(
            objective=PolicyObjective(0.2, 0.2, 0.01),
            temperature=1.0,
            aggregation="constant",
            longest=job.rollout.rollout_max_response_len,
            num_updates=1,
            max_tokens_per_row=job.max_tokens_per_row,
            states=replay(Grid(self.session.model.block_size)),
            loss_chunk_size=loss_chunk(self.session, self.state),
        )
