"""What the benchmarks share: models whose weights are a function of their names, whole tensors of sharded ones, traces.

Nothing here needs a tokenizer or a checkpoint. Weights are drawn on the CPU, tensor by tensor, from a generator seeded
by the tensor's name, and rounded to bfloat16: so every device, layout and precision starts from the same numbers.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megatron_dlm import platform
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import Load
from megatron_dlm.diffusion.trace import SamplingParams, Trace

PACKED, PER_STEP, PER_ROUND = LAYOUTS = ("packed", "per step", "per round")  # benchmarks/layouts.py
MATRIX_GAIN = 0.7  # of a weight matrix: standard deviation times the square root of its inputs


@dataclass(frozen=True, slots=True)
class Words:
    """Stands for a tokenizer where texts are random token ids: the last two ids are the mask and the padding."""

    vocab_size: int

    @property
    def mask_id(self) -> int:
        return self.vocab_size - 2

    @property
    def pad_id(self) -> int:
        return self.vocab_size - 1

    @property
    def eos_id(self) -> int:
        return self.vocab_size - 3


def open_session(model: ModelConfig, parallel: ParallelConfig, seed: int = 1):
    """A `Session` for a model of any size. Collective. `model.vocab_size` must be given."""
    from megatron_dlm.model.policy import Vocabulary
    from megatron_dlm.model.shape import resolve
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session

    words = Words(model.vocab_size)
    resolved = resolve(model, words.vocab_size)
    return Session(resolved, parallel, words, initialize(parallel, seed), Vocabulary(words.vocab_size, words.mask_id))


def build_state(session, optimizer: OptimizerConfig | None, updates: int, head_scale: float, trainable: bool = True):
    """A TrainState with the weights of `draw_weights`. Collective.

    Args:
        optimizer: None leaves it out; float64 models have none. trainable: False gives frozen weights, for an engine.

    Attention and loss head are those of a session's own states: on a GPU the kernels that passed their trial.
    """
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.training.state import TrainState

    config, shape = transformer_config(session.model, session.parallel), model_shape(session.model)
    attention, fused_head = session._kernels()

    def build(pre_process: bool, post_process: bool, vp_stage: int | None) -> nn.Module:
        model = BlockDiffusionModel(
            config, shape, session.groups.pg_collection, pre_process, post_process, vp_stage
        ).requires_grad_(trainable)
        model.attention_backend, model.fused_head = attention, fused_head
        return draw_weights(model, session.groups.tp_rank, session.groups.tp_size, head_scale)

    return TrainState.build(build, config, optimizer, session.parallel, session.groups, updates)


def loss_chunk(session, state) -> int:
    """`--loss-chunk-size` where the loss head of the state has kernels, which work on chunks; elsewhere 0: all logits
    at once, which is what they are held against.
    """
    return session.parallel.loss_chunk_size if state.module.fused_head else 0


@torch.no_grad()
def draw_weights(model: nn.Module, tp_rank: int, tp_size: int, head_scale: float) -> nn.Module:
    """Draw all weights anew, the same for plain layers and fused ones; a tensor-parallel rank keeps its shards of the
    whole tensors.

    Args:
        head_scale: standard deviation of the logits; the larger, the surer the model.
    """
    from megatron_dlm.rollout.reshard_plan import canonical
    from megatron_dlm.training.state import global_names

    rename = global_names(model)
    for name, parameter in model.named_parameters():
        dimension = shard_dimension(parameter)
        shape = list(parameter.shape)
        if dimension is not None:
            shape[dimension] *= tp_size
        generator = torch.Generator().manual_seed(zlib.crc32(canonical(rename(name), 0).encode()))
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            whole = 1 + 0.1 * noise
        elif "embedding" in name:
            whole = noise
        else:
            whole = noise * (head_scale if "output_layer" in name else MATRIX_GAIN) / shape[-1] ** 0.5
        parameter.copy_(_shard(whole.bfloat16(), dimension, "linear_fc1" in name, tp_rank, tp_size))
    return model


def shard_dimension(parameter: nn.Parameter) -> int | None:
    """The dimension along which tensor parallelism divides a parameter; None for one that every rank holds whole."""
    if not getattr(parameter, "tensor_model_parallel", False) or parameter.partition_dim < 0:
        return None
    return parameter.partition_dim


def _shard(whole: Tensor, dimension: int | None, gated: bool, rank: int, size: int) -> Tensor:
    if dimension is None or size == 1:
        return whole
    parts = whole.chunk(2, dimension) if gated else (whole,)  # [gate; up]: each half is divided
    return torch.cat([part.chunk(size, dimension)[rank] for part in parts], dimension)


def whole_tensors(state, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the whole model, float64 on the CPU. Collective over the tensor-parallel group.

    Args:
        values: a tensor like it for each parameter of `state.named_parameters()`, by name.
    """
    from megatron_dlm.parallel.exchange import gather_objects

    mine = {name: value.detach().to("cpu", torch.float64, copy=True) for name, value in values.items()}
    shards = gather_objects(mine, state.groups.tp)
    if len(shards) == 1:
        return mine
    merged = {}
    for name, parameter in state.named_parameters():
        dimension, parts = shard_dimension(parameter), [shard[name] for shard in shards]
        if dimension is None:
            merged[name] = parts[0]
        elif "linear_fc1" in name:
            halves = [part.chunk(2, dimension) for part in parts]
            merged[name] = torch.cat([half[n] for n in (0, 1) for half in halves], dimension)
        else:
            merged[name] = torch.cat(parts, dimension)
    return merged


def relative_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest ||difference|| / ||expected|| over tensors of the same names."""
    if found.keys() != expected.keys():
        raise ValueError(f"tensors of different names: {sorted(found.keys() ^ expected.keys())[:4]}")
    # torch's maximum, because Python's would pass over NaN
    return torch.stack([(found[name] - value).norm() / value.norm() for name, value in expected.items()]).max().item()


def random_prompts(count: int, lengths: Callable[[int], int], vocabulary: int, seed: int) -> list[Prompt]:
    """Prompts of random tokens, special ones left out; `lengths` gives the length of the n-th."""
    rng = np.random.default_rng(seed)
    return [
        Prompt(f"p{n:03}", tuple(rng.integers(0, vocabulary - 3, lengths(n)).tolist()), "", "", "none")
        for n in range(count)
    ]


def random_traces(
    prompts: int, samples: int, longest_prompt: int, longest_response: int, block: int, vocabulary: int, rng
) -> list[Trace]:
    """Responses of random tokens of random lengths, every block unmasked in a random order and number of steps."""
    traces = []
    for n in range(prompts):
        prompt = rng.integers(0, vocabulary - 3, int(rng.integers(1, longest_prompt + 1)))
        for sample in range(samples):
            length = int(rng.integers(2, longest_response + 1))
            steps = _random_steps(len(prompt), length, block, rng)
            tokens = rng.integers(0, vocabulary - 3, len(steps))
            traces.append(
                Trace(
                    prompt_ids=prompt,
                    response_ids=tokens[:length],
                    tail_ids=tokens[length:],
                    steps=steps[:length],
                    tail_steps=steps[length:],
                    logprobs=-rng.exponential(1.0, length),
                    sampling_logprobs=np.zeros(length),
                    weight_versions=np.zeros(length, dtype=np.int64),
                    sampling=SamplingParams(block_size=block, denoising_steps=block),
                    prompt_key=f"p{n:03}",
                    sample=sample,
                    finish_reason="stop",
                    num_forwards=int(steps.max()),
                )
            )
    return traces


def _random_steps(prompt_length: int, length: int, block: int, rng) -> np.ndarray:
    """The step at which each token of a response was unmasked, to the end of its last block."""
    steps, taken = [], 0
    while len(steps) < length:
        width = block - (prompt_length + len(steps)) % block
        # Ranks without gaps: every step of a block unmasks something.
        _, order = np.unique(rng.integers(0, width, width), return_inverse=True)
        steps += (taken + 1 + order).tolist()
        taken = max(steps)
    return np.array(steps)


def made_up_advantages(traces: Sequence[Trace]) -> dict[tuple[str, int], float]:
    """An advantage of either sign for every response, a function of what it is."""
    return {
        (trace.prompt_key, trace.sample): float(
            np.cos(1.0 + 2.4 * trace.sample + zlib.crc32(trace.prompt_key.encode()) % 97)
        )
        for trace in traces
    }


def records(traces: Sequence[Trace], grid: Grid, rank: int) -> list:
    """The record of each trace that this rank holds (`rl.exchange.Graded`), as the trainer would make it."""
    from megatron_dlm.rl.exchange import Graded
    from megatron_dlm.rl.methods import TARGET, counts_of, replay

    found = []
    for index, trace in enumerate(traces):
        item = replay(grid).item(trace, 0)
        found.append(
            Graded(
                group=trace.prompt_key,
                sample=trace.sample,
                owner=rank,
                index=index,
                correct=0.0,
                reward=0.0,
                length=len(trace.response_ids),
                steps=trace.num_steps,
                forwards=trace.num_forwards,
                truncated=trace.finish_reason == "length",
                overlong=False,
                judge_failed=False,
                load=Load(item.group, item.shared_length, item.own_length),
                counts=counts_of(item, TARGET),
            )
        )
    return found


def median_seconds(
    work: Callable[..., object], repeats: int, prepare: Callable[[], object] | None = None
) -> tuple[float, object]:
    """Median seconds of calls on this process's device, after two to warm up, and what the last one returned.

    Args:
        prepare: makes, each time anew and untimed, what `work` is given; None gives it nothing.
    """
    seconds, result, given = [], None, ()
    for _ in range(repeats + 2):
        result, given = None, ()  # their memory is there for the next ones
        if prepare is not None:
            given = (prepare(),)
        platform.synchronize()
        start = time.perf_counter()
        result = work(*given)
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]), result


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(cells, widths))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(header), "-" * len(line(["-" * width for width in widths])), *map(line, lines)])
