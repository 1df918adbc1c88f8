"""What both sides of benchmarks/rollout.py are given: one model's weights, one list of requests, one way of drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.plain_loop import Decoding, Shape, Uniform
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.model.presets import PRESETS

SIZES: dict[str, dict[str, object]] = {
    "12m": dict(
        num_layers=6,
        hidden_size=384,
        ffn_hidden_size=1024,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=64,
        vocab_size=4096,
        rotary_base=1e4,
    ),
    "12m-deep": dict(  # as many layers as SDAR-1.7B
        num_layers=28,
        hidden_size=192,
        ffn_hidden_size=512,
        num_attention_heads=3,
        num_query_groups=1,
        kv_channels=64,
        vocab_size=4096,
        rotary_base=1e4,
    ),
    "70m": dict(
        num_layers=8,
        hidden_size=768,
        ffn_hidden_size=2304,
        num_attention_heads=12,
        num_query_groups=4,
        kv_channels=64,
        vocab_size=8192,
        rotary_base=1e4,
    ),
    "1.7b": PRESETS["sdar-1.7b"],
    "4b": PRESETS["sdar-4b"],
    "8b": PRESETS["sdar-8b"],
}
"""Models by name: three that a CPU can be asked to run, and SDAR's."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is generated.

    Attributes:
        model: sizes and precision. head_scale: how sure it is (common.draw_weights).
        prompts, samples: groups, and responses of each.
        prompt_lengths: shortest and longest prompt, in tokens.
        sampling: by the name of the way of unmasking.
    """

    model: ModelConfig
    head_scale: float
    prompts: int
    samples: int
    prompt_lengths: tuple[int, int]
    sampling: dict[str, SamplingParams]
    seed: int

    @property
    def longest(self) -> int:
        """Tokens of the longest text, its terminal block included."""
        sampling = next(iter(self.sampling.values()))
        block = sampling.block_size
        return -(-(self.prompt_lengths[1] + sampling.max_new_tokens) // block) * block

    def prompt_length(self, n: int) -> int:
        """Of the n-th prompt: spread so evenly that every 2nd, 4th, 8th prompt are about as long on average as all."""
        shortest, longest = self.prompt_lengths
        return shortest + int(n * 2**0.5 % 1 * (longest - shortest + 1))


def small_case(job: Job) -> Job:
    """The same ways of unmasking with a small model in float64, in which tokens can be compared one by one."""
    model = dataclasses.replace(
        job.model,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=64,
        make_vocab_size_divisible_by=64,
        bf16=False,
        fp64=True,
    )
    sampling = {
        name: dataclasses.replace(one, max_new_tokens=min(one.max_new_tokens, 5 * one.block_size + 1))
        for name, one in job.sampling.items()
    }
    block = next(iter(sampling.values())).block_size
    # At this scale some confidences are above a usual threshold and some are not.
    return dataclasses.replace(
        job, model=model, head_scale=4.0, prompts=5, samples=2, prompt_lengths=(1, 4 * block), sampling=sampling
    )


def random_model(session, head_scale: float):
    """A BlockDiffusionModel on this process's device with the weights of `draw_weights`, for a `Session`."""
    from benchmarks.common import draw_weights
    from megatron_dlm import platform
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config

    config = transformer_config(session.model, session.parallel)
    with platform.cuda_calls_on_cpu():
        model = BlockDiffusionModel(config, model_shape(session.model), session.groups.pg_collection)
    return draw_weights(model.to(platform.device()).requires_grad_(False).eval(), 0, 1, head_scale)


def requests_of(job: Job, remasking: str) -> list:
    """All requests of a job, the responses to a prompt one after the other."""
    from benchmarks.common import random_prompts
    from megatron_dlm.rollout import replicas

    prompts = random_prompts(job.prompts, job.prompt_length, job.model.vocab_size, job.seed)
    return replicas.requests_for(prompts, job.samples, job.sampling[remasking], replicas.Job(job.seed, 0))


def shape_of(model, vocab_size: int) -> Shape:
    """The sizes of a BlockDiffusionModel, as the plain model wants them.

    Args:
        vocab_size: real tokens.
    """
    config = model.config
    return Shape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=vocab_size,
        rotary_base=model.rotary_pos_emb.base,
        epsilon=config.layernorm_epsilon,
        tied=model.share_embeddings_and_output_weights,
    )


def decoding_of(sampling: SamplingParams, mask_id: int) -> Decoding:
    """The same way of drawing, in the plain loop's words."""
    return Decoding(
        mask_id=mask_id,
        max_new_tokens=sampling.max_new_tokens,
        block_size=sampling.block_size,
        denoising_steps=sampling.denoising_steps,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        remasking=sampling.remasking,
        threshold=sampling.threshold,
        stop_token_ids=() if sampling.ignore_eos else sampling.stop_token_ids,
    )


def keyed_uniform(stream: int) -> Uniform:
    """The engine's random numbers for a request, in the form that the plain loop asks for."""
    from megatron_dlm.diffusion.keys import uniforms

    def numbers(position: Tensor, taken: int) -> Tensor:
        return uniforms(stream, position, torch.tensor(taken, device=position.device))

    return numbers


def blocks_of(prompt_lengths: Sequence[int], lengths: Sequence[int], block: int) -> int:
    """Blocks that were denoised for responses of these lengths behind prompts of those."""
    return sum(-(-(prompt + length) // block) - prompt // block for prompt, length in zip(prompt_lengths, lengths))
