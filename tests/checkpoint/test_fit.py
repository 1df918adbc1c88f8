"""Which checkpoints belong to a run."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.checkpoint.fit import check_same_model, check_stage
from megatron_dlm.config.errors import CheckpointError, ConfigError
from megatron_dlm.config.model import ModelConfig

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    rotary_base=1e4,
    norm_epsilon=1e-6,
    vocab_size=270,
    block_size=4,
)
SAVED = {"model": dataclasses.asdict(MODEL), "stage": "sft"}


@pytest.mark.parametrize(("saved", "stage"), [(SAVED, "sft"), ({}, "sft"), ({"stage": "tracerl"}, "tracerl")])
def test_the_same_stage_is_resumed(saved, stage):
    check_stage(saved, stage, "ckpt")


@pytest.mark.parametrize(("there", "here"), [("sft", "tracerl"), ("tracerl", "sft")])
def test_another_stage_needs_finetune(there, here):
    with pytest.raises(ConfigError) as caught:
        check_stage({"stage": there}, here, "ckpt")
    assert str(caught.value) == (
        f"--load ckpt was written by {there}, and this is {here}. Add --finetune to start {here} from its weights."
    )


@pytest.mark.parametrize(("changes", "finetune"), [
    ({}, False),
    (dict(bf16=True, init_method_std=0.1, model_preset="tiny", make_vocab_size_divisible_by=64), False),
    (dict(transformer_overrides={"recompute_granularity": "full"}), False),
    (dict(block_size=8), True),
    (dict(block_size=None, full_attention=True), True),
])  # fmt: skip
def test_what_may_differ(changes, finetune):
    check_same_model(SAVED, dataclasses.replace(MODEL, **changes), "--load ckpt", finetune)


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize(("changes", "words"), [
    (dict(rotary_base=1e6), ["--rotary-base 10000.0", "1000000.0", "Use 10000.0."]),
    (dict(norm_epsilon=1e-5), ["--norm-epsilon 1e-06", "1e-05"]),
    (dict(num_attention_heads=8), ["--num-attention-heads 4", "8"]),
    (dict(num_layers=3, rotary_base=1e6), ["--num-layers 2", "3"]),  # the first that differs
    (dict(rotary_percent=0.5), ["--rotary-percent unset", "0.5"]),
    (dict(logit_shift=1), ["--logit-shift unset", "1"]),
    (dict(num_experts=4), ["--num-experts unset", "4", "Leave it out."]),
    (dict(transformer_overrides={"softmax_scale": 1.0}), ["--transformer-override softmax_scale unset", "1.0"]),
])  # fmt: skip
def test_what_may_not_differ(changes, words, finetune):
    with pytest.raises(CheckpointError) as caught:
        check_same_model(SAVED, dataclasses.replace(MODEL, **changes), "--load ckpt", finetune)
    assert all(word in str(caught.value) for word in ["--load ckpt", *words]), str(caught.value)


def test_a_larger_block_needs_finetune():
    with pytest.raises(CheckpointError, match="--block-size 4, and this one 8. Use 4, or --finetune to go on"):
        check_same_model(SAVED, dataclasses.replace(MODEL, block_size=8), "--load ckpt")


def test_a_checkpoint_that_says_nothing_is_not_compared():
    check_same_model({}, MODEL, "--load ckpt")


def test_an_autoregressive_model_may_drop_its_shift_where_training_begins():
    ahead = dataclasses.replace(MODEL, block_size=1, logit_shift=1)
    saved, wanted = {"model": dataclasses.asdict(ahead)}, dataclasses.replace(MODEL, logit_shift=0)
    check_same_model(saved, wanted, "--load ckpt", finetune=True, converts=True)
    with pytest.raises(CheckpointError, match="--logit-shift 1, and this one 0. Use 1."):
        check_same_model(saved, wanted, "--load ckpt", finetune=True)
    in_blocks = {"model": saved["model"] | {"block_size": 4}}
    with pytest.raises(CheckpointError, match="--logit-shift 1"):
        check_same_model(in_blocks, wanted, "--load ckpt", finetune=True, converts=True)
