"""The order in which a model would unmask given responses: which, where to, and how many tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TraceConfig:
    """Step maps of given responses, static: at each step the tokens that the model is surest of."""

    input: str | None = None
    """JSONL file of prompts and responses, as for supervised fine-tuning."""
    output: str | None = None
    """JSONL file to write: the lines of the input with token ids, step map and log-probabilities. It stands at OUTPUT
    when it is complete; until then OUTPUT.unfinished grows, and the same command goes on with it."""
    tokens_per_step: int = 1
    """Tokens of a block that one step unmasks, those with the highest probability."""
    trace_block_size: int | None = None
    """Under full attention, tokens of a block, counted from the first response token; blocks go one after the other."""
    canvas_length: int | None = None
    """Under full attention: tokens that a response is written on, as --canvas-length of sft. The masks behind it are
    shown to the model; without it a text ends with its response."""
    max_tokens_per_row: int | None = None
    """Token budget of a packed row, noisy copies included; what the longest response needs, and at least 4096, when it
    is not given."""
    lines_at_once: int = 128
    """Responses that each data-parallel process works on together; the output grows by those of all processes."""
