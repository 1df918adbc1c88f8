"""How a job is spread over devices and what a step of it has to do, as plain numbers. Nothing is built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.diffusion.planner import row_multiple
from megatron_dlm.planning.precision import BF16, Precision


@dataclass(frozen=True, slots=True)
class Layout:
    """World size and parallel sizes, as config/parallel.py has them.

    Ranks are laid out tensor, context, (expert,) data, pipeline, the fastest first (parallel/groups.py): so tensor- and
    context-parallel groups are neighbours, and pipeline stages stand world / pp ranks apart.

    Attributes:
        etp: ranks that share an expert; the tensor-parallel size where it is None.
        vpp: virtual stages per pipeline rank.
        overlap: gradients are reduced, and parameters gathered, while other work runs.
        recompute: what the backward pass computes again.
        rollout_tp: tensor-parallel size of the engine; that of training where it is None. Its expert-parallel size is
            1: each engine has all experts.
        precision: what the trained layers are made of and multiply in; engines run plain layers.
        rollout_fp8: engines keep the matrices of their layers in FP8, and multiply in it (--rollout-weights fp8).
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    rollout_tp: int | None = None
    precision: Precision = BF16
    rollout_fp8: bool = False

    @property
    def data(self) -> int:
        """Ranks that get rows of their own."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters (context-parallel ones included)."""
        return self.data * self.cp

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.ep * self.expert_tp * self.pp)

    @property
    def engine_tp(self) -> int:
        return self.rollout_tp or self.tp

    @property
    def engines(self) -> int:
        return self.world // self.engine_tp

    def row_multiple(self, attention: str) -> int:
        """Lengths of rows are multiples of this. attention: of `Workload`."""
        return row_multiple(self.tp, self.precision.token_multiple, attention)

    def check(self, model: ModelConfig) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: sizes that do not divide the job or the model.
        """
        sizes = dict(
            world=self.world, tp=self.tp, pp=self.pp, cp=self.cp, ep=self.ep, etp=self.expert_tp, vpp=self.vpp,
            rollout_tp=self.engine_tp,
        )  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"layout: {name} is {size}. It must be 1 or more.")
        for group, size in (
            ("tp x cp x pp", self.tp * self.cp * self.pp),
            ("ep x etp x pp", self.ep * self.expert_tp * self.pp),
            ("rollout_tp", self.engine_tp),
        ):
            if self.world % size:
                raise ConfigError(f"{self.world} devices cannot be divided into groups of {group} = {size}.")
        for what, count, size, name in (
            ("layers", model.num_layers, self.pp * self.vpp, "pp x vpp"),
            ("attention heads", model.num_attention_heads, self.tp, "tp"),
            ("key/value heads", model.num_query_groups, self.tp, "tp"),
            ("key/value heads", model.num_query_groups, self.engine_tp, "rollout_tp"),
            ("experts", model.num_experts or 1, self.ep, "ep"),
        ):
            if count % size:
                raise ConfigError(f"{name} {size} does not divide the {count} {what} of this model.")
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(f"vpp {self.vpp} needs 2 pipeline stages or more, not 1.")
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError("sequence parallelism needs tp of 2 or more, not 1.")


def lengths(mean: float, longest: int, spread: float = 0.6, count: int = 64) -> tuple[int, ...]:
    """Typical lengths of responses: `count` evenly placed quantiles of a log-normal distribution, cut at the longest,
    scaled so that their mean is `mean`.

    Args:
        spread: standard deviation of the logarithm. 0.6 is ours: the longest tenth is then about 2.5 times the mean.

    Raises:
        ConfigError: a mean above the longest.
    """
    if not 0 < mean <= longest:
        raise ConfigError(f"responses cannot have {mean} tokens on average and {longest} at most.")
    from statistics import NormalDist

    normal = NormalDist()
    shape = np.exp(spread * np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)]))
    low, high = 0.0, longest / shape[0]
    for _ in range(100):  # the scale at which the cut lengths have the mean
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(shape * scale, longest).mean() < mean else (low, scale)
    return tuple(int(x) for x in np.maximum(1, np.minimum(np.rint(shape * high), longest)))


@dataclass(frozen=True, slots=True)
class Workload:
    """What a step has to do.

    Attributes:
        prompts, samples: of a step; responses per prompt.
        prompt_length: tokens of a prompt.
        responses: lengths in tokens, equally likely; `lengths` makes them from a mean and a longest.
        block_size: attention and decoding block.
        steps_per_block: denoising steps that a block takes on average; with a block of 4 and 2 steps, a step unmasks 2
            tokens. A trace is learned in as many noisy copies of each block.
        updates: optimizer steps per RL step. learned: share of the responses that is learned from.
        row_budget: most tokens of a row (--max-tokens-per-row).
        attention: the training kernel's work: 'flex' computes the pairs that see each other (there are few others in
            its tiles), 'dense' whole squares, one per group of a row.
        together: all rows of a response on one data-parallel rank (needed by a value model).
        old_logprobs: 'recomputed' passes over all updates but the first again.
        reference, value_model: whether there is a frozen reference, and a value model.
        triton_head: whether the loss head has kernels (--loss-head).
        rollout: whether responses are generated; without, texts are given (supervised fine-tuning).
        max_running: responses in flight per engine.
        itemsize: bytes of a parameter and of an activation.
        seed: of the lengths that are drawn.
    """

    prompts: int = 128
    samples: int = 32
    prompt_length: int = 256
    responses: tuple[int, ...] = field(default_factory=lambda: lengths(600, 2000))
    block_size: int = 4
    steps_per_block: float = 2.0
    updates: int = 1
    learned: float = 1.0
    row_budget: int = 16384
    attention: Literal["flex", "dense"] = "flex"
    together: bool = False
    old_logprobs: Literal["recomputed", "rollout", "current"] = "recomputed"
    reference: bool = False
    value_model: bool = False
    triton_head: bool = False
    rollout: bool = True
    max_running: int = 256
    itemsize: int = 2
    seed: int = 0

    @property
    def responses_learned(self) -> int:
        return max(1, round(self.prompts * self.samples * self.learned))

    @property
    def responses_per_update(self) -> int:
        return math.ceil(self.responses_learned / self.updates)

    @property
    def mean_response(self) -> float:
        return float(np.mean(self.responses))

    @property
    def tokens_generated(self) -> float:
        return self.prompts * self.samples * self.mean_response


def supervised(texts: int, prompt_length: int, responses: tuple[int, ...], **changes) -> Workload:
    """One update of supervised fine-tuning: each text with one noisy copy per block."""
    plain = dict(
        prompts=texts, samples=1, prompt_length=prompt_length, responses=responses, steps_per_block=1.0, rollout=False,
        old_logprobs="current",
    )  # fmt: skip
    return Workload(**{**plain, **changes})
