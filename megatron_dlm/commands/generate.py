"""`megatron-dlm generate`: responses to the prompts of a file."""

from __future__ import annotations

import dataclasses

from megatron_dlm.commands.common import (
    open_outputs,
    open_report,
    prepare_process,
    profiled,
    running,
    together,
    write_output,
)
from megatron_dlm.commands.weights import complete, restore
from megatron_dlm.config.flags import parse
from megatron_dlm.config.parallel import for_rollouts
from megatron_dlm.config.rollout import CapacityConfig, EngineConfig
from megatron_dlm.config.sections import pick_parts
from megatron_dlm.config.validate_generation import check_generate
from megatron_dlm.config.validate_profile import check_profile
from megatron_dlm.config.validate_rollout import check_rollout_layout, check_rollout_weights
from megatron_dlm.config.validate_training import check_logging, check_tokenizer

SECTIONS = ("model", "parallel", "tokenizer", "generate", "checkpoint", "logging", "profile", "run")


def main(argv: list[str]) -> None:
    config = parse("generate", pick_parts(*SECTIONS), argv)
    settings, words, seed = config["generate"], config["tokenizer"], config["run"].seed
    parallel = for_rollouts(config["parallel"])
    check_generate(settings, config["checkpoint"])
    check_logging(config["logging"])
    check_profile(config)
    check_tokenizer(words)
    prepare_process()
    complete(config)
    from megatron_dlm.evaluation.generate import check_room, describe, generate_records, read_prompt_lines, summarize
    from megatron_dlm.evaluation.line_sampling import sampling_of_line, sampling_params
    from megatron_dlm.rollout.holdings import generating
    from megatron_dlm.rollout.requirements import check_engine_here
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.training.setup import Session

    with running():
        session = Session.open(config["model"], parallel, words, seed)
        model, tokenizer = session.model, session.tokenizer
        check_rollout_layout(parallel, model)
        check_rollout_weights(settings, parallel, model)
        capacity = {field.name: getattr(settings, field.name) for field in dataclasses.fields(CapacityConfig)}
        together(lambda: check_engine_here(EngineConfig(**capacity), model))
        sampling_params(settings, model, tokenizer)  # the flags come first, for lines could not be blamed for them
        lines = read_prompt_lines(settings.prompts, tokenizer, words.prompt_template, words.apply_chat_template)
        sampling = [sampling_of_line(line.sampling, line.where, settings, model, tokenizer) for line in lines]
        longest = check_room(lines, sampling, bool(model.full_attention), model.max_position_embeddings)
        open_outputs(config, session.groups.is_main)
        with open_report(config["logging"], session.groups.is_main, config) as report:
            state = session.train_state(None, 1)
            report.say(f"{len(lines)} prompts; {session.describe(state)}")
            restore(state, config["checkpoint"], model, None, any_block_size=True)
            capacity["max_running_requests"] = min(settings.max_running_requests, len(lines) * settings.num_samples)
            engine = EngineConfig(**capacity, rollout_block_size=settings.rollout_block_size)
            rig = RolloutRig.open(session, state, engine, longest, 0)  # responses included
            with profiled(config, session.groups, report.say), generating(rig, "rollout"):
                records = generate_records(rig, tokenizer, lines, settings.num_samples, sampling, seed, report)
            together(lambda: write_output(settings.output, records) if session.groups.is_main else None)
            if session.groups.is_main:
                metrics = summarize(records)
                report.record(state.iteration, metrics)
                report.say(describe(metrics, settings.output))
