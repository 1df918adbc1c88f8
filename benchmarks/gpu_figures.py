"""What benchmarks/gpu_suite.py measures: its parts, their figures, and the sheet on which a part writes what it finds.

A figure that has not been measured is in the table too, with the command that measures it, or the reason why it could
not be.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dlm.config.errors import UserError

CUT_SHORT = 3  # exit code of a part that has not measured all, for want of time
COMMAND = "python -m benchmarks.gpu_suite"
FP8_GOAL, MFU_GOAL, PACKED_GOAL, ATTENTION_GOAL, NOISE_GOAL = 1.3, 50.0, 3.0, 3.0, 1.0


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table.

    Attributes:
        key: within its part. text: what it is. unit: of the number.
        least, most: what is aimed at, at least or at most; None where nothing is.
    """

    key: str
    text: str
    unit: str
    least: float | None = None
    most: float | None = None

    @property
    def aim(self) -> str:
        """In words; empty where there is none."""
        if self.least is None and self.most is None:
            return ""
        number, bound = (self.most, "at most") if self.least is None else (self.least, "at least")
        return f"{bound} {number:g} {'' if self.unit == 'x' else self.unit}".strip()

    def reached(self, value: float) -> bool:
        """Whether a value is as good as the aim, or there is none."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True, slots=True)
class Part:
    """What is measured in one process. `share`: of the time that there is, beside those of the parts behind it."""

    name: str
    text: str
    share: int
    figures: tuple[Figure, ...]


def _training(size: str, text: str, share: int) -> Part:
    goal = MFU_GOAL if size == "8b" else None
    lines = []
    for key, name in (("bf16", "bf16"), ("te", "bf16, Transformer Engine"), ("fp8", "FP8")):
        lines += [
            Figure(f"{key} model", f"{name}: model FLOPs, of bf16's peak", "%", None if key == "fp8" else goal),
            Figure(f"{key} hardware", f"{name}: hardware FLOPs, of bf16's peak", "%"),
            Figure(f"{key} update", f"{name}: the same of an update with its optimizer, model FLOPs", "%"),
            Figure(f"{key} tokens", f"{name}: tokens of rows, of an update", "tokens/s"),
            Figure(f"{key} memory", f"{name}: peak memory", "GiB"),
        ]
    whole = ", extrapolated to the whole model" if size == "8b" else ""
    lines.append(Figure("fp8 gain", f"FP8 over the faster bf16: an update{whole}", "x", FP8_GOAL))
    return Part(f"training-{size}", text, share, tuple(lines))


_CORRECT = Part(
    "correctness",
    "The GPU against the CPU in float64 (benchmarks/gpu_check.py)",
    240,
    (Figure("passed", "checks that passed", ""), Figure("failed", "checks that failed", "")),
)
_PACKED = Part(
    "packed",
    "A TraceRL update, packed against naive layouts (benchmarks/tracerl_update.py)",
    100,
    (
        Figure("per step", "packed over one text per denoising step", "x", PACKED_GOAL),
        Figure("per round", "packed over one text per round", "x"),
        Figure("packed", "packed: update", "s"),
    ),
)
_ATTENTION = Part(
    "attention",
    "Training attention on a packed row (benchmarks/attention.py)",
    90,
    (
        Figure("forward", "FlexAttention forward, visible pairs", "TFLOP/s"),
        Figure("backward", "FlexAttention backward, visible pairs", "TFLOP/s"),
        Figure("gain", "FlexAttention over dense SDPA, forward and backward", "x", ATTENTION_GOAL),
        Figure("gain by group", "FlexAttention over SDPA by group, forward and backward", "x"),
        Figure("mask", "making the block mask", "ms"),
    ),
)
_ROLLOUT = Part(
    "rollout",
    "Rollout (benchmarks/rollout.py)",
    150,
    (
        Figure("tokens", "the engine", "tokens/s"),
        Figure("limit", "of what the roofline allows", "%"),
        Figure("graphs", "with CUDA graphs", "tokens/s"),
        Figure("graphs limit", "with CUDA graphs, of the roofline", "%"),
        Figure("fp8", "with weights in FP8", "tokens/s"),
        Figure("fp8 graphs", "with weights in FP8 and CUDA graphs", "tokens/s"),
        Figure("fp8 limit", "with weights in FP8, of the roofline (with such weights)", "%"),
        Figure("plain", "the engine over the plain loop", "x"),
    ),
)
_STEP = Part(
    "step",
    "A TraceRL step of the 1.7B model, phase by phase",
    130,
    (
        *(
            Figure(name, name, "s")
            for name in (
                "rollout",
                "reward",
                "rows",
                "old log-probs",
                "forward+backward",
                "optimizer",
                "refit",
            )
        ),
        Figure("refit shared", "refit: weights that are shared with training", "GiB"),
        Figure("bf16 largest", "rollout against trainer, bf16: largest difference of log-probabilities", ""),
        Figure("bf16 mean", "rollout against trainer, bf16: mean difference", ""),
        Figure("fp8 largest", "rollout in bf16 against trainer in FP8: largest difference", ""),
        Figure("fp8 mean", "rollout in bf16 against trainer in FP8: mean difference", ""),
        Figure("rollout fp8 largest", "rollout with weights in FP8 against trainer in bf16: largest difference", ""),
        Figure("rollout fp8 mean", "rollout with weights in FP8 against trainer in bf16: mean difference", ""),
    ),
)
_HEAD = Part(
    "head",
    "The loss head (benchmarks/loss_head.py) against the table of all logits; the sampler (benchmarks/kernels.py)",
    60,
    (
        Figure("chunk memory", "512 at a time, torch: memory", "x"),
        Figure("chunk time", "512 at a time, torch: time", "x"),
        Figure("triton memory", "512 at a time, Triton: memory", "x"),
        Figure("triton time", "512 at a time, Triton: time", "x"),
        Figure("sampler torch", "drawing tokens, torch", "ms"),
        Figure("sampler triton", "drawing tokens, Triton", "ms"),
    ),
)
_CURVES = Part(
    "curves",
    "200 steps of fine-tuning a small model: nats per token over the last 20 steps",
    90,
    (
        Figure("bf16", "bf16", "nats"),
        Figure("bf16 again", "bf16 with other masks, the mean of 3 runs", "nats"),
        Figure("noise", "noise: largest distance of one of these 3 from bf16", "nats"),
        Figure("te", "bf16, Transformer Engine", "nats"),
        Figure("fp8", "FP8", "nats"),
        Figure("te in noise", "bf16, Transformer Engine: distance from bf16, over the noise", "x", most=NOISE_GOAL),
        Figure("fp8 in noise", "FP8: distance from bf16, over the noise", "x", most=NOISE_GOAL),
    ),
)
_REFIT = Part(
    "refit",
    "Refit of the 1.7B model, to an engine with storage of its own",
    60,
    (
        Figure("copied", "one GPU: weights that were copied within it", "GB/s"),
        Figure("copied seconds", "one GPU: a refit", "s"),
        Figure("moved", "two GPUs, tensor-parallel training to engines of one each: weights, per GPU", "GB/s"),
        Figure("moved seconds", "two GPUs: a refit", "s"),
    ),
)

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        _CORRECT,
        _training("8b", "Training: layers of the 8B model in the TraceRL layout, from 4 and 8 of them", 120),
        _training("1.7b", "Training: the 1.7B model in the TraceRL layout", 80),
        _ATTENTION,
        _STEP,
        _PACKED,
        _ROLLOUT,
        _HEAD,
        _REFIT,
        _CURVES,
        _training("4b", "Training: the 4B model in the TraceRL layout", 90),
    )
}
"""In the order in which they are run: what is worth most comes first."""


def limit_of(name: str, wanted: Sequence[str], left: float) -> float:
    """Seconds for a part: its share of those that are left, beside the parts that are wanted behind it. What a part
    does not use is shared out among these.
    """
    behind = [part for part in list(PARTS)[list(PARTS).index(name) :] if part in wanted]
    return max(0.0, left) * PARTS[name].share / sum(PARTS[part].share for part in behind)


class Sheet:
    """The figures of a part, on the disk as soon as they are known: what ends a part early loses none.

    A figure is {"value": number, "note": text} or {"why": reason why there is none}.

    Args:
        seconds: that the part has, from now on; None for as long as it takes.

    Attributes:
        cut: why a part could not measure all of it, if so.
        wrong: the first error that is not for want of something; the part ends with it, when it is through.
    """

    def __init__(self, path: Path, seconds: float | None = None) -> None:
        self.path, self.figures, self.seconds, self.cut = path, {}, seconds, ""
        self.wrong: Exception | None = None
        self._began = time.monotonic()

    def left(self, margin: float) -> float | None:
        """Seconds until so many before the end of the time."""
        return None if self.seconds is None else max(0.1, self.seconds - margin - (time.monotonic() - self._began))

    def put(self, key: str, value: float, note: str = "") -> None:
        self.figures[key] = {"value": float(value)} | ({"note": note} if note else {})
        self._write()

    def miss(self, reason: object, *keys: str) -> None:
        """These figures cannot be had; those that are known already stay."""
        why = " ".join(str(reason).split())[:200] or type(reason).__name__
        for key in keys:
            self.figures.setdefault(key, {"why": why})
        self._write()

    def lose(self, error: Exception, *keys: str) -> None:
        """These figures could not be measured: the machine lacks what they ask for, or else something is wrong. Others
        may go well.
        """
        import torch

        self.miss(error, *keys)
        if not isinstance(error, (UserError, torch.OutOfMemoryError)):
            self.wrong = self.wrong or error

    def _write(self) -> None:
        """The file is whole at every moment."""
        scratch = self.path.with_suffix(".new")
        scratch.write_text(json.dumps(self.figures))
        os.replace(scratch, self.path)


def described() -> list[Mapping[str, object]]:
    """All parts and figures as plain data, for the JSON file."""
    return [asdict(part) for part in PARTS.values()]
