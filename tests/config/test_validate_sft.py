from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.config.sft_objective import with_objective
from megatron_dlm.config.validate_sft import check_sft
from tests.config.test_validate_training import MODEL, expect, run

FULL = dataclasses.replace(MODEL, block_size=None, full_attention=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(data_path=[]), ["--data-path names no training file"]),
        (dict(train_iters=0), ["--train-iters is 0"]),
        (dict(global_batch_size=0), ["--global-batch-size is 0"]),
        (dict(max_tokens_per_row=0), ["--max-tokens-per-row is 0"]),
        (dict(seq_length=0), ["--seq-length is 0"]),
        (dict(seq_length=4096), None),
        (dict(seq_length=4097), ["--seq-length 4097", "4096 (--max-position-embeddings)"]),
        (dict(min_mask_ratio=0.0), ["--min-mask-ratio is 0.0", "above 0 to 1"]),
        (dict(min_mask_ratio=1.0), None),
        (dict(min_mask_ratio=1.1), ["--min-mask-ratio is 1.1"]),
        (dict(max_mask_ratio=1.1), ["--max-mask-ratio is 1.1"]),
        (dict(min_mask_ratio=0.5, max_mask_ratio=0.4), ["--min-mask-ratio 0.5 is above --max-mask-ratio 0.4"]),
        (dict(min_mask_ratio=0.5, max_mask_ratio=0.5, mask_ratio_per="token"), None),
        (dict(max_loss_weight=0.5), ["--max-loss-weight is 0.5"]),
        (dict(num_workers=2), ["--num-workers is 2"]),
        (dict(mask_draws=0), ["--mask-draws is 0"]),
        (dict(mask_draws=3, complementary_masks=True, mask_at_least_one=True, mask_ratio_warmup_iters=5), None),
        (dict(mask_ratio_warmup_iters=-1), ["--mask-ratio-warmup-iters is -1"]),
        (dict(sft_objective="semi_ar", min_mask_ratio=0.95), ["--min-mask-ratio 0.95 is above --max-mask-ratio 0.9"]),
        (dict(sft_objective="trace", shrinkage=2, confidence_coef=0.1, ar_loss_coef=0.5), None),
        (dict(sft_objective="trace", mask_draws=2), ["--mask-draws 2 does nothing with --sft-objective trace"]),
        (dict(sft_objective="ar", complementary_masks=True), ["--complementary-masks True does nothing"]),
        (dict(sft_objective="ar", confidence_coef=1.0), ["--confidence-coef 1.0 does nothing"]),
        (dict(sft_objective="ar", ar_loss_coef=1.0), ["--ar-loss-coef", "Leave it out"]),
        (dict(ar_loss_coef=-1.0), ["--ar-loss-coef is -1"]),
        (dict(shrinkage=2), ["--shrinkage 2 does nothing with --sft-objective elbo", "use trace"]),
        (dict(sft_objective="semi_ar", slice_size=8), ["--slice-size 8 is for models of full attention"]),
        (dict(canvas_length=64), ["--canvas-length 64 is for models of full attention"]),
        (dict(sft_objective="trace", noise_prompt=True), ["--noise-prompt"]),
        (dict(block_size_schedule=["1:5", "4"]), None),
        (dict(block_size_schedule=["1:5", "4"], train_iters=5), ["after 5 steps, and --train-iters is 5"]),
        (dict(block_size_schedule=["1:5", "8"]), ["--block-size-schedule 1:5 8 ends in blocks of 8"]),
    ],
)
def test_sft(values, words):
    expect(run(check_sft, SFTConfig(**{"data_path": ["a.jsonl"], **values}), MODEL, ParallelConfig()), words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(sft_objective="semi_ar", slice_size=8, canvas_length=64), None),
        (dict(sft_objective="random_masking", slice_size=8), ["--slice-size 8 does nothing", "use semi_ar"]),
        (dict(block_size_schedule=["1:5", "full"]), ["--block-size-schedule", "full attention"]),
    ],
)
def test_sft_under_full_attention(values, words):
    expect(run(check_sft, SFTConfig(**{"data_path": ["a.jsonl"], **values}), FULL, ParallelConfig()), words)


def test_an_objective_fills_what_the_user_did_not_say():
    elbo, given = with_objective(SFTConfig()), with_objective(SFTConfig(sft_objective="semi_ar", max_mask_ratio=0.7))
    assert (elbo.mask_ratio_per, elbo.min_mask_ratio, elbo.max_mask_ratio) == ("block", 1e-3, 1.0)
    assert (given.mask_ratio_per, given.min_mask_ratio, given.max_mask_ratio) == ("token", 0.1, 0.7)
    assert (elbo.max_loss_weight, given.max_loss_weight) == (10.0, 1.0)


def test_full_attention_for_a_while_goes_with_whole_rows():
    sft = SFTConfig(data_path=["a.jsonl"], block_size_schedule=["full:5", "4"])
    shared = ParallelConfig(context_parallel_size=2)
    expect(run(check_sft, sft, MODEL, ParallelConfig()), None)
    expect(run(check_sft, sft, MODEL, shared), ["--context-parallel-size 2", "--block-size-schedule"])
