"""Responses to the prompts of a file, on all replicas.

A response is a function of the weights, the sampling parameters, the seed, and of what its prompt says: not of the
prompt's line, of the other prompts, or of the number of processes. The n-th time that a file holds the same prompt, its
responses are the next ones to that prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.jsonl import read_jsonl
from megatron_dlm.data.records import content_key, prompt_ids_of
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.data.traces import trace_record
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.parallel.exchange import exchange_objects
from megatron_dlm.rollout.replicas import roll
from megatron_dlm.rollout.request import Request, rollout_stream
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.training.report import Report


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt of a file.

    Attributes:
        where: file and line, for messages.
        index: its place among the prompts of the file, from 0.
        token_ids: the prompt as the model sees it.
        key: of its token ids.
        occurrence: how often the same token ids stand on earlier lines.
        sampling: what the line says of its sampling, as it stands there; None where it says nothing.
    """

    where: str
    index: int
    token_ids: tuple[int, ...]
    key: str
    occurrence: int
    sampling: object = None


def read_prompt_lines(
    path: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool
) -> list[PromptLine]:
    """All prompts of a file, in its order.

    Raises:
        DataError: a line cannot be used; the message names it.
    """
    lines, seen = [], Counter()
    for index, (number, record) in enumerate(read_jsonl(path)):
        where = f"{path}, line {number}"
        token_ids = tuple(prompt_ids_of(record, where, tokenizer, prompt_template, apply_chat_template))
        key = content_key(" ".join(map(str, token_ids)))
        lines.append(PromptLine(where, index, token_ids, key, seen[key], record.get("sampling")))
        seen[key] += 1
    return lines


def check_room(
    lines: Sequence[PromptLine], sampling: Sequence[SamplingParams], full_attention: bool, max_length: int
) -> int:
    """Refuse a prompt whose longest response would pass the model's last position.

    Args:
        sampling: of each line.
        full_attention: whether a text ends at its last token, instead of the end of its terminal block.

    Returns:
        tokens of the longest text that may come about.

    Raises:
        DataError: there is one; the message names its line.
    """
    longest = 0
    for line, own in zip(lines, sampling, strict=True):
        prompt, block = len(line.token_ids), 1 if full_attention else own.block_size
        needed = -(-(prompt + own.max_new_tokens) // block) * block
        longest = max(longest, needed)
        if needed > max_length:
            raise DataError(
                f"{line.where}: this prompt has {prompt} tokens; with {own.max_new_tokens} new ones (--max-new-tokens) "
                f"it needs {needed} positions in blocks of {own.block_size}, and the model has {max_length} "
                "(--max-position-embeddings). Shorten the prompt or the response."
            )
    return longest


def generate_records(
    rig: RolloutRig,
    tokenizer: Tokenizer,
    lines: Sequence[PromptLine],
    num_samples: int,
    sampling: Sequence[SamplingParams],
    seed: int,
    report: Report,
) -> list[dict]:
    """Generate `num_samples` responses to each prompt. Collective over all ranks.

    Args:
        sampling: of each line.

    Returns:
        On rank 0 all responses as JSON objects (data/traces.py), in order of line, then sample; elsewhere none.
    """
    first = [line.occurrence * num_samples for line in lines]  # those of earlier lines with the same prompt come before
    group = lambda number: [
        _request(lines[number], first[number] + sample, sampling[number], seed) for sample in range(num_samples)
    ]
    with report.bar(len(lines) * num_samples // rig.num_replicas, "responses") as bar:
        traces = roll(rig, "generate", len(lines), num_samples, group, progress=bar.update).finished
    place = {(line.key, line.occurrence): line.index for line in lines}
    records = []
    for trace in traces:
        occurrence, sample = divmod(trace.sample, num_samples)
        text = tokenizer.decode(trace.response_ids.tolist(), skip_special_tokens=True)
        records.append(trace_record(trace, place[trace.prompt_key, occurrence], sample, text))
    received = exchange_objects({0: records} if rig.is_leader else {})
    return sorted(received, key=lambda record: (record["index"], record["sample"]))


def summarize(records: Sequence[dict]) -> dict[str, float]:
    """Means over responses; speeds are total tokens over total denoising steps or model passes. Empty for none."""
    if not records:
        return {}
    tokens = [len(record["token_ids"]) for record in records]
    steps = [max([*record["step_map"], *record["tail_step_map"]]) for record in records]
    logprobs = [value for record in records for value in record["logprobs"]]
    return {
        "generate/responses": float(len(records)),
        "generate/response_len": float(np.mean(tokens)),
        "generate/tokens_per_step": sum(tokens) / sum(steps),
        "generate/tokens_per_forward": sum(tokens) / sum(record["num_forwards"] for record in records),
        "generate/logprob": float(np.mean(logprobs)),
        "generate/truncated_ratio": float(np.mean([record["finish_reason"] == "length" for record in records])),
    }


def describe(metrics: dict[str, float], output: str) -> str:
    """`summarize` in words."""
    value = lambda name: metrics[f"generate/{name}"]
    return (
        f"{value('responses'):.0f} responses in {output}: mean length {value('response_len'):.1f} tokens, "
        f"{value('tokens_per_step'):.2f} tokens per step, mean log-probability {value('logprob'):.4f}, "
        f"cut at the longest length {100 * value('truncated_ratio'):.1f}%"
    )


def _request(line: PromptLine, sample: int, sampling: SamplingParams, seed: int) -> Request:
    """`sample` counts the responses to the same token ids, over all lines that hold them."""
    return Request(
        np.asarray(line.token_ids, dtype=np.int64),
        sampling,
        line.key,
        sample,
        rollout_stream(seed, 0, f"generate/{line.key}", sample),
    )
