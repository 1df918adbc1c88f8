"""Every refusal of training, generation and evaluation settings, and the combinations that must pass."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.eval import EvalConfig, TrainingEvalConfig
from megatron_dlm.config.log import LoggingConfig, ReportConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rollout import EngineConfig, RolloutConfig
from megatron_dlm.config.run import TrainingRunConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.config.validate_training import (
    check_checkpoint,
    check_engine,
    check_eval,
    check_logging,
    check_optimizer,
    check_reward,
    check_rollout,
    check_run,
    check_stop_tokens,
    check_tokenizer,
    check_trained,
)

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=4096, vocab_size=1000, block_size=4
)
NO_BLOCK = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4)


def test_the_defaults_pass_once_data_and_update_size_are_given():
    check_optimizer(OptimizerConfig(), 1000)
    check_checkpoint(CheckpointConfig())
    check_logging(LoggingConfig())
    check_tokenizer(TokenizerConfig())
    check_rollout(RolloutConfig(), MODEL)
    check_reward(RewardConfig())
    check_eval(TrainingEvalConfig(), RolloutConfig(), MODEL)
    check_logging(ReportConfig())
    check_engine(EngineConfig(), MODEL)
    check_stop_tokens(EngineConfig(), 1000, 999)
    check_eval(EvalConfig(eval_prompt_data=["a"]), EngineConfig(), MODEL)


def run(check, *arguments):
    """The message of the refusal, or None when the check passes."""
    try:
        check(*arguments)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
        return str(error)
    return None


def expect(message, words):
    """`words` is None where the check must pass."""
    if words is None:
        assert message is None
    else:
        assert message is not None and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(lr=0.0), ["--lr is 0.0", "above 0"]),
        (dict(lr=-1.0), ["--lr is -1.0"]),
        (dict(adam_eps=0.0), ["--adam-eps is 0.0"]),
        (dict(adam_beta1=1.0), ["--adam-beta1 is 1.0", "from 0 to below 1"]),
        (dict(adam_beta1=0.0), None),
        (dict(adam_beta2=-0.1), ["--adam-beta2 is -0.1"]),
        (dict(weight_decay=-0.1), ["--weight-decay is -0.1"]),
        (dict(clip_grad=-1.0), ["--clip-grad is -1.0"]),
        (dict(clip_grad=0.0), None),
        (dict(min_lr=-1e-6), ["--min-lr is -1e-06"]),
        (dict(min_lr=1e-3), ["--min-lr 0.001", "--lr 0.0001"]),
        (dict(min_lr=1e-4), None),
        (dict(sgd_momentum=1.0, optimizer="sgd"), ["--sgd-momentum is 1.0"]),
        (dict(sgd_momentum=0.9), ["--sgd-momentum 0.9", "--optimizer sgd"]),
        (dict(sgd_momentum=0.9, optimizer="sgd"), None),
        (dict(lr_warmup_iters=-1), ["--lr-warmup-iters is -1"]),
        (dict(lr_warmup_iters=100), ["--lr-warmup-iters 100", "the run, 100 steps"]),
        (dict(lr_warmup_iters=99), None),
        (dict(lr_warmup_iters=5, lr_decay_iters=5), ["--lr-warmup-iters 5", "--lr-decay-iters"]),
        (dict(lr_decay_iters=0), ["--lr-decay-iters is 0"]),
        (dict(optimizer_offload_fraction=0.5), ["--optimizer-offload-fraction 0.5", "--optimizer-cpu-offload"]),
        (dict(overlap_cpu_optimizer_d2h_h2d=True), ["--overlap-cpu-optimizer-d2h-h2d", "--optimizer-cpu-offload"]),
        (dict(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5, overlap_cpu_optimizer_d2h_h2d=True), None),
        (dict(optimizer_cpu_offload=True, optimizer_offload_fraction=0.0), ["--optimizer-offload-fraction is 0.0"]),
        (dict(optimizer_cpu_offload=True, optimizer_offload_fraction=1.1), ["--optimizer-offload-fraction is 1.1"]),
    ],
)
def test_optimizer(values, words):
    expect(run(check_optimizer, OptimizerConfig(**values), 100), words)


def test_an_unknown_length_allows_any_warmup():
    check_optimizer(OptimizerConfig(lr_warmup_iters=10**6))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(save_interval=5), ["--save-interval needs --save"]),
        (dict(save_interval=5, save="out"), None),
        (dict(save_interval=0, save="out"), ["--save-interval is 0"]),
        (dict(finetune=True), ["--finetune needs --load"]),
        (dict(finetune=True, load="in"), None),
        (dict(keep_last_n=2), ["--keep-last-n needs --save"]),
        (dict(keep_last_n=0, save="out"), ["--keep-last-n is 0"]),
        (dict(keep_last_n=1, save="out"), None),
        (dict(ckpt_step=2), ["--ckpt-step needs --load"]),
        (dict(ckpt_step=-1, load="in"), ["--ckpt-step is -1"]),
        (dict(ckpt_step=0, load="in"), None),
    ],
)
def test_checkpoint(values, words):
    expect(run(check_checkpoint, CheckpointConfig(**values)), words)


@pytest.mark.parametrize(
    ("model", "optimizer", "parallel", "words"),
    [
        (dict(), dict(), dict(), None),
        (dict(fp64=True), dict(), dict(), ["--fp64 does not work in training"]),
        (dict(), dict(optimizer="sgd"), dict(), None),
        (dict(), dict(), dict(use_distributed_optimizer=True), None),
        (dict(), dict(optimizer="sgd"), dict(use_distributed_optimizer=True), ["--optimizer adam only, not sgd"]),
        (dict(bf16=True), dict(optimizer_cpu_offload=True), dict(use_distributed_optimizer=True), None),
        (dict(bf16=True), dict(optimizer_cpu_offload=True), dict(), ["needs --bf16 and --use-distributed-optimizer"]),
        (dict(), dict(optimizer_cpu_offload=True), dict(use_distributed_optimizer=True), ["needs --bf16"]),
    ],
)
def test_what_is_trained(model, optimizer, parallel, words):
    settings = OptimizerConfig(**optimizer), ParallelConfig(**parallel)
    expect(run(check_trained, dataclasses.replace(MODEL, **model), *settings), words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(), None),
        (dict(exit_interval=1, exit_duration_in_mins=0.1), None),
        (dict(exit_interval=0), ["--exit-interval is 0"]),
        (dict(exit_duration_in_mins=0.0), ["--exit-duration-in-mins is 0.0"]),
        (dict(exit_duration_in_mins=-1.0), ["--exit-duration-in-mins is -1.0"]),
        (dict(dry_run=True), None),
        (dict(dry_run=True, dry_run_world_size=64), None),
        (dict(dry_run=True, dry_run_world_size=0), ["--dry-run-world-size is 0"]),
        (dict(dry_run_world_size=2), ["--dry-run-world-size needs --dry-run"]),
    ],
)
def test_run(values, words):
    expect(run(check_run, TrainingRunConfig(**values)), words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(log_interval=0), ["--log-interval is 0"]),
        (dict(wandb_exp_name="a"), ["--wandb-exp-name needs --wandb-project"]),
        (dict(wandb_save_dir="a"), ["--wandb-save-dir needs --wandb-project"]),
        (dict(wandb_save_dir="a", wandb_exp_name="b", wandb_project="c"), None),
    ],
)
def test_logging(values, words):
    expect(run(check_logging, LoggingConfig(**values)), words)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("Q: {question}\nA: \\boxed{}", None),
        ("Solve it.", ["--prompt-template 'Solve it.'", "{question}"]),
        ("{problem}", ["{question}"]),
    ],
)
def test_tokenizer(template, words):
    expect(run(check_tokenizer, TokenizerConfig(prompt_template=template)), words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(rollout_batch_size=0), ["--rollout-batch-size is 0"]),
        (dict(over_sampling_batch_size=63), ["--over-sampling-batch-size 63", "--rollout-batch-size 64"]),
        (dict(over_sampling_batch_size=64), None),
        (dict(over_sampling_batch_size=65, partial_rollout=True, mask_offpolicy_in_partial_rollout=True), None),
        (dict(partial_rollout=True), ["--partial-rollout", "--over-sampling-batch-size"]),
        (dict(over_sampling_batch_size=64, partial_rollout=True), ["more than --rollout-batch-size 64"]),
        (
            dict(over_sampling_batch_size=65, mask_offpolicy_in_partial_rollout=True),
            ["--mask-offpolicy-in-partial-rollout needs --partial-rollout"],
        ),
        (dict(n_samples_per_prompt=0), ["--n-samples-per-prompt is 0"]),
        (dict(rollout_max_prompt_len=0), ["--rollout-max-prompt-len is 0"]),
        (dict(rollout_max_response_len=0), ["--rollout-max-response-len is 0"]),
        (dict(max_running_requests=0), ["--max-running-requests is 0"]),
        (dict(max_tokens_per_pass=0), ["--max-tokens-per-pass is 0"]),
        (dict(rollout_temperature=-0.1), ["--rollout-temperature is -0.1"]),
        (dict(rollout_temperature=0.0), None),
        (dict(rollout_top_k=-1), ["--rollout-top-k is -1"]),
        (dict(rollout_top_p=0.0), ["--rollout-top-p is 0.0", "above 0 to 1"]),
        (dict(rollout_top_p=1.1), ["--rollout-top-p is 1.1"]),
        (dict(threshold=0.0), ["--threshold is 0.0"]),
        (dict(threshold=1.0), None),
        (dict(threshold=1.5), ["--threshold is 1.5"]),
        (dict(denoising_steps=0), ["--denoising-steps is 0"]),
        (dict(denoising_steps=4), None),
        (dict(denoising_steps=5), ["--denoising-steps 5", "4 tokens of a block", "1 to 4"]),
        (dict(denoising_steps=5, rollout_block_size=8), None),
        (dict(rollout_block_size=0), ["--rollout-block-size is 0"]),
        (dict(rollout_block_size=-4), ["--rollout-block-size is -4"]),
        (dict(rollout_max_response_len=3072), None),
        (
            dict(rollout_max_response_len=3073),
            ["--rollout-max-prompt-len 1024", "--rollout-max-response-len 3073", "4097", "4096"],
        ),
    ],
)
def test_rollout(values, words):
    expect(run(check_rollout, RolloutConfig(**values), MODEL), words)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([0, 998], None),
        ([], None),
        ([-1], ["--stop-token-ids -1", "from 0 to 999"]),
        ([3, 1000], ["--stop-token-ids 1000", "from 0 to 999"]),
        ([999], ["--stop-token-ids 999", "mask"]),
    ],
)
def test_stop_tokens(tokens, words):
    expect(run(check_stop_tokens, EngineConfig(stop_token_ids=tokens), 1000, 999), words)


def test_generation_needs_some_block_size():
    expect(run(check_rollout, RolloutConfig(), NO_BLOCK), ["--block-size or --rollout-block-size"])
    check_rollout(RolloutConfig(rollout_block_size=32), NO_BLOCK)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(reward_workers=0), ["--reward-workers is 0"]),
        (dict(reward_timeout=0.0), ["--reward-timeout is 0.0"]),
    ],
)
def test_reward(values, words):
    expect(run(check_reward, RewardConfig(**values)), words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(eval_interval=5), ["--eval-interval needs --eval-prompt-data"]),
        (dict(eval_interval=5, eval_prompt_data=["a"]), None),
        (dict(eval_prompt_data=["a"]), ["--eval-prompt-data needs --eval-interval"]),
        (dict(eval_prompt_data=[]), ["--eval-prompt-data names no prompt source"]),
        (dict(eval_interval=0, eval_prompt_data=["a"]), ["--eval-interval is 0"]),
        (dict(save_eval_samples="f"), ["--save-eval-samples needs --eval-interval"]),
        (dict(save_eval_samples="f", eval_interval=5, eval_prompt_data=["a"]), None),
        (dict(eval_num_prompts=0), ["--eval-num-prompts is 0"]),
        (dict(n_samples_per_eval_prompt=0), ["--n-samples-per-eval-prompt is 0"]),
        (dict(eval_max_response_len=0), ["--eval-max-response-len is 0"]),
        (dict(eval_max_response_len=4000), ["--eval-max-response-len 4000", "5024", "4096"]),
        (dict(eval_temperature=-1.0), ["--eval-temperature is -1.0"]),
        (dict(eval_top_k=-1), ["--eval-top-k is -1"]),
        (dict(eval_top_p=0.0), ["--eval-top-p is 0.0"]),
        (dict(eval_threshold=1.1), ["--eval-threshold is 1.1"]),
        (dict(eval_remasking=[]), ["--eval-remasking (empty)"]),
        (dict(eval_remasking=["static", "static"]), ["--eval-remasking static static", "once"]),
        (dict(eval_remasking=["static", "dynamic"], eval_interval=5, eval_prompt_data=["a"]), None),
        (dict(eval_denoising_steps=0), ["--eval-denoising-steps is 0"]),
        (dict(eval_entropy_bound=0.0), ["--eval-entropy-bound is 0.0"]),
        (dict(eval_confidence="entropy"), ["--eval-threshold is 0.9", "--eval-confidence"]),
        (dict(eval_confidence="entropy", eval_remasking=["entropy_bounded"]), None),
        (dict(eval_denoising_steps=5), ["--eval-denoising-steps 5", "4 tokens of a block"]),
    ],
)
def test_eval(values, words):
    expect(run(check_eval, TrainingEvalConfig(**values), RolloutConfig(), MODEL), words)


@pytest.mark.parametrize(
    ("values", "engine", "words"),
    [
        (dict(eval_prompt_data=None), {}, ["--eval-prompt-data is not set"]),
        (dict(eval_prompt_data=[]), {}, ["--eval-prompt-data names no prompt source"]),
        ({}, dict(max_running_requests=0), ["--max-running-requests is 0"]),
        ({}, dict(rollout_block_size=-1), ["--rollout-block-size is -1"]),
        ({}, dict(rollout_max_response_len=4000), ["--rollout-max-response-len 4000", "5024", "4096"]),
        (dict(eval_max_response_len=16), dict(rollout_max_response_len=4000), None),
        (dict(eval_denoising_steps=5), {}, ["--eval-denoising-steps 5"]),
        (dict(eval_denoising_steps=5), dict(rollout_block_size=8), None),
    ],
)
def test_evaluation_alone(values, engine, words):
    expect(run(check_eval, EvalConfig(**{"eval_prompt_data": ["a"], **values}), EngineConfig(**engine), MODEL), words)
