"""Training speed in the TraceRL layout: which share of a GPU's peak goes into the model, and which into all that it
multiplies.

Model FLOPs are those that the update cannot do without: three products per weight and token that is not padding, head
and targets alike, and attention over the pairs that see each other. Hardware FLOPs are those that run: padding, pairs
in tiles of attention that nobody may see, what backward computes again (scores of attention, logits of the head).
Recomputation of layers is off here. Source of the counts: megatron_dlm/planning/work.py.

A model that does not fit one GPU is measured as two slices of its full width, of few layers each. What the larger one
takes more is the time of its layers; the figures are theirs, without embedding and head. Only what FP8 gains is that
of an update of the whole model: the larger slice and the layers that it lacks.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import calibrate, roofline
from benchmarks.common import PACKED, made_up_advantages, open_session, random_traces
from benchmarks.fused_layers import WAYS
from benchmarks.gpu_figures import Sheet
from benchmarks.layouts import lay_out
from benchmarks.memory import Peak
from megatron_dlm import platform
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.diffusion.layout import Layout, visible
from megatron_dlm.model.attention_backends import check_attention
from megatron_dlm.model.attention_flex import TILE

PRECISIONS: dict[str, dict[str, object]] = {"bf16": {}, "te": WAYS["te"], "fp8": WAYS["tensorwise"]}
"""Settings of ParallelConfig, by the name of what they come to."""


@dataclass(frozen=True, slots=True)
class Traces:
    """Made-up responses to learn from, and the rows that they stand in."""

    prompts: int
    samples: int
    prompt: int
    response: int
    row: int


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of an update, and the tokens of its rows that are not padding."""

    model: float
    hardware: float
    tokens: int

    def __sub__(self, other: Work) -> Work:
        return Work(self.model - other.model, self.hardware - other.hardware, self.tokens)


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians: seconds of forward and backward, and of an update; peak bytes."""

    work: Work
    passes: float
    update: float
    peak: int


def work_of(model: ModelConfig, rows: Sequence, head_products: float, tiled: bool) -> Work:
    """What an update over these rows (`diffusion.rows.Row`) takes.

    Args:
        model: resolved. head_products: of the head, forward and backward (4 where logits are computed again).
        tiled: attention runs over the tiles that hold a visible pair; else over squares of whole groups.
    """
    from megatron_dlm.planning.work import ATTENTION_BACKWARD, BACKWARD, attention_flops, body_flops, head_flops

    rows = [row.to(platform.device()) for row in rows]
    real = sum(int((row.layout.group >= 0).sum()) for row in rows)
    every = sum(len(row.layout.group) for row in rows)
    targets = sum(len(row.targets.label) for row in rows)
    pairs, computed = map(sum, zip(*(areas(row.layout, tiled) for row in rows)))
    model_flops = (body_flops(model, real) + head_flops(model, targets) + attention_flops(model, pairs)) * (
        1 + BACKWARD
    )
    hardware = body_flops(model, every) * (1 + BACKWARD) + head_flops(model, targets) * head_products
    hardware += attention_flops(model, computed) * (1 + ATTENTION_BACKWARD)
    return Work(model_flops, hardware, real)


def areas(layout: Layout, tiled: bool) -> tuple[int, int]:
    """Pairs that see each other, padding left out, and pairs that are computed."""
    mask = visible(layout, layout) & (layout.group >= 0)
    seen, (length, _) = int(mask.sum()), mask.shape
    if not tiled:
        _, lengths = layout.group[layout.group >= 0].unique(return_counts=True)
        return seen, int(lengths.long().square().sum())
    missing = -length % TILE
    mask = torch.nn.functional.pad(mask, (0, missing, 0, missing))
    count = len(mask) // TILE
    tiles = mask.view(count, TILE, count, TILE).any(3).any(1)
    return seen, int(tiles.sum()) * TILE**2


def peak_flops() -> tuple[float, str]:
    """FLOP per second of this device at best, and whose figure that is."""
    if platform.is_cuda():
        name = torch.cuda.get_device_name()
        if (known := roofline.known(name)) is not None:
            return known.flops, "data sheet"
    return calibrate.measure(platform.device(), 0.02).bf16_flops, "largest product measured"


def measure(model: ModelConfig, parallel: ParallelConfig, traces: Traces, repeats: int) -> Measured:
    """Updates of one model, with random weights as it is initialised.

    Raises:
        UserError: this machine lacks what the settings ask for. torch.OutOfMemoryError.
    """
    from megatron_dlm.parallel import groups
    from megatron_dlm.platform import te
    from megatron_dlm.rl.update import policy_forward, with_old_logprobs
    from megatron_dlm.training.step import accumulate_gradients

    te.require(parallel)
    session = open_session(model, parallel)
    try:
        state = session.train_state(OptimizerConfig(lr=1e-7), 10_000)
        words, vocabulary, settings = session.tokenizer, session.vocabulary, _settings(session, traces)
        rng = np.random.default_rng(0)
        drawn = random_traces(
            traces.prompts, traces.samples, traces.prompt, traces.response, model.block_size, model.vocab_size, rng
        )
        rows, length, _ = lay_out(
            PACKED, drawn, made_up_advantages(drawn), settings, session.groups, words.mask_id, words.pad_id
        )
        rows = with_old_logprobs(state, rows, length, vocabulary, settings)
        forward, found = policy_forward(vocabulary, settings), []
        products = 4.0 if parallel.loss_chunk_size else 3.0
        tiled = check_attention(parallel, session.model) == "flex"
        work = work_of(session.model, [row.row for row in rows], products, tiled)

        def update() -> tuple[float, float]:
            platform.synchronize()
            start = time.perf_counter()
            accumulate_gradients(state, rows, forward, length)
            platform.synchronize()
            middle = time.perf_counter()
            with platform.cuda_calls_on_cpu():
                state.optimizer.step()
            platform.synchronize()
            return middle - start, time.perf_counter() - start

        for _ in range(2):  # kernels are compiled, optimizer states made
            update()
        with Peak() as peak:
            found = [update() for _ in range(repeats)]
        held = torch.cuda.max_memory_allocated() if platform.is_cuda() else peak.bytes
        passes, updates = (statistics.median(column) for column in zip(*found))
        return Measured(work, passes, updates, held)
    finally:
        groups.destroy()
        state = rows = forward = None
        gc.collect()
        if platform.is_cuda():
            torch.cuda.empty_cache()


def _settings(session, traces: Traces):
    from megatron_dlm.rl.methods import replay
    from megatron_dlm.rl.objective import PolicyObjective
    from megatron_dlm.rl.update import UpdateSettings

    return UpdateSettings(
        objective=PolicyObjective(0.2, 0.2, 0.01),
        temperature=1.0,
        aggregation="constant",
        longest=traces.response,
        num_updates=1,
        max_tokens_per_row=traces.row,
        states=replay(session.grid),
        loss_chunk_size=session.parallel.loss_chunk_size,
    )


def report(
    model: ModelConfig, slices: Sequence[int], traces: Traces, repeats: int, sheet: Sheet, whole_layers: int | None
) -> None:
    """All figures of one size.

    Args:
        slices: one number of layers, or two of which the difference counts. whole_layers: of the real model, to which
            the latter is extrapolated.
    """
    peak, whose = peak_flops()
    speeds: dict[str, float] = {}
    for name, settings in PRECISIONS.items():
        keys = [f"{name} {key}" for key in ("model", "hardware", "update", "tokens", "memory")]
        try:
            parallel = ParallelConfig(**settings)
            found = [
                measure(dataclasses.replace(model, num_layers=layers), parallel, traces, repeats) for layers in slices
            ]
        except Exception as error:  # whatever a library says of this GPU
            sheet.lose(error, *keys)
            continue
        one = found[-1]
        work, passes, update, note = one.work, one.passes, one.update, f"peak: {whose}"
        whole = update
        if len(slices) == 2:
            work, passes = work - found[0].work, passes - found[0].passes
            update -= found[0].update
            if min(passes, update) <= 0:
                sheet.miss("more layers were not slower: too small to be measured so", *keys)
                continue
            layers = slices[1] - slices[0]
            whole = one.update + (whole_layers - slices[1]) / layers * update
            note += f"; {slices[1]} layers less {slices[0]}; {whole_layers} layers would take {whole:.2f} s"
        sheet.put(keys[0], 100 * work.model / passes / peak, note)
        sheet.put(keys[1], 100 * work.hardware / passes / peak)
        sheet.put(keys[2], 100 * work.model / update / peak)
        sheet.put(keys[3], one.work.tokens / one.update, f"{slices[-1]} layers")
        sheet.put(keys[4], one.peak / 2**30, f"{slices[-1]} layers")
        speeds[name] = 1 / whole
    _gain(speeds, sheet)


def _gain(speeds: Mapping[str, float], sheet: Sheet) -> None:
    """Args: speeds: updates of the whole model per second."""
    plain = [speed for name, speed in speeds.items() if name != "fp8"]
    if "fp8" in speeds and plain:
        sheet.put("fp8 gain", speeds["fp8"] / max(plain))
    else:
        sheet.miss("FP8 and bf16 were not both measured", "fp8 gain")
