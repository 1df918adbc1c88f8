"""Log-probabilities of responses in a file, under the training model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ScoreConfig:
    """Log-probabilities of given responses. --block-size beats the block size that a line names."""

    input: str | None = None
    """JSONL file of responses as generate writes them: prompt_token_ids, token_ids, step_map and the tail."""
    output: str | None = None
    """JSONL file to write: the lines of the input with trace_logprobs and block_logprobs."""
    temperature: float | None = None
    """Temperature of the policy, with 0 for that of greedy sampling, 1; that of the line (else 1) when it is not
    given."""
    max_tokens_per_row: int | None = None
    """Token budget of a packed row, noisy copies included; what the longest response needs, and at least 4096, when it
    is not given."""
