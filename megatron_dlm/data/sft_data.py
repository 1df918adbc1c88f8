"""Samples for supervised fine-tuning: a prompt and the response to learn, as token ids.

A line holds one of
  question + response    the question goes through the prompt template and, if asked for, the chat template;
  prompt + response      the prompt is taken as it stands;
  messages               the last turn must be the assistant's and is the response; the turns before it go through
                         the chat template.

Prompt and response are tokenised separately, as they meet in reinforcement learning. A response ends in exactly one
stop token of ours: it is appended unless the tokens already end in it. Samples that do not fit the sequence length are
left out and counted, never cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.jsonl import read_jsonl, text_field
from megatron_dlm.data.records import check_messages, content_key, prompt_of, refuse_mask

if TYPE_CHECKING:
    from megatron_dlm.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Sample:
    """One supervised sample.

    Attributes:
        key: content hash of prompt text and response text; draws for this sample are keyed with it.
        prompt_ids: the prompt, templates applied.
        response_ids: the response, its stop token included.
    """

    key: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def load_sft(
    paths: list[str],
    tokenizer: Tokenizer,
    prompt_template: str = "{question}",
    apply_chat_template: bool = False,
    seq_length: int | None = None,
) -> tuple[list[Sample], int]:
    """Read all files.

    Args:
        paths: JSON-lines files.
        prompt_template: text with {question}, for lines with a question.
        apply_chat_template: whether questions become the user's turn of the chat template.
        seq_length: samples whose prompt and response together are longer, in tokens, are left out; None keeps all.

    Returns:
        (samples in file order, number of samples left out).

    Raises:
        DataError: a file or line cannot be read, or no sample fits.
    """
    samples, dropped = [], 0
    for path in paths:
        for line, record in read_jsonl(path):
            sample = _sample(record, f"{path}, line {line}", tokenizer, prompt_template, apply_chat_template)
            if seq_length is not None and len(sample.prompt_ids) + len(sample.response_ids) > seq_length:
                dropped += 1
            else:
                samples.append(sample)
    if not samples:
        reason = f"all {dropped} are longer than --seq-length {seq_length}" if dropped else "the list of files is empty"
        raise DataError(f"There is no sample to train on: {reason}. Give other data or a larger length.")
    return samples, dropped


def _sample(record: dict, where: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool) -> Sample:
    if "messages" in record and "response" not in record:
        record = _split_conversation(record["messages"], where)
    response = text_field(record, "response", where)
    prompt, prompt_ids = prompt_of(record, where, tokenizer, prompt_template, apply_chat_template)
    response_ids = tokenizer.encode(response)
    if not response_ids or response_ids[-1] != tokenizer.eos_id:
        response_ids.append(tokenizer.eos_id)
    refuse_mask(response_ids, "response", where, tokenizer)
    return Sample(content_key(prompt, response), tuple(prompt_ids), tuple(response_ids))


def _split_conversation(messages: object, where: str) -> dict:
    *before, last = check_messages(messages, where)
    if last["role"] != "assistant" or not before:
        raise DataError(
            f"{where}: 'messages' must end in a turn of the assistant that answers earlier turns "
            f"(it has {len(before) + 1} and ends with {last['role']!r}). Complete the conversation, or give 'response'."
        )
    return {"messages": before, "response": last["content"]}
