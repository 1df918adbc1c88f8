"""`megatron-dlm sft`: supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from megatron_dlm.commands.common import (
    ended_before,
    keep_settings,
    nothing_left,
    open_outputs,
    open_report,
    prepare_process,
    profiled,
    running,
)
from megatron_dlm.commands.dry_run import dry_run, sft_plan
from megatron_dlm.commands.new_mask import check_mask_init, check_mask_token, introduce_mask
from megatron_dlm.commands.weights import checkpointer, complete, restore
from megatron_dlm.config.flags import parse
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.sections import pick
from megatron_dlm.config.validate_fp8 import check_fp8_weights, check_lora_layers
from megatron_dlm.config.validate_lora import check_lora, check_lora_of_model, check_lora_weights
from megatron_dlm.config.validate_profile import check_profile
from megatron_dlm.config.validate_sft import check_sft
from megatron_dlm.config.validate_training import (
    check_checkpoint,
    check_logging,
    check_optimizer,
    check_run,
    check_tokenizer,
)

SECTIONS = ("model", "parallel", "tokenizer", "sft", "optimizer", "lora", "checkpoint", "logging", "profile", "run")


def main(argv: list[str]) -> None:
    config = parse("sft", pick(*SECTIONS), argv)
    sft, run, words = config["sft"], config["run"], config["tokenizer"]
    check_optimizer(config["optimizer"], sft.train_iters)
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
    if run.dry_run:
        return dry_run(config, check_with_model, sft_plan)
    prepare_process()
    complete(config)
    from megatron_dlm.data.sft_sources import open_samples
    from megatron_dlm.sft.check import check_samples
    from megatron_dlm.sft.loader import check_loader
    from megatron_dlm.sft.trainer import STAGE, SFTTrainer
    from megatron_dlm.training.pace import Pace
    from megatron_dlm.training.setup import Session

    check_loader(sft)
    with running():
        session = Session.open(config["model"], config["parallel"], words, run.seed)
        check_with_model(config, session.model, session.groups.world_size)
        check_mask_token(config["checkpoint"], session.tokenizer)
        longest = sft.seq_length or session.model.max_position_embeddings
        samples = open_samples(
            sft.data_path,
            sft.data_weights,
            session.tokenizer,
            words.prompt_template,
            words.apply_chat_template,
            longest,
            run.seed,
        )
        check_samples(samples, sft, session.model)
        open_outputs(config, session.groups.is_main)
        with open_report(config["logging"], session.groups.is_main, config) as report:
            state = session.train_state(config["optimizer"], sft.train_iters, config["lora"], run.seed)
            report.say(f"{samples.describe()}; {session.describe(state)}")
            restored = restore(state, config["checkpoint"], session.model, STAGE)
            if nothing_left(report, state.iteration, sft.train_iters) or ended_before(report, run, restored):
                return
            introduce_mask(state, config["checkpoint"], session, run.seed, report.say)
            samples.resume(restored)
            if restored and restored.get("blocks") != sft.block_size_schedule:
                now, then = (" ".join(one or ["none"]) for one in (sft.block_size_schedule, restored.get("blocks")))
                report.say(f"--block-size-schedule is {now}; until here it was {then}.")
            trainer = SFTTrainer(session, state, samples, sft, run.seed, restored)
            keep_settings(config, session.groups.is_main)
            progress = lambda: {**trainer.progress(), **pace.progress()}
            save = checkpointer(session, state, config["checkpoint"], STAGE, progress, report.say)
            pace = Pace(run, save, report.say)
            with profiled(config, session.groups, report.say):
                trainer.run(report, config["logging"], pace)


def check_with_model(config: dict[str, Any], model: ModelConfig, world_size: int) -> None:
    """Refuse what does not fit the resolved model."""
    check_sft(config["sft"], model, config["parallel"])
    check_lora_of_model(config["lora"], model)
