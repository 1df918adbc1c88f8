"""`megatron-dlm tracerl`: trajectory-aware reinforcement learning."""

from __future__ import annotations

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
)
from megatron_dlm.commands.weights import checkpointer, complete, restore
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.flags import parse
from megatron_dlm.config.sections import pick
from megatron_dlm.config.validate import check_rollout_layout
from megatron_dlm.config.validate_training import (
    check_checkpoint,
    check_eval,
    check_logging,
    check_optimizer,
    check_reward,
    check_rl,
    check_rollout,
    check_run,
    check_stop_tokens,
    check_tokenizer,
)

SECTIONS = (
    "model",
    "parallel",
    "tokenizer",
    "rl",
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
    reward = config["reward"]
    check_optimizer(config["optimizer"])
    check_checkpoint(config["checkpoint"])
    check_logging(config["logging"])
    check_run(run)
    check_tokenizer(words)
    check_reward(reward)
    prepare_process()
    complete(config)
    from megatron_dlm.evaluation.evaluate import Evaluator
    from megatron_dlm.rewards.scorers import check_verifiers, make_scorer
    from megatron_dlm.rl.trainer import STAGE, TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.training.pace import Pace
    from megatron_dlm.training.setup import Session

    with running():
        session = Session.open(config["model"], config["parallel"], words, run.seed)
        check_rollout_layout(config["parallel"], session.model)
        check_rollout(rollout, session.model)
        check_stop_tokens(rollout, session.tokenizer.vocab_size, session.tokenizer.mask_id)
        check_rl(rl, rollout, session.model)
        check_eval(evaluation, rollout, session.model)
        prompts, found = read_prompts(rl.prompt_data, session, words, rollout.rollout_max_prompt_len)
        if len(prompts) < rollout.rollout_batch_size:
            raise ConfigError(
                f"--rollout-batch-size {rollout.rollout_batch_size} is more than the {len(prompts)} prompts there are. "
                "Lower it, or give more prompts."
            )
        held_out = []
        if evaluation.eval_interval is not None:
            held_out, others = read_prompts(evaluation.eval_prompt_data, session, words, rollout.rollout_max_prompt_len)
            found += f"; for evaluation {others}"
        check_verifiers(reward.reward, prompts + held_out)
        updates = rl.num_rollout * (
            rl.num_steps_per_rollout
            or -(-rollout.rollout_batch_size * rollout.n_samples_per_prompt // rl.global_batch_size)
        )
        open_outputs(config, session.groups.is_main)
        with open_report(config["logging"], session.groups.is_main, config) as report:
            state = session.train_state(config["optimizer"], updates)
            report.say(f"{found}; {session.describe(state)}")
            restored = restore(state, config["checkpoint"], session.model, STAGE)
            if nothing_left(report, restored.get("rl_step", 0), rl.num_rollout):
                return
            rig = RolloutRig.open(
                session, state, rollout, longest_prompt(prompts, held_out), longest_response(rollout, evaluation)
            )
            with make_scorer(reward.reward, reward.reward_workers, reward.reward_timeout) as scorer:
                trainer = TraceRLTrainer(session, state, rig, scorer, prompts, rl, rollout, run.seed, restored)
                keep_settings(config, session.groups.is_main)
                evaluator = (
                    Evaluator(rig, scorer, session.tokenizer, held_out, evaluation, rollout, run.seed)
                    if held_out
                    else None
                )

                def evaluate(step: int) -> dict[str, float]:
                    return evaluator(report, step) if step % evaluation.eval_interval == 0 else {}

                save = checkpointer(session, state, config["checkpoint"], STAGE, trainer.progress, report.say)
                pace = Pace(run, save, report.say)
                trainer.run(report, pace, evaluate if evaluator else None, config["logging"].log_interval)
