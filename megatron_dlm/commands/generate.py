"""`megatron-dlm generate`: responses to the prompts of a file."""

from __future__ import annotations

import dataclasses

from megatron_dlm.commands.common import open_outputs, open_report, prepare_process, running, together, write_output
from megatron_dlm.commands.weights import complete, restore
from megatron_dlm.config.flags import parse
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.config.sections import pick_parts
from megatron_dlm.config.validate import check_rollout_layout
from megatron_dlm.config.validate_generation import check_denoising_steps, check_generate
from megatron_dlm.config.validate_training import check_logging, check_stop_tokens, check_tokenizer

SECTIONS = ("model", "parallel", "tokenizer", "generate", "checkpoint", "logging", "run")


def main(argv: list[str]) -> None:
    config = parse("generate", pick_parts(*SECTIONS), argv)
    settings, words, seed = config["generate"], config["tokenizer"], config["run"].seed
    parallel = ParallelConfig(**dataclasses.asdict(config["parallel"]))
    check_generate(settings, config["checkpoint"])
    check_logging(config["logging"])
    check_tokenizer(words)
    prepare_process()
    complete(config)
    from megatron_dlm.diffusion.trace import SamplingParams
    from megatron_dlm.evaluation.generate import check_room, describe, generate_records, read_prompt_lines, summarize
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.training.setup import Session

    with running():
        session = Session.open(config["model"], parallel, words, seed)
        block, tokenizer = session.model.block_size, session.tokenizer
        check_rollout_layout(parallel, session.model)
        check_denoising_steps(settings, block)
        check_stop_tokens(EngineConfig(stop_token_ids=settings.stop_token_ids), tokenizer.vocab_size, tokenizer.mask_id)
        lines = read_prompt_lines(settings.prompts, tokenizer, words.prompt_template, words.apply_chat_template)
        check_room(lines, settings.max_new_tokens, block, session.model.max_position_embeddings)
        open_outputs(config, session.groups.is_main)
        with open_report(config["logging"], session.groups.is_main, config) as report:
            state = session.train_state(None, 1)
            report.say(f"{len(lines)} prompts; {session.describe(state)}")
            restore(state, config["checkpoint"], session.model, None, any_block_size=True)
            engine = EngineConfig(
                max_running_requests=min(settings.max_running_requests, len(lines) * settings.num_samples),
                max_tokens_per_pass=settings.max_tokens_per_pass,
            )
            longest = max(len(line.token_ids) for line in lines)
            rig = RolloutRig.open(session, state, engine, longest, settings.max_new_tokens)
            stops = settings.stop_token_ids
            sampling = SamplingParams(
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                max_new_tokens=settings.max_new_tokens,
                block_size=block,
                denoising_steps=settings.denoising_steps or block,
                remasking=settings.remasking,
                threshold=settings.threshold,
                stop_token_ids=rig.stop_token_ids if stops is None else tuple(stops),
                ignore_eos=settings.ignore_eos,
            )
            records = generate_records(rig, tokenizer, lines, settings.num_samples, sampling, seed, report)
            together(lambda: write_output(settings.output, records) if session.groups.is_main else None)
            if session.groups.is_main:
                metrics = summarize(records)
                report.record(state.iteration, metrics)
                report.say(describe(metrics, settings.output))
