"""`megatron-dlm sft`: supervised fine-tuning."""

from __future__ import annotations

from megatron_dlm.commands.common import checkpointer, prepare_process, restore, running, settings_of
from megatron_dlm.config.flags import parse
from megatron_dlm.config.sections import pick
from megatron_dlm.config.validate_training import (
    check_checkpoint,
    check_logging,
    check_optimizer,
    check_sft,
    check_tokenizer,
)


def main(argv: list[str]) -> None:
    config = parse(
        "sft", pick("model", "parallel", "tokenizer", "sft", "optimizer", "checkpoint", "logging", "run"), argv
    )
    sft, run, words = config["sft"], config["run"], config["tokenizer"]
    check_optimizer(config["optimizer"], sft.train_iters)
    check_checkpoint(config["checkpoint"])
    check_logging(config["logging"])
    check_tokenizer(words)
    prepare_process()
    from megatron_dlm.data.sft_data import load_sft
    from megatron_dlm.sft.trainer import SFTTrainer
    from megatron_dlm.training.report import Report
    from megatron_dlm.training.setup import Session

    with running():
        session = Session.open(config["model"], config["parallel"], words, run.seed)
        check_sft(sft, session.model)
        samples, dropped = load_sft(
            sft.data_path, session.tokenizer, words.prompt_template, words.apply_chat_template, sft.seq_length or session.model.max_position_embeddings
        )
        state = session.train_state(config["optimizer"], sft.train_iters)
        restored = restore(state, config["checkpoint"])
        trainer = SFTTrainer(session, state, samples, sft, run.seed, restored.get("consumed_samples", 0))
        with Report(config["logging"], session.groups.is_main, settings_of(config)) as report:
            report.say(
                f"{len(samples)} samples ({dropped} longer than --seq-length left out); {session.describe(state)}"
            )
            save = checkpointer(
                state, config["checkpoint"], lambda: {"stage": "sft", "consumed_samples": trainer.consumed}, report.say
            )
            trainer.run(report, config["logging"], save)
