"""What cannot work in training, generation and evaluation, refused before anything is built.

The rules of these checks are those of `validate`.
"""

from __future__ import annotations

from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.eval import EvalConfig, TrainingEvalConfig
from megatron_dlm.config.generate import GenerateConfig
from megatron_dlm.config.log import LoggingConfig, ReportConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rollout import EngineConfig, RolloutConfig
from megatron_dlm.config.run import TrainingRunConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.config.validate import (
    above,
    at_least,
    check_temperature,
    fits_positions,
    needs,
    needs_data,
    only_with,
    within,
)
from megatron_dlm.config.validate_fp8 import check_fp8_optimizer
from megatron_dlm.config.validate_rollout import check_capacity
from megatron_dlm.config.validate_sampling import (
    check_decoding_block,
    check_steps_of_block,
    check_unmasking,
    check_window,
)
from megatron_dlm.config.validate_schedule import check_length, check_schedule

LONGEST_JUDGEMENT = 86400  # seconds


def check_optimizer(optimizer: OptimizerConfig, total_iters: int | None = None) -> None:
    """Refuse an optimizer or schedule that cannot work. `total_iters`: optimizer steps of the run, if known."""
    above(optimizer, 0, "lr", "adam_eps")
    within(optimizer, 0, 1, "adam_beta1", "adam_beta2", "sgd_momentum", high_open=True)
    at_least(optimizer, 0, "clip_grad")
    check_schedule(optimizer)
    within(optimizer, 0, 1, "optimizer_offload_fraction", low_open=True)
    if not optimizer.optimizer_cpu_offload:
        for name in ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"):
            only_with(optimizer, name, "--optimizer-cpu-offload")
    if optimizer.sgd_momentum and optimizer.optimizer != "sgd":
        raise ConfigError(
            f"--sgd-momentum {optimizer.sgd_momentum} does nothing with --optimizer "
            f"{optimizer.optimizer}. Leave it out, or use --optimizer sgd."
        )
    check_length(optimizer, total_iters, "the run")


def check_trained(model: ModelConfig, optimizer: OptimizerConfig, parallel: ParallelConfig) -> None:
    """Refuse what the optimizer of a model cannot do in its precision and layout."""
    if model.fp64:
        raise ConfigError(
            "--fp64 does not work in training, whose optimizer computes in float32. Leave it out, or use it with "
            "generate, score or evaluate."
        )
    if parallel.use_distributed_optimizer and optimizer.optimizer != "adam":
        raise ConfigError(
            f"--use-distributed-optimizer works with --optimizer adam only, not {optimizer.optimizer}. Drop one of the "
            "two."
        )
    if optimizer.optimizer_cpu_offload and not (model.bf16 and parallel.use_distributed_optimizer):
        raise ConfigError(
            "--optimizer-cpu-offload needs --bf16 and --use-distributed-optimizer, because it moves the master weights "
            "of bf16 models and their moments. Add both, or leave it out."
        )
    check_fp8_optimizer(parallel, optimizer)


def check_checkpoint(checkpoint: CheckpointConfig) -> None:
    """Refuse checkpoint settings that contradict each other."""
    at_least(checkpoint, 1, "save_interval", "keep_last_n")
    at_least(checkpoint, 0, "ckpt_step")
    needs(checkpoint, "save_interval", "save", "the folder to write to")
    needs(checkpoint, "keep_last_n", "save", "the folder to write to")
    needs(checkpoint, "ckpt_step", "load", "the folder to read from")
    needs(checkpoint, "finetune", "load", "the folder to take the weights from")


def check_run(run: TrainingRunConfig) -> None:
    """Refuse ends of a run that never come."""
    at_least(run, 1, "exit_interval")
    above(run, 0, "exit_duration_in_mins")
    at_least(run, 1, "dry_run_world_size")
    needs(run, "dry_run_world_size", "dry_run", "which alone reckons with it")
    needs(run, "exit_metric", "exit_metric_at_least", "without which it never ends a run")
    needs(run, "exit_metric_at_least", "exit_metric", "whose value it is")


def check_logging(logging: ReportConfig) -> None:
    """Refuse logging settings that would be ignored."""
    if isinstance(logging, LoggingConfig):
        at_least(logging, 1, "log_interval")
    needs(logging, "wandb_exp_name", "wandb_project", "without which nothing is sent")
    needs(logging, "wandb_save_dir", "wandb_project", "without which nothing is sent")


def check_tokenizer(tokenizer: TokenizerConfig) -> None:
    """Refuse a prompt template that loses the question."""
    if "{question}" not in tokenizer.prompt_template:
        raise ConfigError(
            f"--prompt-template {tokenizer.prompt_template!r} does not contain {{question}}. "
            f"Write {{question}} where the question goes."
        )


def check_rollout(rollout: RolloutConfig, model: ModelConfig) -> None:
    """Refuse settings of training rollouts that cannot work with this model."""
    at_least(
        rollout,
        1,
        "rollout_batch_size",
        "n_samples_per_prompt",
        "denoising_steps",
    )
    _check_over_sampling(rollout)
    check_engine(rollout, model)
    check_temperature(rollout, "rollout_temperature")
    at_least(rollout, 0, "rollout_top_k")
    within(rollout, 0, 1, "rollout_top_p", low_open=True)
    check_unmasking(rollout, [rollout.remasking])
    check_steps_of_block(
        rollout.denoising_steps, check_decoding_block(rollout.rollout_block_size, model), "--denoising-steps"
    )
    fits_positions(
        rollout.rollout_max_prompt_len + rollout.rollout_max_response_len,
        f"--rollout-max-prompt-len {rollout.rollout_max_prompt_len} and --rollout-max-response-len "
        f"{rollout.rollout_max_response_len} together",
        model,
    )


def _check_over_sampling(rollout: RolloutConfig) -> None:
    wanted, batch = rollout.over_sampling_batch_size, rollout.rollout_batch_size
    if wanted is not None and wanted < batch:
        raise ConfigError(
            f"--over-sampling-batch-size {wanted} is below --rollout-batch-size {batch}, the prompts that a step has "
            "to complete. Use at least as many, or leave it out."
        )
    if rollout.partial_rollout and (wanted is None or wanted == batch):
        raise ConfigError(
            "--partial-rollout has nothing to keep where a step waits for all its prompts. Give "
            f"--over-sampling-batch-size more than --rollout-batch-size {batch}, or leave it out."
        )
    needs(rollout, "mask_offpolicy_in_partial_rollout", "partial_rollout", "without which no token is older")


def check_engine(engine: EngineConfig, model: ModelConfig) -> None:
    """Refuse what no generation can work with."""
    at_least(engine, 1, "rollout_max_prompt_len", "rollout_max_response_len", "rollout_block_size")
    check_capacity(engine)
    check_decoding_block(engine.rollout_block_size, model)
    check_window(engine, model)


def check_stop_tokens(engine: EngineConfig | GenerateConfig, vocab_size: int, mask_id: int) -> None:
    """Refuse stop tokens that are never generated. `vocab_size`: number of ids of the tokenizer."""
    for token in engine.stop_token_ids or []:
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"--stop-token-ids {token} is not a token of this vocabulary. Use ids from 0 to {vocab_size - 1}."
            )
        if token == mask_id:
            raise ConfigError(f"--stop-token-ids {token} is the mask, which is never generated. Use another id.")


def check_reward(reward: RewardConfig) -> None:
    """Refuse a judge that cannot work."""
    at_least(reward, 1, "reward_workers")
    within(reward, 0, LONGEST_JUDGEMENT, "reward_timeout", low_open=True)


def check_eval(evaluation: EvalConfig, rollout: EngineConfig, model: ModelConfig) -> None:
    """Refuse evaluation settings that cannot work with this rollout and this model; during training, prompts go with an
    interval."""
    if evaluation.eval_prompt_data is not None:
        needs_data(evaluation.eval_prompt_data, "--eval-prompt-data", "prompt source")
    if isinstance(evaluation, TrainingEvalConfig):
        needs(evaluation, "eval_interval", "eval_prompt_data", "the prompts to evaluate on")
        needs(evaluation, "eval_prompt_data", "eval_interval", "how often to evaluate on them")
        needs(evaluation, "save_eval_samples", "eval_interval", "how often to evaluate")
        at_least(evaluation, 1, "eval_interval")
    elif evaluation.eval_prompt_data is None:
        raise ConfigError("--eval-prompt-data is not set. Give the prompts to evaluate on.")
    check_engine(rollout, model)
    at_least(
        evaluation,
        1,
        "eval_num_prompts",
        "n_samples_per_eval_prompt",
        "eval_max_response_len",
        "eval_denoising_steps",
    )
    check_temperature(evaluation, "eval_temperature")
    at_least(evaluation, 0, "eval_top_k")
    within(evaluation, 0, 1, "eval_top_p", low_open=True)
    check_unmasking(evaluation, evaluation.eval_remasking, "eval_")
    if len(set(evaluation.eval_remasking)) != len(evaluation.eval_remasking) or not evaluation.eval_remasking:
        raise ConfigError(
            f"--eval-remasking {' '.join(evaluation.eval_remasking) or '(empty)'} must name each way "
            "once. Use one or more of static, dynamic, sequential and entropy_bounded."
        )
    blocks = evaluation.eval_block_size
    if blocks is not None and (not blocks or len(set(blocks)) != len(blocks) or min(blocks) < 1):
        raise ConfigError(
            f"--eval-block-size {' '.join(map(str, blocks)) or '(empty)'} must name each block once, each 1 or more."
        )
    if blocks is not None and rollout.rollout_backend == "sglang":
        raise ConfigError(
            "--eval-block-size does not work with --rollout-backend sglang, which decodes in blocks of one size. Leave "
            "it out, or evaluate with --rollout-block-size."
        )
    for block in blocks or [rollout.rollout_block_size]:
        check_steps_of_block(
            evaluation.eval_denoising_steps, check_decoding_block(block, model), "--eval-denoising-steps"
        )
    own = evaluation.eval_max_response_len
    length = rollout.rollout_max_response_len if own is None else own
    fits_positions(
        rollout.rollout_max_prompt_len + length,
        f"--rollout-max-prompt-len {rollout.rollout_max_prompt_len} and "
        f"--{'rollout' if own is None else 'eval'}-max-response-len "
        f"{length} together",
        model,
    )
