"""`megatron-dlm evaluate`: accuracy, length and speed on held-out prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_dlm.commands.common import (
    isolation_of,
    longest_prompt,
    longest_response,
    open_outputs,
    open_report,
    prepare_process,
    profiled,
    read_prompts,
    running,
    together,
)
from megatron_dlm.commands.weights import check_given, complete, restore
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.flags import parse
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig, for_rollouts
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.sections import pick_parts
from megatron_dlm.config.validate_profile import check_profile
from megatron_dlm.config.validate_reward import check_judge
from megatron_dlm.config.validate_rollout import check_rollout_layout
from megatron_dlm.config.validate_training import (
    check_eval,
    check_logging,
    check_reward,
    check_stop_tokens,
    check_tokenizer,
)

SECTIONS = ("model", "parallel", "tokenizer", "eval", "rollout", "reward", "checkpoint", "logging", "profile", "run")


def main(argv: list[str]) -> None:
    config = parse("evaluate", pick_parts(*SECTIONS), argv)
    evaluation, reward, words = (config[name] for name in ("eval", "reward", "tokenizer"))
    check_settings(config)
    parallel, rollout = _whole(config)
    prepare_process()
    complete(config)
    from megatron_dlm.evaluation.evaluate import Evaluator, ways_of
    from megatron_dlm.evaluation.report import table
    from megatron_dlm.rewards.code_options import CodeOptions
    from megatron_dlm.rewards.endpoint import open_endpoint
    from megatron_dlm.rewards.scorers import check_verifiers, make_scorer
    from megatron_dlm.rollout.holdings import generating
    from megatron_dlm.rollout.requirements import check_engine_here
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.rollout.sglang.check import check_backend
    from megatron_dlm.training.setup import Session

    with running():
        session = Session.open(config["model"], parallel, words, config["run"].seed)
        check_with_model(config, session.model, session.groups.world_size)
        tensor_size = rollout.rollout_tensor_model_parallel_size or parallel.tensor_model_parallel_size
        together(lambda: check_backend(rollout, session.model, tensor_size))
        together(lambda: check_engine_here(rollout, session.model))
        check_stop_tokens(rollout, session.tokenizer.vocab_size, session.tokenizer.mask_id)
        prompts, found = read_prompts(evaluation.eval_prompt_data, session, words, rollout.rollout_max_prompt_len)
        check_verifiers(reward.reward, prompts, reward.judge_url)
        endpoint = together(lambda: open_endpoint(reward))
        code = CodeOptions.of(reward)
        isolation = isolation_of(code, prompts, reward.reward)
        open_outputs(config, session.groups.is_main)
        with open_report(config["logging"], session.groups.is_main, config) as report:
            state = session.train_state(None, 1)
            report.say(f"{found}; {session.describe(state)}")
            if isolation:
                report.say(isolation)
            restore(state, config["checkpoint"], session.model, None)
            rig = RolloutRig.open(
                session, state, rollout, longest_prompt(prompts), longest_response(rollout, evaluation)
            )
            with make_scorer(reward.reward, reward.reward_workers, reward.reward_timeout, endpoint, code) as scorer:
                evaluator = Evaluator(rig, scorer, session.tokenizer, prompts, evaluation, rollout, config["run"].seed)
                with profiled(config, session.groups, report.say), generating(rig, "eval"):
                    metrics = evaluator(report, state.iteration)
            report.record(state.iteration, metrics)
            name = (config["checkpoint"].load or config["checkpoint"].hf_checkpoint).rstrip("/").split("/")[-1]
            report.say(table([(name, metrics)], list(ways_of(evaluation))))


def check_settings(config: dict[str, Any]) -> None:
    """Refuse what cannot work with any model."""
    check_given(config["checkpoint"])
    if config["eval"].eval_prompt_data is None:
        raise ConfigError("--eval-prompt-data is not set. Give the prompts to evaluate on.")
    check_logging(config["logging"])
    check_profile(config)
    check_tokenizer(config["tokenizer"])
    check_reward(config["reward"])
    check_judge(config["reward"])


def check_with_model(config: dict[str, Any], model: ModelConfig, world_size: int) -> None:
    """Refuse what does not fit the resolved model, or this number of processes."""
    parallel, rollout = _whole(config)
    check_rollout_layout(parallel, model, rollout, world_size)
    check_eval(config["eval"], rollout, model)


def _whole(config: dict[str, Any]) -> tuple[ParallelConfig, RolloutConfig]:
    """What training would need besides stays at its default, which nothing reads here."""
    return for_rollouts(config["parallel"]), RolloutConfig(**dataclasses.asdict(config["rollout"]))
