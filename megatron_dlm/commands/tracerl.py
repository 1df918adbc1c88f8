"""`megatron-dlm tracerl`: trajectory-aware reinforcement learning, and the methods that it is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from megatron_dlm.commands.common import (
    ended_before,
    isolation_of,
    keep_settings,
    longest_prompt,
    longest_response,
    nothing_left,
    open_outputs,
    open_report,
    prepare_process,
    profiled,
    read_prompts,
    running,
    together,
)
from megatron_dlm.commands.dry_run import dry_run, rl_plan, updates_of
from megatron_dlm.commands.models import open_models
from megatron_dlm.commands.new_mask import check_mask_init, check_mask_token, introduce_mask
from megatron_dlm.commands.weights import checkpointer, complete, restore
from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.flags import parse
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.sections import pick
from megatron_dlm.config.validate_curriculum import check_curriculum
from megatron_dlm.config.validate_fp8 import check_fp8_weights, check_lora_layers
from megatron_dlm.config.validate_lora import check_lora, check_lora_of_model, check_lora_weights
from megatron_dlm.config.validate_profile import check_profile
from megatron_dlm.config.validate_reward import check_judge, check_shaping
from megatron_dlm.config.validate_rl import check_rl, check_sections
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
from megatron_dlm.config.validate_value import check_value, check_value_schedule
from megatron_dlm.config.value import num_updates, policy_updates

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
    "lora",
    "checkpoint",
    "logging",
    "profile",
    "run",
)


def main(argv: list[str]) -> None:
    config = parse("tracerl", pick(*SECTIONS), argv)
    rl, rollout, evaluation, words, run = (config[name] for name in ("rl", "rollout", "eval", "tokenizer", "run"))
    reward, value, curriculum = (config[name] for name in ("reward", "value", "curriculum"))
    check_optimizer(config["optimizer"])
    check_lora(config["lora"])
    check_checkpoint(config["checkpoint"])
    check_mask_init(config["checkpoint"])
    check_lora_weights(config["lora"], config["checkpoint"])
    check_lora_layers(config["lora"], config["parallel"])
    check_fp8_weights(config["parallel"], config["checkpoint"])
    check_logging(config["logging"])
    check_profile(config)
    check_run(run)
    check_tokenizer(words)
    check_reward(reward)
    check_judge(reward)
    check_value(value, rl.num_rollout)
    if run.dry_run:
        return dry_run(config, check_with_model, rl_plan)
    prepare_process()
    complete(config)
    from megatron_dlm.checkpoint import places
    from megatron_dlm.evaluation.evaluate import Evaluator
    from megatron_dlm.rewards.code_options import CodeOptions
    from megatron_dlm.rewards.endpoint import open_endpoint
    from megatron_dlm.rewards.scorers import check_verifiers, make_scorer
    from megatron_dlm.rl.earnings import open_earnings
    from megatron_dlm.rl.trainer import STAGE, TraceRLTrainer
    from megatron_dlm.rollout.requirements import check_engine_here
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.rollout.sglang.check import check_backend
    from megatron_dlm.training.pace import Pace
    from megatron_dlm.training.setup import Session
    from megatron_dlm.training.sleep import state_to_come

    with running():
        session = Session.open(config["model"], config["parallel"], words, run.seed)
        check_with_model(config, session.model, session.groups.world_size)
        check_mask_token(config["checkpoint"], session.tokenizer)
        tensor_size = rollout.rollout_tensor_model_parallel_size or config["parallel"].tensor_model_parallel_size
        together(lambda: check_backend(rollout, session.model, tensor_size))
        together(lambda: check_engine_here(rollout, session.model))
        check_stop_tokens(rollout, session.tokenizer.vocab_size, session.tokenizer.mask_id)
        prompts, found = read_prompts(rl.prompt_data, session, words, rollout.rollout_max_prompt_len)
        check_prompts(prompts, rl, rollout, curriculum)
        held_out = []
        if evaluation.eval_interval is not None:
            held_out, others = read_prompts(evaluation.eval_prompt_data, session, words, rollout.rollout_max_prompt_len)
            found += f"; for evaluation {others}"
        check_verifiers(reward.reward, prompts + held_out, reward.judge_url)
        code = CodeOptions.of(reward)
        isolation = isolation_of(code, prompts + held_out, reward.reward)
        endpoint = together(lambda: open_endpoint(reward))
        longest = rollout.rollout_max_response_len
        earnings = together(lambda: open_earnings(reward, session.tokenizer, rl, longest, endpoint))
        per_step = updates_of(rl, rollout)
        open_outputs(config, session.groups.is_main)
        with open_report(config["logging"], session.groups.is_main, config) as report:
            updates = policy_updates(value, rl.num_rollout, per_step)
            state = session.train_state(config["optimizer"], updates, config["lora"], run.seed)
            report.say(f"{found}; {session.describe(state)}")
            if isolation:
                report.say(isolation)
            restored = restore(state, config["checkpoint"], session.model, STAGE)
            if nothing_left(report, restored.get("rl_step", 0), rl.num_rollout) or ended_before(report, run, restored):
                return
            introduce_mask(state, config["checkpoint"], session, run.seed, report.say)
            models = open_models(config, session, state, per_step, restored, report.say)
            rig = RolloutRig.open(
                session,
                state,
                rollout,
                longest_prompt(prompts, held_out),
                longest_response(rollout, evaluation),
                spoken_for=0 if models.value is None else state_to_come(models.value),
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
                if curriculum.pass_rates is not None and not restored:
                    earlier = curriculum.pass_rates
                    flag = "--pass-rates"
                    together(lambda: trainer.supply.rates.begin_with(places.find(earlier, flag=flag), flag))
                    report.say(f"{len(trainer.supply.rates)} pass rates of prompts come from {earlier}")
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
                progress = lambda: {**trainer.progress(), **pace.progress()}
                save = checkpointer(session, state, where, STAGE, progress, report.say, supply.files, models.value)
                pace = Pace(run, save, report.say)
                logging = config["logging"]
                every, memory = logging.log_interval, logging.log_memory
                with profiled(config, session.groups, report.say):
                    trainer.run(report, pace, evaluate if evaluator else None, every, memory)


def check_with_model(config: dict[str, Any], model: ModelConfig, world_size: int) -> None:
    """Refuse what does not fit the resolved model, or this number of processes."""
    rl, rollout, reward, value = (config[name] for name in ("rl", "rollout", "reward", "value"))
    curriculum = config["curriculum"]
    check_rollout_layout(config["parallel"], model, rollout, world_size)
    check_rollout(rollout, model)
    check_rl(rl, rollout, model)
    check_sections(rl, value, reward, curriculum)
    check_curriculum(curriculum, rl, rollout)
    check_lora_of_model(config["lora"], model, rollout)
    check_shaping(reward, rollout)
    check_eval(config["eval"], rollout, model)
    per_step = updates_of(rl, rollout)
    check_optimizer(config["optimizer"], policy_updates(value, rl.num_rollout, per_step))
    check_value_schedule(value, num_updates(value, 0, rl.num_rollout, per_step))


def check_prompts(prompts: Sequence, rl: RLConfig, rollout: RolloutConfig, curriculum: CurriculumConfig) -> None:
    """Refuse RL steps of more prompts than there are, or than a source has, for those of a step are all different."""
    from megatron_dlm.data.mixture import check_mixture

    asked = [flag for flag in ("rollout_batch_size", "over_sampling_batch_size") if getattr(rollout, flag) is not None]
    flag = max(asked, key=lambda name: getattr(rollout, name))
    count = getattr(rollout, flag)
    if len(prompts) < count:
        raise ConfigError(
            f"{flag_name(flag)} {count} is more than the {len(prompts)} prompts there are. Lower it, or give more "
            "prompts."
        )
    if curriculum.prompt_weights:
        found_in = Counter(prompt.source for prompt in prompts)
        sizes = {source: found_in[source] for source in rl.prompt_data}
        check_mixture(sizes, curriculum.prompt_weights, count, flag_name(flag))


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
