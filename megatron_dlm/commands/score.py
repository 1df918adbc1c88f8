"""`megatron-dlm score`: log-probabilities of given responses under the training model."""

from __future__ import annotations

import dataclasses

from megatron_dlm.commands.common import open_outputs, open_report, prepare_process, running, together, write_output
from megatron_dlm.commands.weights import complete, restore
from megatron_dlm.config.flags import parse
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.run import RunConfig
from megatron_dlm.config.sections import pick_for_rows
from megatron_dlm.config.tokenizer import TokenIdsConfig
from megatron_dlm.config.validate_generation import check_score
from megatron_dlm.config.validate_training import check_logging

SECTIONS = {
    **pick_for_rows("model", "parallel"),
    "tokenizer": TokenIdsConfig,
    **pick_for_rows("score", "checkpoint", "logging"),
}


def main(argv: list[str]) -> None:
    config = parse("score", SECTIONS, argv)
    settings, given_block_size = config["score"], config["model"].block_size
    parallel = ParallelConfig(**dataclasses.asdict(config["parallel"]))
    check_score(settings, config["checkpoint"], given_block_size)
    check_logging(config["logging"])
    prepare_process()
    complete(config)
    from megatron_dlm.data.traces import Limits, read_traces
    from megatron_dlm.evaluation.score import compare, row_budget, score, scored_records, summarize, table
    from megatron_dlm.training.setup import Session

    with running():
        session = Session.open(config["model"], parallel, config["tokenizer"], RunConfig().seed)
        model, tokenizer = session.model, session.tokenizer
        limits = Limits(tokenizer.vocab_size, tokenizer.mask_id, model.max_position_embeddings)
        lines = read_traces(settings.input, limits, model.block_size, given_block_size, settings.temperature)
        budget = row_budget(lines, settings.max_tokens_per_row, bool(model.full_attention))
        open_outputs(config, session.groups.is_main)
        with open_report(config["logging"], session.groups.is_main, config) as report:
            state = session.train_state(None, 1)
            report.say(f"{len(lines)} responses; {session.describe(state)}")
            restore(state, config["checkpoint"], model, None, any_block_size=True)
            scores = score(session, state, lines, budget, report)
            is_main = session.groups.is_main
            together(lambda: write_output(settings.output, scored_records(lines, scores)) if is_main else None)
            if is_main:
                metrics = summarize(lines, scores)
                report.record(state.iteration, metrics)
                report.say(table(metrics, compare(lines, scores)))
