"""A tiny block-diffusion model in the process of the test, and an attention that needs nothing of ours.

The vocabulary is that of tests/diffusion/oracles.py: 50 ordinary tokens, a mask and a padding token. Weights are drawn
wide and the norms are not ones, so that distributions are far from flat and no gradient is zero by accident.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from tests.diffusion.oracles import MASK_ID, PAD_ID

torch.set_num_threads(1)
EOS_ID = 49
PADDED = 64


@functools.cache
def one_process():
    """The groups of a job of one process."""
    platform.install()
    from megatron_dlm.parallel.groups import initialize

    return initialize(ParallelConfig(), seed=1)


def leave_job() -> None:
    """Ends the job that an earlier test of this process may have begun: commands and plans begin outside of any."""
    if torch.distributed.is_initialized():
        from megatron_dlm.parallel.groups import destroy

        destroy()
        one_process.cache_clear()


def model_config(block_size: int = 4, **changes: object) -> ModelConfig:
    from megatron_dlm.model.shape import resolve

    sizes = dict(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        max_position_embeddings=256,
        rotary_base=1e4,
        make_vocab_size_divisible_by=PADDED,
        init_method_std=0.3,
        block_size=block_size,
    )
    return resolve(ModelConfig(**sizes | changes), PAD_ID + 1)


def vocabulary():
    from megatron_dlm.model.policy import Vocabulary

    return Vocabulary(PAD_ID + 1, MASK_ID)


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object):
    """A model on this process; the same seed gives the same weights."""
    groups = one_process()
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config

    config = model_config(**changes)
    with platform.cuda_calls_on_cpu():
        model = BlockDiffusionModel(
            transformer_config(config, ParallelConfig(), dtype=dtype), model_shape(config), groups.pg_collection
        )
    return disturb(model, seed).to(platform.device())


def make_state(
    dtype: torch.dtype = torch.float64, seed: int = 0, optimizer=None, train_iters: int = 100, **changes: object
):
    """The same model as a TrainState; float64 models have no optimizer."""
    groups = one_process()
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.training.state import TrainState

    config = model_config(**changes)
    megatron = transformer_config(config, ParallelConfig(), dtype=dtype)

    def build(pre_process: bool, post_process: bool, vp_stage: int | None):
        model = BlockDiffusionModel(
            megatron, model_shape(config), groups.pg_collection, pre_process, post_process, vp_stage
        )
        return disturb(model, seed)

    return TrainState.build(build, megatron, optimizer, ParallelConfig(), groups, train_iters)


def sampler_of(samples: list, seed: int, progress: dict | None = None):
    """Samples of fine-tuning in the order of a run, from the place that `progress` of its trainer names."""
    from megatron_dlm.data.sampler import EpochSampler, Position

    return EpochSampler(samples, seed, Position.read("sft", (progress or {}).get("position")))


def disturb(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Redraw all weights from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)
    return model


class ExplicitAttention:
    """Softmax attention under a [T, T] mask, written out."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, _, heads, width = q.shape
        repeat = heads // k.shape[2]
        outputs = []
        for head in range(heads):
            scores = q[:, 0, head] @ k[:, 0, head // repeat].T * scale
            outputs.append(scores.masked_fill(~self.mask, float("-inf")).softmax(-1) @ v[:, 0, head // repeat])
        return torch.stack(outputs, dim=1).reshape(tokens, 1, heads * width)


def explicit_logits(model, tokens: Tensor, position: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
    """Logits [N, padded vocabulary] of one plain text under an explicit mask."""
    from megatron_dlm.model.row_params import RowParams

    where = platform.device()
    params = RowParams(position=position.to(where), slots=slots.to(where), attention=ExplicitAttention(mask.to(where)))
    return model.forward_tokens(tokens.to(where), params)


def allowed_logprobs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [N, 52] of the policy: forbidden columns are left out before the softmax; -inf at the mask."""
    allowed = [token for token in range(PAD_ID + 1) if token != MASK_ID]
    full = torch.full((logits.shape[0], PAD_ID + 1), float("-inf"), dtype=logits.dtype, device=logits.device)
    full[:, allowed] = torch.log_softmax(logits[:, allowed] / temperature, dim=-1)
    return full


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, by name."""
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest ||difference|| / ||gradient|| over the parameters; no gradient may vanish."""
    assert one.keys() == other.keys()
    assert all(value.norm() > 0 for value in other.values()), [
        name for name, value in other.items() if value.norm() == 0
    ]
    return max(((one[name] - other[name]).norm() / other[name].norm()).item() for name in other)


class Words:
    """A tokenizer whose words are the decimal ids."""

    vocab_size, mask_id, pad_id, eos_id = PAD_ID + 1, MASK_ID, PAD_ID, EOS_ID

    def save(self, folder) -> None:
        folder.mkdir()

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        hidden = (MASK_ID, PAD_ID, EOS_ID) if skip_special_tokens else ()
        return " ".join(str(token) for token in ids if token not in hidden)


def make_session(**changes: object):
    """A session over this process, as a command would open it."""
    from megatron_dlm.training.setup import Session

    return Session(model_config(**changes), ParallelConfig(), Words(), one_process(), vocabulary())


def quiet(**settings: object):
    """A report that shows no progress bar."""
    from megatron_dlm.config.log import LoggingConfig
    from megatron_dlm.training.report import Report

    return Report(LoggingConfig(progress_bar=False, **settings), True, {})
