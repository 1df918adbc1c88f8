"""`megatron-dlm tracerl`: trajectory-aware reinforcement learning, and the methods that it is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from megatron_dlm.commands.common import (
    keep_settings,
    longest_prompt,
    longest_response,
    nothing_left,
    open_outputs,
    open_report,
    prepare_process,
    read_prompts,
    running,
    together,
)
from megatron_dlm.commands.dry_run import dry_run, rl_plan
from megatron_dlm.commands.models import open_models
from megatron_dlm.commands.weights import checkpointer, complete, restore
from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.flags import parse
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.sections import pick
from megatron_dlm.config.validate_curriculum import check_curriculum
from megatron_dlm.config.validate_reward import check_judge, check_shaping
from megatron_dlm.config.validate_rl import check_rl, check_trajectory
from megatron_dlm.config.validate_rollout import check_rollout_layout
from megatron_dlm.config.validate_training import (
    check_checkpoint,
    check_eval,
    check_logging,
    check_optimizer,
    check_reward,
    check_rollout,
    check_run,
    check_stop_tokens,
    check_tokenizer,
)
from megatron_dlm.config.validate_value import check_value

SECTIONS = (
    "model",
    "parallel",
    "tokenizer",
    "rl",
    "curriculum",
    "value",
    "rollout",
    "reward",
    "eval",
    "optimizer",
    "checkpoint",
    "logging",
    "run",
)


def main(argv: list[str]) -> None:
    config = parse("tracerl", pick(*SECTIONS), argv)
    rl, rollout, evaluation, words, run = (config[name] for name in ("rl", "rollout", "eval", "tokenizer", "run"))
    reward, value, curriculum = (config[name] for name in ("reward", "value", "curriculum"))
    check_optimizer(config["optimizer"])
    check_checkpoint(config["checkpoint"])
    check_logging(config["logging"])
    check_run(run)
    check_tokenizer(words)
    check_reward(reward)
    check_judge(reward)
    check_value(value, rl.num_rollout)
    if run.dry_run:
        return dry_run(config, check_with_model, rl_plan(config, updates_of(rl, rollout)))
    prepare_process()
    complete(config)
    from megatron_dlm.data.mixture import check_mixture
    from megatron_dlm.evaluation.evaluate import Evaluator
    from megatron_dlm.rewards.code_options import CodeOptions
    from megatron_dlm.rewards.endpoint import open_endpoint
    from megatron_dlm.rewards.scorers import check_verifiers, make_scorer
    from megatron_dlm.rl.earnings import open_earnings
    from megatron_dlm.rl.trainer import STAGE, TraceRLTrainer
    from megatron_dlm.rollout.attention.backends import check_attention
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.rollout.sglang.check import check_backend
    from megatron_dlm.training.pace import Pace
    from megatron_dlm.training.setup import Session
    from megatron_dlm.training.sleep import sleep

    with running():
        session = Session.open(config["model"], config["parallel"], words, run.seed)
        check_with_model(config, session.model, session.groups.world_size)
        tensor_size = rollout.rollout_tensor_model_parallel_size or config["parallel"].tensor_model_parallel_size
        together(lambda: check_backend(rollout, session.model, tensor_size))
        together(lambda: check_attention(rollout, session.model))
        check_stop_tokens(rollout, session.tokenizer.vocab_size, session.tokenizer.mask_id)
        prompts, found = read_prompts(rl.prompt_data, session, words, rollout.rollout_max_prompt_len)
        for flag in ("rollout_batch_size", "over_sampling_batch_size"):
            if len(prompts) < (getattr(rollout, flag) or 0):
                raise ConfigError(
                    f"{flag_name(flag)} {getattr(rollout, flag)} is more than the {len(prompts)} prompts there are. "
                    "Lower it, or give more prompts."
                )
        if curriculum.prompt_weights:
            found_in = Counter(prompt.source for prompt in prompts)
            sizes = {source: found_in[source] for source in rl.prompt_data}
            check_mixture(sizes, curriculum.prompt_weights, rollout.rollout_batch_size)
        held_out = []
        if evaluation.eval_interval is not None:
            held_out, others = read_prompts(evaluation.eval_prompt_data, session, words, rollout.rollout_max_prompt_len)
            found += f"; for evaluation {others}"
        check_verifiers(reward.reward, prompts + held_out, reward.judge_url)
        code = CodeOptions.of(reward)
        isolation = together(lambda: code.check(prompts + held_out, reward.reward))
        endpoint = together(lambda: open_endpoint(reward))
        longest = rollout.rollout_max_response_len
        earnings = together(lambda: open_earnings(reward, session.tokenizer, rl, longest, endpoint))
        per_step = updates_of(rl, rollout)
        open_outputs(config, session.groups.is_main)
        with open_report(config["logging"], session.groups.is_main, config) as report:
            state = session.train_state(config["optimizer"], rl.num_rollout * per_step)
            report.say(f"{found}; {session.describe(state)}")
            if isolation:
                report.say(isolation)
            restored = restore(state, config["checkpoint"], session.model, STAGE)
            if nothing_left(report, restored.get("rl_step", 0), rl.num_rollout):
                return
            models = open_models(config, session, state, per_step, restored, report.say)
            if rl.offload_train and rl.offload_rollout:  # the KV cache is sized by the memory that it finds free
                for one in (state, models.value):
                    if one is not None:
                        sleep(one)
            rig = RolloutRig.open(
                session, state, rollout, longest_prompt(prompts, held_out), longest_response(rollout, evaluation)
            )
            scorer = make_scorer(reward.reward, reward.reward_workers, reward.reward_timeout, endpoint, code)
            with scorer, earnings:
                trainer = TraceRLTrainer(
                    session,
                    state,
                    rig,
                    scorer,
                    prompts,
                    rl,
                    rollout,
                    run.seed,
                    restored,
                    models=models,
                    value=value,
                    curriculum=curriculum,
                    reward=reward,
                    earnings=earnings,
                )
                resume_rollouts(trainer.supply, config["checkpoint"], restored, report.say)
                keep_settings(config, session.groups.is_main)
                evaluator = (
                    Evaluator(rig, scorer, session.tokenizer, held_out, evaluation, rollout, run.seed)
                    if held_out
                    else None
                )

                def evaluate(step: int) -> dict[str, float]:
                    if step % evaluation.eval_interval != 0:
                        return {}
                    with trainer.turns.phase("eval"):
                        return evaluator(report, step)

                supply, where = trainer.supply, config["checkpoint"]
                save = checkpointer(
                    session, state, where, STAGE, trainer.progress, report.say, supply.files, models.value
                )
                pace = Pace(run, save, report.say)
                logging = config["logging"]
                trainer.run(report, pace, evaluate if evaluator else None, logging.log_interval, logging.log_memory)


def check_with_model(config: dict[str, Any], model: ModelConfig, world_size: int) -> None:
    """Refuse what does not fit the resolved model, or this number of processes."""
    rl, rollout, reward = (config[name] for name in ("rl", "rollout", "reward"))
    check_rollout_layout(config["parallel"], model, rollout, world_size)
    check_rollout(rollout, model)
    check_rl(rl, rollout, model)
    check_trajectory(rl, config["value"].use_value_model, reward.process_reward is not None)
    check_curriculum(config["curriculum"], rl, rollout)
    check_shaping(reward, rollout)
    check_eval(config["eval"], rollout, model)


def updates_of(rl: RLConfig, rollout: RolloutConfig) -> int:
    """Updates in an RL step that learns from all its responses."""
    responses = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    return rl.num_steps_per_rollout or -(-responses // rl.global_batch_size)


def resume_rollouts(supply, checkpoint: CheckpointConfig, restored: dict, say: Callable[[str], None]) -> None:
    """Take up what the run had in work when it was saved. Collective. `supply`: of the trainer."""
    from megatron_dlm.checkpoint import places
    from megatron_dlm.rl import kept

    if supply.rates is not None and restored.get("pass_rates"):
        together(lambda: supply.rates.restore(places.find(checkpoint.load, checkpoint.ckpt_step)))
    if not restored.get("kept_groups"):
        return
    anew = supply.restore(together(lambda: kept.read(places.find(checkpoint.load, checkpoint.ckpt_step))))
    if anew:
        say(f"{anew} of the prompts in work start anew, for they or the settings of the rollout are others now.")
