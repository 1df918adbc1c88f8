"""Samples for supervised fine-tuning: a prompt and the response to learn, as token ids.

A line holds one of (looked for in this order)
  token_ids              a response as `trace` and `generate` write it, taken as it is: no stop token is added. Its
                         prompt is prompt_token_ids, or one of the fields below. Beside it may stand step_map, the
                         step at which each token was unmasked, and then tail_token_ids with tail_step_map, the rest of
                         the block in which the response ends;
  question + response    the question goes through the prompt template and, if asked for, the chat template;
  prompt + response      the prompt is taken as it stands;
  messages               the last turn must be the assistant's and is the response; the turns before it go through
                         the chat template;
  text                   a document: a response without a prompt.

Prompt and response are tokenised separately, as they meet in reinforcement learning. A response ends in exactly one
stop token of ours: it is appended unless the tokens already end in it.

Invariants (tests/data/test_sft_data.py):
  - samples with a prompt or a step map that do not fit the sequence length are left out and counted, never cut;
  - documents that do not fit are cut into consecutive pieces, all but the last of exactly that length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.jsonl import read_jsonl, text_field
from megatron_dlm.data.records import check_messages, content_key, prompt_of, refuse_mask, steps_of, token_ids_of
from megatron_dlm.data.tokenizer import without_opening

if TYPE_CHECKING:
    from megatron_dlm.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Sample:
    """One supervised sample.

    Attributes:
        key: content hash of prompt and response; draws for this sample are keyed with it.
        prompt_ids: the prompt, templates applied; empty for a document or a piece of one.
        response_ids: the response, its stop token included.
        step_map: the step at which each token of the response was unmasked, from 1; None where that is not known.
        tail_ids, tail_steps: likewise the rest of the block in which the response ends, as far as that is known.
    """

    key: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    step_map: tuple[int, ...] | None = None
    tail_ids: tuple[int, ...] = ()
    tail_steps: tuple[int, ...] = ()

    @property
    def is_document(self) -> bool:
        """Whether it may be cut."""
        return not self.prompt_ids and self.step_map is None

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


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
        seq_length: samples whose prompt and response together are longer, in tokens, are left out, and documents cut;
            None keeps all whole.

    Returns:
        (samples in file order, number of samples left out).

    Raises:
        DataError: a file or line cannot be read, or no sample fits.
    """
    samples, dropped = [], 0
    for path in paths:
        found, left_out = read_samples(path, tokenizer, prompt_template, apply_chat_template, seq_length)
        samples += found
        dropped += left_out
    if not samples:
        raise nothing_fits(dropped, seq_length)
    return samples, dropped


def read_samples(
    path: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool, seq_length: int | None
) -> tuple[list[Sample], int]:
    """`load_sft` of one file, of which all samples may be left out."""
    samples, dropped = [], 0
    for line, record in read_jsonl(path):
        sample = sample_of(record, f"{path}, line {line}", tokenizer, prompt_template, apply_chat_template)
        count = num_pieces(len(sample.prompt_ids), len(sample.response_ids), sample.is_document, seq_length)
        samples += [piece_of(sample, index, seq_length) for index in range(count)]
        dropped += not count
    return samples, dropped


def nothing_fits(dropped: int, seq_length: int | None) -> DataError:
    """What is said of data of which nothing is left."""
    reason = f"all {dropped} are longer than --seq-length {seq_length}" if dropped else "the list of files is empty"
    return DataError(f"There is no sample to train on: {reason}. Give other data or a larger length.")


def num_pieces(prompt: int, response: int, is_document: bool, seq_length: int | None) -> int:
    """How many samples a record of so many tokens gives: none where it does not fit, several where it is cut."""
    if seq_length is None or prompt + response <= seq_length:
        return 1
    return math.ceil(response / seq_length) if is_document else 0


def piece_of(sample: Sample, index: int, seq_length: int | None) -> Sample:
    """A piece of a document, counted from 0; of any sample that is not cut, the sample itself."""
    if seq_length is None or sample.length <= seq_length:
        return sample
    key = f"{sample.key}.{index}" if index else sample.key
    return replace(sample, key=key, response_ids=sample.response_ids[index * seq_length : (index + 1) * seq_length])


def sample_of(
    record: dict, where: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool
) -> Sample:
    """The sample of one line, whole.

    Args:
        where: file and line, for the error.

    Raises:
        DataError: the line holds none, or a malformed one.
    """
    if record.get("token_ids") is not None:
        return _of_token_ids(record, where, tokenizer, prompt_template, apply_chat_template)
    if record.get("step_map") is not None:
        raise DataError(
            f"{where}: 'step_map' speaks of tokens, and the line has no 'token_ids'. Add them, or leave 'step_map' out."
        )
    if "text" in record and not record.keys() & {"question", "prompt", "messages", "response"}:
        text = text_field(record, "text", where)
        return Sample(content_key(text), (), tuple(_response_ids(text, "text", where, tokenizer)))
    if "messages" in record and "response" not in record:
        record = _split_conversation(record["messages"], where)
    response = text_field(record, "response", where)
    prompt, prompt_ids = prompt_of(record, where, tokenizer, prompt_template, apply_chat_template)
    if "question" in record or "prompt" not in record:  # a prompt that is taken as it stands ends as it ends
        response = without_opening(response, tokenizer.response_prefix)
    response_ids = _response_ids(response, "response", where, tokenizer)
    return Sample(content_key(prompt, response), tuple(prompt_ids), tuple(response_ids))


def _response_ids(text: str, what: str, where: str, tokenizer: Tokenizer) -> list[int]:
    token_ids = tokenizer.encode(text)
    if not token_ids or token_ids[-1] != tokenizer.eos_id:
        token_ids.append(tokenizer.eos_id)
    refuse_mask(token_ids, what, where, tokenizer)
    return token_ids


def _of_token_ids(
    record: dict, where: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool
) -> Sample:
    ids = lambda field: tuple(token_ids_of(record, field, where, tokenizer.vocab_size, tokenizer.mask_id))
    if record.get("prompt_token_ids") is not None:
        prompt = ids("prompt_token_ids")
    else:
        prompt = tuple(prompt_of(record, where, tokenizer, prompt_template, apply_chat_template)[1])
    response, steps, tail, tail_steps = ids("token_ids"), None, (), ()
    if not response:
        raise DataError(f"{where}: 'token_ids' is empty, so there is nothing to learn. Leave the line out.")
    if record.get("step_map") is not None:
        steps = tuple(steps_of(record, "step_map", "token_ids", where))
        if record.get("tail_token_ids") is not None:
            tail = ids("tail_token_ids")
            tail_steps = tuple(steps_of(record, "tail_step_map", "tail_token_ids", where))
    key = content_key(" ".join(map(str, prompt)), " ".join(map(str, response)))
    return Sample(key, prompt, response, steps, tail, tail_steps)


def _split_conversation(messages: object, where: str) -> dict:
    *before, last = check_messages(messages, where)
    if last["role"] != "assistant" or not before:
        raise DataError(
            f"{where}: 'messages' must end in a turn of the assistant that answers earlier turns "
            f"(it has {len(before) + 1} and ends with {last['role']!r}). Complete the conversation, or give 'response'."
        )
    return {"messages": before, "response": last["content"]}
