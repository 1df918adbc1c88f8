"""`megatron-dlm evaluate`: accuracy, length and speed on held-out prompts."""

from __future__ import annotations

from megatron_dlm.commands.common import (
    longest_prompt,
    longest_response,
    prepare_process,
    restore,
    running,
    settings_of,
)
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.flags import parse
from megatron_dlm.config.sections import pick
from megatron_dlm.config.validate_training import check_eval, check_logging, check_reward, check_tokenizer

SECTIONS = ("model", "parallel", "tokenizer", "eval", "rollout", "reward", "checkpoint", "logging", "run")


def main(argv: list[str]) -> None:
    config = parse("evaluate", pick(*SECTIONS), argv)
    evaluation, rollout, words = config["eval"], config["rollout"], config["tokenizer"]
    if config["checkpoint"].load is None:
        raise ConfigError("--load is not set. Give the folder of the checkpoint to evaluate.")
    check_logging(config["logging"])
    check_tokenizer(words)
    check_reward(config["reward"])
    prepare_process()
    from megatron_dlm.data.prompts import load_prompts
    from megatron_dlm.evaluation.evaluate import Evaluator, table
    from megatron_dlm.rewards.scorers import make_scorer
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.training.report import Report
    from megatron_dlm.training.setup import Session

    with running():
        session = Session.open(config["model"], config["parallel"], words, config["run"].seed)
        check_eval(evaluation, rollout, session.model)
        prompts, _ = load_prompts(
            evaluation.eval_prompt_data,
            session.tokenizer,
            words.prompt_template,
            words.apply_chat_template,
            rollout.rollout_max_prompt_len,
        )
        state = session.train_state(None, 1)
        restore(state, config["checkpoint"])
        rig = RolloutRig.open(session, state, rollout, longest_prompt(prompts), longest_response(rollout, evaluation))
        with make_scorer(
            config["reward"].reward, config["reward"].reward_workers, config["reward"].reward_timeout
        ) as scorer:
            with Report(config["logging"], session.groups.is_main, settings_of(config)) as report:
                evaluator = Evaluator(rig, scorer, session.tokenizer, prompts, evaluation, rollout, config["run"].seed)
                metrics = evaluator(report)
                report.record(state.iteration, metrics)
                report.say(
                    table([(config["checkpoint"].load.rstrip("/").split("/")[-1], metrics)], evaluation.eval_remasking)
                )
