"""How large each part of benchmarks/gpu_suite.py is: on an H200, and at the toy sizes that show on a CPU that it works.

Nothing is learned from the figures of the toy sizes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from benchmarks.gpu_training import Traces
from benchmarks.update_worker import Job
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.model.presets import PRESETS

TOY = dict(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=64, make_vocab_size_divisible_by=64, rotary_base=1e4, max_position_embeddings=64, block_size=4,
)  # fmt: skip
_TOY_FLAGS = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --kv-channels 8 "
_TOY_FLAGS += "--vocab-size 64 --device cpu"


@dataclass(frozen=True, slots=True)
class Training:
    """`slices`: numbers of layers that are measured. `layers`: of the real model."""

    model: ModelConfig
    slices: tuple[int, ...]
    layers: int
    traces: Traces
    repeats: int


@dataclass(frozen=True, slots=True)
class Head:
    """`drawn`: tokens that the sampler draws at once."""

    targets: int
    vocabulary: int
    hidden: int
    repeats: int
    drawn: int


@dataclass(frozen=True, slots=True)
class Size:
    """Arguments of the programs that are called (correctness, packed, attention, rollout), and what the others take."""

    name: str
    correctness: str
    packed: str
    attention: str
    rollout: str
    training: dict[str, Training]
    step: Job
    judged_words: int
    step_repeats: int
    head: Head
    curves: ModelConfig
    curve_steps: int
    refit: ModelConfig


def _training(preset: str, slices: tuple[int, ...], traces: Traces) -> Training:
    model = _model(preset)
    return Training(model, slices or (model.num_layers,), model.num_layers, traces, 5)


def _model(preset: str, **changes: object) -> ModelConfig:
    return ModelConfig(**PRESETS[preset] | dict(bf16=True) | changes)


def size_named(name: str) -> Size:
    return {"h200": _h200, "tiny": _tiny}[name]()


def _h200() -> Size:
    traces = Traces(prompts=2, samples=4, prompt=512, response=2048, row=8192)  # about 30,000 tokens in rows
    job = Job(
        _model("sdar-1.7b"),
        head_scale=20.0,
        prompts=16,
        samples=8,
        prompt_length=256,
        rollout=RolloutConfig(rollout_max_response_len=512, threshold=0.6, max_running_requests=128),
        max_tokens_per_row=8192,
        seed=1,
    )
    return Size(
        name="h200",
        correctness="--precision fp32 bf16",
        packed="--bf16 --num-layers 4 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 16 "
        "--num-query-groups 8 --kv-channels 128 --vocab-size 16384 --prompts 2 --samples 4 --prompt-length 256 "
        "--response-length 512 --max-tokens-per-row 8192 --remasking static",
        attention="",
        rollout="--preset 1.7b --prompts 64 --samples 8 --response-length 256 --plain-every 256 --batches 256 "
        "--budgets 8192 --page-sizes 256 --rounds 4 --without --remasking dynamic --repeats 2 --attention-backends "
        "auto --cuda-graphs --weights trained fp8",
        training={
            "8b": _training("sdar-8b", (4, 8), traces),
            "1.7b": _training("sdar-1.7b", (), traces),
            "4b": _training("sdar-4b", (), dataclasses.replace(traces, row=4096)),
        },
        step=job,
        judged_words=300,
        step_repeats=2,
        head=Head(8192, 151936, 4096, 5, 1024),
        curves=ModelConfig(
            **TOY | dict(num_layers=8, hidden_size=512, ffn_hidden_size=1024, num_attention_heads=8,
            kv_channels=64, vocab_size=512, max_position_embeddings=128), bf16=True,
        ),
        curve_steps=200,
        refit=_model("sdar-1.7b"),
    )  # fmt: skip


def _tiny() -> Size:
    toy = ModelConfig(**TOY)
    traces = Traces(prompts=2, samples=2, prompt=7, response=11, row=128)
    training = {name: Training(toy, (1, 2) if name == "8b" else (2,), 2, traces, 1) for name in ("8b", "1.7b", "4b")}
    job = Job(
        toy,
        head_scale=20.0,
        prompts=2,
        samples=2,
        prompt_length=7,
        rollout=RolloutConfig(rollout_max_response_len=11, threshold=0.6, max_running_requests=4),
        max_tokens_per_row=128,
        seed=1,
    )
    return Size(
        name="tiny",
        correctness=_TOY_FLAGS + " --precision fp32",
        packed=_TOY_FLAGS + " --ffn-hidden-size 48 --response-length 11 --prompt-length 7 --repeats 1 "
        "--max-tokens-per-row 128 --remasking static --layouts packed",
        attention="--prompt 32 --response 64 --heads 4 --kv-heads 2 --width 16 --dtype fp32 --repeats 2",
        rollout=_TOY_FLAGS + " --ffn-hidden-size 48 --block-size 4 --prompts 2 --samples 2 --prompt-lengths 3 7 "
        "--response-length 9 --plain-every 2 --batches 4 --budgets 64 --page-sizes 16 --without --threads 1 "
        "--remasking static --repeats 1",
        training=training,
        step=job,
        judged_words=5,
        step_repeats=1,
        head=Head(64, 100, 16, 1, 8),
        curves=toy,
        curve_steps=3,
        refit=toy,
    )
