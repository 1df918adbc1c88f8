"""`megatron-dlm trace`: the order in which a model prefers to unmask given responses."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_dlm.commands.common import open_outputs, open_report, prepare_process, running, together
from megatron_dlm.commands.weights import complete, restore
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.flags import parse
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.run import RunConfig
from megatron_dlm.config.sections import pick_for_rows
from megatron_dlm.config.validate_generation import check_trace, check_trace_of_model
from megatron_dlm.config.validate_training import check_logging, check_tokenizer

SECTIONS = ("model", "parallel", "tokenizer", "trace", "checkpoint", "logging")
_SAYS_NOTHING = ("model_preset", "init_method_std", "make_vocab_size_divisible_by")  # of what a model computes


def main(argv: list[str]) -> None:
    config = parse("trace", pick_for_rows(*SECTIONS), argv)
    settings, words = config["trace"], config["tokenizer"]
    parallel = ParallelConfig(**dataclasses.asdict(config["parallel"]))
    check_trace(settings, config["checkpoint"])
    check_logging(config["logging"])
    check_tokenizer(words)
    prepare_process()
    complete(config)
    from megatron_dlm.data.unfinished import Unfinished, refuse_complete
    from megatron_dlm.evaluation.collect import Way, collect
    from megatron_dlm.evaluation.given import add_totals, describe, given_record, read_given, row_budget, summarize
    from megatron_dlm.parallel.exchange import broadcast_object
    from megatron_dlm.training.setup import Session

    with running():
        session = Session.open(config["model"], parallel, words, RunConfig().seed)
        model, tokenizer, is_main = session.model, session.tokenizer, session.groups.is_main
        way = Way(session.grid, check_trace_of_model(settings, model), settings.tokens_per_step)
        together(lambda: refuse_complete(settings.output) if is_main else None)
        lines = read_given(
            settings.input,
            tokenizer,
            words.prompt_template,
            words.apply_chat_template,
            session.grid,
            model.max_position_embeddings,
            settings.canvas_length or 0,
        )
        budget = row_budget(lines, settings.max_tokens_per_row, session.grid)
        open_outputs(config, is_main)
        with open_report(config["logging"], is_main, config) as report:
            begin = lambda: Unfinished.begin(settings.output, _identity(config, model, lines))
            output = together(lambda: begin() if is_main else None)
            done = broadcast_object(output.lines if is_main else 0, src=0)
            state = session.train_state(None, 1)
            report.say(f"{len(lines)} responses, {done} of them done; {session.describe(state)}")
            restore(state, config["checkpoint"], model, None, any_block_size=True)
            with report.bar(len(lines), "responses") as bar:
                bar.update(done)

                def write(traces: list) -> None:
                    place = output.lines
                    given = lines[place : place + len(traces)]
                    pairs = zip(given, traces, strict=True)
                    records = [given_record(one, trace, way.per_step, tokenizer) for one, trace in pairs]
                    output.add(records, add_totals(output.totals, traces))
                    bar.update(len(traces))

                def keep(traces: list) -> None:
                    together(lambda: write(traces) if is_main else None)

                collect(session, state, lines[done:], way, budget, settings.lines_at_once, keep)
            together(lambda: output.finish() if is_main else None)
            if is_main:
                metrics = summarize(output.totals)
                report.record(state.iteration, metrics)
                report.say(describe(metrics, settings.output))


def _identity(config: dict[str, Any], model: ModelConfig, lines: list):
    """What the output is made of, and a run that goes on with it must have too. How rows are filled, and on how many
    processes, is left out: it changes rounding at most."""
    from megatron_dlm.checkpoint.digest import digest
    from megatron_dlm.data.unfinished import Identity
    from megatron_dlm.evaluation.given import file_digest, ids_digest

    settings = config["trace"]
    shape = {flag_name(name): value for name, value in dataclasses.asdict(model).items() if name not in _SAYS_NOTHING}
    return Identity(
        contents={
            "the file of --input": file_digest(settings.input),
            "the checkpoint": digest(config["checkpoint"]),
            "the tokenizer, or of the templates": ids_digest(lines),
        },
        flags={
            "--tokens-per-step": settings.tokens_per_step,
            "--trace-block-size": settings.trace_block_size,
            "--canvas-length": settings.canvas_length,
            **shape,
        },
    )
