"""A process that generates responses when it is told to, with the engine or with the plain loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import plain_loop
from benchmarks.rollout_cases import (
    Job,
    blocks_of,
    decoding_of,
    keyed_uniform,
    random_model,
    requests_of,
    shape_of,
)
from megatron_dlm import platform
from megatron_dlm.commands.common import prepare_process
from megatron_dlm.config.parallel import ParallelConfig

_WARM_UP = 9  # tokens per response


@dataclass(frozen=True, slots=True)
class Generated:
    """What one run made, and what it took.

    Attributes:
        seconds, cpu_seconds: by the clock, and of this process (all its threads).
        responses, tokens, blocks: made. A response that ends within a block took the whole block.
        prompt_tokens: in the full blocks of all prompts submitted. prefilled: tokens computed for them.
        steps, forwards: over all responses: denoising steps; these and commits that took a forward of their own.
        passes: of the model.
        phases: seconds, where the engine tells them.
    """

    seconds: float
    cpu_seconds: float
    responses: int
    tokens: int
    blocks: int
    prompt_tokens: int
    prefilled: int
    steps: int
    forwards: int
    passes: int
    phases: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Bench:
    """One model; it is copied for the plain loop, which has modules of its own."""

    def __init__(self, job: Job) -> None:
        prepare_process()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        from benchmarks.common import open_session

        self.job = job
        self.session = open_session(job.model, ParallelConfig(), job.seed)
        self.vocabulary = self.session.vocabulary
        self.model = random_model(self.session, job.head_scale)
        self.shape = shape_of(self.model, self.vocabulary.size)
        self._copy: plain_loop.PlainModel | None = None
        self._models = {"trained": self.model}

    @property
    def plain_model(self) -> plain_loop.PlainModel:
        if self._copy is None:
            self._copy = plain_loop.plain_model(dict(self.model.named_parameters()), self.shape, self.job.longest)
        return self._copy

    def model_with(self, weights: str):
        """The engine's model, its weights as --rollout-weights says."""
        from megatron_dlm.model.fp8 import fp8_layers, hold_in_fp8, load

        if weights not in self._models:
            self._models[weights] = model = random_model(self.session, self.job.head_scale)
            hold_in_fp8(model)
            wide = dict(self.model.named_parameters())
            for name, layer in fp8_layers(model):
                load(layer, wide[name])
        return self._models[weights]

    def describe(self) -> tuple[plain_loop.Shape, int, str]:
        """The model's sizes, its number of parameters, and the device."""
        device = torch.cuda.get_device_name() if platform.is_cuda() else "CPU"
        return self.shape, sum(parameter.numel() for parameter in self.model.parameters()), device

    def plain(self, remasking: str, every: int, threads: int) -> Generated:
        """Every n-th request, one after the other."""
        torch.set_num_threads(threads)
        torch.manual_seed(self.job.seed)
        requests = requests_of(self.job, remasking)[::every]
        decoding = decoding_of(self.job.sampling[remasking], self.vocabulary.mask_id)
        prompts = [request.prompt_ids.tolist() for request in requests]
        short = dataclasses.replace(decoding, max_new_tokens=_WARM_UP)
        plain_loop.generate(self.plain_model, prompts[0], short)
        platform.synchronize()
        clock = _Clock()
        found = [plain_loop.generate(self.plain_model, prompt, decoding) for prompt in prompts]
        platform.synchronize()
        seconds, cpu_seconds = clock.read()
        block, lengths = decoding.block_size, [len(prompt) for prompt in prompts]
        prefilled = sum(length // block * block for length in lengths)
        forwards = sum(one.denoising + one.commits for one in found)
        return Generated(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            responses=len(found),
            tokens=sum(one.length for one in found),
            blocks=blocks_of(lengths, [one.length for one in found], block),
            prompt_tokens=prefilled,
            prefilled=prefilled,
            steps=sum(one.denoising for one in found),
            forwards=forwards,
            passes=forwards + sum(length >= block for length in lengths),
            phases={},
        )

    def engine(self, options, remasking: str, first: int, threads: int, weights: str = "trained") -> Generated:
        """The first n requests, with an engine of these options (EngineOptions) and weights."""
        from megatron_dlm.rollout.engine import Engine

        torch.set_num_threads(threads)
        requests = requests_of(self.job, remasking)[:first]
        engine = Engine(self.model_with(weights), self.vocabulary, options)
        short = dataclasses.replace(self.job.sampling[remasking], max_new_tokens=_WARM_UP)
        engine.run([dataclasses.replace(request, sampling=short) for request in requests[: self.job.samples]])
        engine.drop_cache()
        engine.stats.reset()
        platform.synchronize()
        clock = _Clock()
        traces = engine.run(requests)
        platform.synchronize()
        seconds, cpu_seconds = clock.read()
        block, stats = self.job.sampling[remasking].block_size, engine.stats
        lengths = [len(trace.response_ids) for trace in traces]
        return Generated(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            responses=len(traces),
            tokens=sum(lengths),
            blocks=blocks_of([len(trace.prompt_ids) for trace in traces], lengths, block),
            prompt_tokens=sum(len(trace.prompt_ids) // block * block for trace in traces),
            prefilled=stats.prefill_tokens,
            steps=sum(trace.num_steps for trace in traces),
            forwards=sum(trace.num_forwards for trace in traces),
            passes=stats.passes,
            phases=dict(stats.seconds),
        )

    def different(self, contestants: Sequence[tuple[str, object]]) -> list[str]:
        """Which engines (name, EngineOptions) do not give the plain loop's tokens at its steps, each with a reason."""
        from megatron_dlm.rollout.engine import Engine

        complaints = []
        for remasking, sampling in self.job.sampling.items():
            requests = requests_of(self.job, remasking)
            decoding = decoding_of(sampling, self.vocabulary.mask_id)
            expected = {
                (request.prompt_key, request.sample): plain_loop.generate(
                    self.plain_model, request.prompt_ids.tolist(), decoding, keyed_uniform(request.stream)
                )
                for request in requests
            }
            for name, options in contestants:
                traces = Engine(self.model, self.vocabulary, options).run(requests)
                wrong = [trace for trace in traces if not _same(trace, expected[trace.prompt_key, trace.sample])]
                if wrong or len(traces) != len(requests):
                    complaints.append(f"{name}, {remasking}: {len(wrong)} of {len(requests)} responses differ")
        return complaints


def _same(trace, response: plain_loop.Response) -> bool:
    return (
        trace.tokens[len(trace.prompt_ids) :].tolist() == response.tokens
        and trace.all_steps.tolist() == response.steps
        and len(trace.response_ids) == response.length
    )


class _Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """By the wall, and of this process."""
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]
