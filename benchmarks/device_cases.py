#!/usr/bin/env python
"""One side of a comparison of devices: computes everything that gpu_check.py compares, and writes it to a file.

gpu_check.py starts this once per precision and layout, as a process of its own (under torchrun where there are
several), because a process has one device for its life. Results do not depend on the layout: they are ordered by
response and token, and sharded tensors are put together.

The float64 run on the CPU is the oracle. Float64 models have no optimizer in the package; here torch's AdamW takes
their steps, with the clipping written out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import torch
from torch import Tensor

from megatron_dlm.commands.common import prepare_process

if __name__ == "__main__":
    prepare_process()  # before anything imports megatron-core

import numpy as np

from benchmarks.common import (
    build_state,
    loss_chunk,
    made_up_advantages,
    open_session,
    random_prompts,
    random_traces,
    records,
    whole_tensors,
)
from benchmarks.kernel_cases import kernel_cases
from megatron_dlm import platform
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import Load, pack
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.training.report import Stopwatch

OPTIMIZER = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=0.5, weight_decay=0.1)
SFT_STEPS, RL_STEPS = 3, 2
LONGEST_PROMPT, LONGEST_RESPONSE, ROW = 11, 32, 256  # tokens
HEAD_SCALE = 3.0
PAGES = (16, 256)  # tokens per page of the KV cache
TEMPERATURE = 0.8  # of the policy on made-up traces
SAMPLING = {
    "static": SamplingParams(remasking="static", max_new_tokens=LONGEST_RESPONSE, ignore_eos=True),
    "dynamic": SamplingParams(
        remasking="dynamic", threshold=0.1, temperature=0.7, top_p=0.9, max_new_tokens=LONGEST_RESPONSE, ignore_eos=True
    ),
    "greedy": SamplingParams(remasking="dynamic", threshold=0.3, temperature=0.0, max_new_tokens=19, ignore_eos=True),
}


class Cases:
    """Everything that is compared, for one model in one layout."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, disturb: float) -> None:
        self.parallel, self.disturb = parallel, disturb
        self.session = open_session(model, parallel)
        self.block = self.session.model.block_size
        self.grid = Grid(self.block)
        vocabulary, rng = model.vocab_size, np.random.default_rng(0)
        self.samples = [
            Sample(
                f"s{n}",
                tuple(rng.integers(0, vocabulary - 3, 1 + n).tolist()),
                tuple(rng.integers(0, vocabulary - 3, 9 + 5 * (n % 4)).tolist()),
            )
            for n in range(8)
        ]
        self.traces = random_traces(4, 3, LONGEST_PROMPT, LONGEST_RESPONSE, self.block, vocabulary, rng)
        self.watch = Stopwatch()

    def run(self) -> dict[str, Any]:
        """All results of this process's job, by name; only rank 0's are used. Collective."""
        results: dict[str, Any] = {}
        state = self.state(None)
        for stage, prepare in (("sft", self.sft_rows), ("tracerl", self.rl_rows)):
            rows, forward, length, plain = prepare(state, 0)
            with self.watch.phase(f"logits, {stage}"):
                results[f"logits, {stage}"] = self.by_target(state, plain, self.logits(state, rows, length))
            with self.watch.phase(f"gradients, {stage}"):
                results[f"gradients, {stage}"] = self.gradients(state, rows, forward, length)
        with self.watch.phase("log-probabilities"):
            rows, _, length, plain = self.rl_rows(state, 0)
            results["log-probabilities"] = self.by_target(state, plain, [row.old_logprob for row in rows])
        for way, sampling in SAMPLING.items():
            with self.watch.phase(f"rollout, {way}"):
                results[f"rollout, {way}"] = traces = self.rollout(state, sampling)
            with self.watch.phase(f"rollout against trainer, {way}"):
                results[f"trainer, {way}"] = self.judge(state, traces)
        for backend, page in self.attention_backends():
            way = f"dynamic by {backend}"
            with self.watch.phase(f"attention, {backend}"):
                results[f"attention, {backend}"] = self.attention_difference(backend, page)
            with self.watch.phase(f"rollout, {way}"):
                results[f"rollout, {way}"] = traces = self.rollout(state, SAMPLING["dynamic"], backend, page)
            with self.watch.phase(f"rollout against trainer, {way}"):
                results[f"trainer, {way}"] = self.judge(state, traces)
        del state
        for name, distributed in (("steps", False), ("steps, distributed optimizer", True)):
            if self.session.model.fp64 and distributed:
                continue
            with self.watch.phase(name):
                results[name] = self.steps(distributed)
        results["seconds"] = self.watch.seconds
        return results

    def state(self, optimizer: OptimizerConfig | None, distributed: bool = False):
        session = dataclasses.replace(
            self.session, parallel=dataclasses.replace(self.parallel, use_distributed_optimizer=distributed)
        )
        state = build_state(session, optimizer, 100, HEAD_SCALE)
        if self.disturb:  # the gain of the final norm: everything depends on it
            with torch.no_grad():
                dict(state.named_parameters())["decoder.final_layernorm.weight"].mul_(1 + self.disturb)
            if optimizer is not None:
                state.optimizer.reload_model_params()
        return state

    def sft_rows(self, state, step: int):
        """This rank's rows of an SFT update, the function that runs them, their length, and the plain rows."""
        from megatron_dlm.config.sft import SFTConfig
        from megatron_dlm.sft.objective import sft_forward
        from megatron_dlm.sft.updates import sft_items

        words, groups = self.session.tokenizer, state.groups
        drawn = sft_items(self.samples, step, 5, self.grid, SFTConfig(max_loss_weight=4.0), words.pad_id)
        loads = [Load(item.group, item.shared_length, item.own_length) for item in drawn.items]
        plan = pack(loads, ROW, groups.dp_size, 64)
        rows = [
            build_row([(index, drawn.items[index]) for index in members], plan.length, words.mask_id, words.pad_id)
            for members in plan.ranks[groups.dp_rank]
        ]
        rows = [row.to(platform.device()) for row in rows]
        forward = sft_forward(self.session.vocabulary, drawn.num_predicted, loss_chunk(self.session, state))
        return rows, forward, plan.length, rows

    def rl_rows(self, state, step: int, traces: Sequence[Trace] | None = None, temperature: float = TEMPERATURE):
        """The same for a TraceRL update on made-up traces, or on those given; old log-probabilities included."""
        from megatron_dlm.rl.methods import replay
        from megatron_dlm.rl.objective import PolicyObjective
        from megatron_dlm.rl.rows import build_rows
        from megatron_dlm.rl.update import UpdateSettings, plan_updates, policy_forward, with_old_logprobs

        traces = self.traces if traces is None else traces
        settings = UpdateSettings(
            objective=PolicyObjective(0.2, 0.3, 0.1),
            temperature=temperature,
            aggregation="constant",
            longest=LONGEST_RESPONSE,
            num_updates=1,
            max_tokens_per_row=ROW,
            states=replay(self.grid),
            loss_chunk_size=loss_chunk(self.session, state),
        )
        words, groups, vocabulary = self.session.tokenizer, state.groups, self.session.vocabulary
        ((members, plan),) = plan_updates(records(traces, self.grid, 0), settings, groups, step)
        mine = {index: traces[graded.index] for index, graded in enumerate(members)}
        rows = build_rows(
            members, plan, mine, made_up_advantages(traces), settings, groups.dp_rank, words.mask_id, words.pad_id
        )
        rows = with_old_logprobs(state, rows, plan.length, vocabulary, settings)
        # Targets name responses by their place in the update; results are ordered by their place in `traces`.
        order = torch.tensor([graded.index for graded in members], device=platform.device())
        plain = [
            dataclasses.replace(
                row.row, targets=dataclasses.replace(row.row.targets, response=order[row.row.targets.response])
            )
            for row in rows
        ]
        return rows, policy_forward(vocabulary, settings), plan.length, plain

    def logits(self, state, rows: list, length: int) -> list[Tensor]:
        """Logits over the whole vocabulary at the targets of each row."""
        from megatron_dlm.parallel.exchange import gather_objects
        from megatron_dlm.training.step import forward_only

        def forward(row, model):
            return model.module.forward_row(getattr(row, "row", row)), lambda logits: logits.double().cpu()

        shards = gather_objects(forward_only(state, rows, forward, length), state.groups.tp)
        return [torch.cat(parts, dim=-1) for parts in zip(*shards)]

    def by_target(self, state, rows: list, values: list[Tensor]) -> Tensor:
        """One line per target of all rows of all ranks, ordered by response and token."""
        from megatron_dlm.parallel.exchange import gather_objects

        mine = [
            (row.targets.response.tolist(), row.targets.index.tolist(), value.double().cpu())
            for row, value in zip(rows, values)
        ]
        found = [row for part in gather_objects(mine, state.groups.dp) for row in part]
        keys = [(r, i) for response, index, _ in found for r, i in zip(response, index)]
        lines = torch.cat([value for *_, value in found])
        return lines[sorted(range(len(keys)), key=keys.__getitem__)]

    def gradients(self, state, rows: list, forward: Callable, length: int) -> dict[str, Tensor]:
        from megatron_dlm.training.step import accumulate_gradients

        accumulate_gradients(state, rows, forward, length)
        return whole_tensors(state, {name: parameter.main_grad for name, parameter in state.named_parameters()})

    def steps(self, distributed: bool) -> dict[str, Any]:
        """A few updates, SFT then TraceRL (the last ones on the same rows): losses, gradient norms, weights."""
        from megatron_dlm.training.step import train_step

        by_hand = self.session.model.fp64
        state = self.state(None if by_hand else OPTIMIZER, distributed)
        update = _AdamByHand(state) if by_hand else None
        start = whole_tensors(state, dict(state.named_parameters()))
        losses, norms = [], []

        def take(rows: list, forward: Callable, length: int) -> None:
            loss, norm = (
                update(rows, forward, length)
                if update is not None
                else (lambda result: (result.metrics["loss"], result.grad_norm))(
                    train_step(state, rows, forward, length)
                )
            )
            losses.append(loss)
            norms.append(norm)
            state.gather_parameters()

        for step in range(SFT_STEPS):
            take(*self.sft_rows(state, step)[:3])
        prepared = self.rl_rows(state, 0)[:3]
        for _ in range(RL_STEPS):
            take(*prepared)
        weights = whole_tensors(state, dict(state.named_parameters()))
        return {"losses": losses, "norms": norms, "moved": {name: weights[name] - start[name] for name in weights}}

    def attention_backends(self) -> list[tuple[str, int]]:
        """The backends beside sdpa that serve this model here, each with the smallest of some sizes of pages."""
        from megatron_dlm.config.errors import UserError
        from megatron_dlm.rollout.attention.backends import BACKENDS, served

        found = []
        for backend in sorted(BACKENDS.keys() - {"auto", "sdpa"}):
            for page in PAGES:
                with contextlib.suppress(UserError):
                    served(backend, self.cache_shape(page), platform.device())
                    found.append((backend, page))
                    break
        return found

    def cache_shape(self, page: int):
        from megatron_dlm.rollout.kv_cache import CacheShape

        model = self.session.model
        dtype = torch.bfloat16 if model.bf16 else torch.float64 if model.fp64 else torch.float32
        return CacheShape(1, page, 2, model.kv_channels, dtype)

    def attention_difference(self, backend: str, page: int) -> float:
        """Largest difference between the outputs of a backend and of sdpa, on random passes."""
        from megatron_dlm.rollout.attention.backends import KINDS, served
        from megatron_dlm.rollout.attention.self_test import largest_difference

        shape, device = self.cache_shape(page), platform.device()
        mine, sdpa = KINDS[served(backend, shape, device)].build(), KINDS["sdpa"].build()
        return max(largest_difference(mine, sdpa, shape, device, seed) for seed in range(3))

    def rollout(self, state, sampling: SamplingParams, backend: str = "sdpa", page: int = 16) -> list[Trace]:
        """Responses of all replicas, in the order of the requests."""
        from megatron_dlm.parallel.exchange import gather_objects
        from megatron_dlm.rollout.replicas import Job, requests_for
        from megatron_dlm.rollout.rig import RolloutRig

        config = RolloutConfig(
            max_running_requests=6, max_tokens_per_pass=64, kv_page_size=page, rollout_attention_backend=backend
        )
        rig = RolloutRig.open(self.session, state, config, LONGEST_PROMPT, LONGEST_RESPONSE)
        sampling = dataclasses.replace(sampling, block_size=self.block, denoising_steps=self.block)
        prompts = random_prompts(5, lambda n: 1 + 2 * n, self.session.model.vocab_size, 3)
        mine = prompts[rig.replica :: rig.num_replicas]
        traces = rig.engine.run(requests_for(mine, 3, sampling, Job(7, 0)))
        everyone = [trace for part in gather_objects(traces, state.groups.dp) for trace in part]
        return sorted(everyone, key=lambda trace: (trace.prompt_key, trace.sample))

    def judge(self, state, traces: Sequence[Trace]) -> Tensor:
        """The trainer's log-probability of every token of these traces, in their order."""
        rows, _, _, plain = self.rl_rows(state, 0, traces, traces[0].sampling.policy_temperature)
        return self.by_target(state, plain, [row.old_logprob for row in rows])


class _AdamByHand:
    """An update in float64: gradients of the package, clipped and applied by torch."""

    def __init__(self, state) -> None:
        self.state = state
        parameters = dict(state.named_parameters()).values()
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            groups,
            lr=OPTIMIZER.lr,
            betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
            eps=OPTIMIZER.adam_eps,
        )

    def __call__(self, rows: list, forward: Callable, length: int) -> tuple[float, float]:
        from megatron_dlm.training.step import accumulate_gradients

        metrics = accumulate_gradients(self.state, rows, forward, length)
        named = dict(self.state.named_parameters())
        whole = whole_tensors(self.state, {name: parameter.main_grad for name, parameter in named.items()})
        norm, parameters = torch.stack([value.square().sum() for value in whole.values()]).sum().sqrt(), named.values()
        for parameter in parameters:
            parameter.grad = parameter.main_grad * min(1.0, OPTIMIZER.clip_grad / (norm.item() + 1e-6))
        self.adam.step()
        for parameter in parameters:
            parameter.grad = None
        return metrics["loss"], norm.item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", help="file with what to do, written by gpu_check.py")
    job = torch.load(parser.parse_args(argv).job, weights_only=False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cases = Cases(job["model"], ParallelConfig(tensor_model_parallel_size=job["tp"]), job["disturb"])
    if "judge" in job:
        state = cases.state(None)
        results = {name: cases.judge(state, traces) for name, traces in job["judge"].items()}
    else:
        results = cases.run()
        if cases.session.groups.world_size == 1:
            results["kernels"] = kernel_cases(cases.cache_shape(1).dtype)
    if cases.session.groups.is_main:
        results["device"] = torch.cuda.get_device_name() if platform.is_cuda() else "CPU"
        torch.save(results, job["out"])
    from megatron_dlm.parallel import groups

    groups.destroy()


if __name__ == "__main__":
    main()
