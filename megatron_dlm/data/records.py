"""From one record of a data file to the token ids of its prompt.

Both kinds of training read the same three ways of writing a prompt, and this module alone decides what they mean:

  question   put into the prompt template, then, if asked for, into the chat template as the user's turn;
  prompt     taken as it stands: whoever wrote it has applied the templates;
  messages   a conversation, always through the chat template.

`generate` and `score` also read `prompt_token_ids`, which are taken as they are.

A content key names a record by its text. It is stable across runs, files and machines: random draws are keyed with it,
and two files are disjoint when their keys are.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.jsonl import integers_field, text_field
from megatron_dlm.data.tokenizer import opened

if TYPE_CHECKING:
    from megatron_dlm.data.tokenizer import Tokenizer

QUESTION_SLOT = "{question}"


def content_key(*texts: str) -> str:
    """32 hex digits that depend on the texts alone; runs of white space count as one space."""
    normal = "\x1f".join(" ".join(text.split()) for text in texts)
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def fill_template(prompt_template: str, question: str) -> str:
    """Put the question in the place of {question}.

    Only that slot is replaced: templates speak of \\boxed{}, whose braces str.format would take for a slot.

    Raises:
        DataError: the template has no {question}.
    """
    if QUESTION_SLOT not in prompt_template:
        raise DataError(
            f"The prompt template {prompt_template!r} has no place for the question. "
            f"Write {QUESTION_SLOT} where it belongs."
        )
    return prompt_template.replace(QUESTION_SLOT, question)


def question_tokens(question: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool) -> list[int]:
    """Token ids of a bare question, after the prompt template and, if asked for, the chat template."""
    text = fill_template(prompt_template, question)
    if apply_chat_template:
        return tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return tokenizer.encode(opened(text, tokenizer.response_prefix))


def prompt_of(
    record: dict, where: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool
) -> tuple[str, list[int]]:
    """The prompt of a record that holds `question`, `prompt` or `messages` (looked for in this order).

    Args:
        record: one object of a data file.
        where: file and line, for the error.

    Returns:
        (the text that identifies the prompt, its token ids). For `messages` the text is that of all turns.

    Raises:
        DataError: none of the three fields is there, or it is malformed.
    """
    text, token_ids = _prompt_of(record, where, tokenizer, prompt_template, apply_chat_template)
    refuse_mask(token_ids, "prompt", where, tokenizer)
    return text, token_ids


def _prompt_of(
    record: dict, where: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool
) -> tuple[str, list[int]]:
    if "question" in record:
        question = text_field(record, "question", where)
        return question, question_tokens(question, tokenizer, prompt_template, apply_chat_template)
    if "prompt" in record:
        text = text_field(record, "prompt", where)
        return text, tokenizer.encode(text)
    if "messages" in record:
        messages = check_messages(record["messages"], where)
        return conversation_text(messages), tokenizer.apply_chat_template(messages)
    found = ", ".join(sorted(record)) or "no fields"
    raise DataError(f"{where}: no prompt was found (fields: {found}). Give 'question', 'prompt' or 'messages'.")


def prompt_ids_of(
    record: dict, where: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool
) -> list[int]:
    """Token ids of a record's prompt: its `prompt_token_ids`, or else those of `question`, `prompt` or `messages`.

    Raises:
        DataError: none of the four fields is there, it is malformed, or the prompt has no token.
    """
    if "prompt_token_ids" in record:
        token_ids = token_ids_of(record, "prompt_token_ids", where, tokenizer.vocab_size, tokenizer.mask_id)
    elif not record.keys() & {"question", "prompt", "messages"}:
        found = ", ".join(sorted(record)) or "no fields"
        raise DataError(
            f"{where}: no prompt was found (fields: {found}). Give 'question', 'prompt', 'messages' or "
            "'prompt_token_ids'."
        )
    else:
        _, token_ids = prompt_of(record, where, tokenizer, prompt_template, apply_chat_template)
    if not token_ids:
        raise DataError(f"{where}: the prompt has no tokens. Give every prompt at least one.")
    return token_ids


def token_ids_of(record: dict, field: str, where: str, vocab_size: int, mask_id: int) -> list[int]:
    """A field of token ids of a finished text.

    Raises:
        DataError: it is absent, not a list of whole numbers, holds an id outside the vocabulary, or the mask token.
    """
    token_ids = integers_field(record, field, where)
    for index, token in enumerate(token_ids):
        if not 0 <= token < vocab_size:
            raise DataError(
                f"{where}: entry {index} of '{field}' is {token}, which is no token of this vocabulary "
                f"(0 to {vocab_size - 1}). Use the tokenizer that made the ids."
            )
        if token == mask_id:
            raise DataError(
                f"{where}: entry {index} of '{field}' is the mask token (id {mask_id}), which no finished text holds. "
                "Take it out."
            )
    return token_ids


def steps_of(record: dict, field: str, tokens: str, where: str) -> list[int]:
    """A field with the denoising step of each token of the field `tokens`, which was read before.

    Raises:
        DataError: it is absent, not a list of whole numbers from 1, or of another length.
    """
    steps = integers_field(record, field, where)
    for index, step in enumerate(steps):
        if not 1 <= step < 2**31:
            raise DataError(
                f"{where}: entry {index} of '{field}' is {step}. Denoising steps are counted from 1. Correct the entry."
            )
    if len(steps) != len(record[tokens]):
        raise DataError(
            f"{where}: '{tokens}' has {len(record[tokens])} entries and '{field}' {len(steps)}. Give one step for "
            "each token."
        )
    return steps


def refuse_mask(token_ids: list[int], what: str, where: str, tokenizer: Tokenizer) -> None:
    """Refuse text that spells the mask token: to the model it would be a gap, and no label may be one.

    Raises:
        DataError: it does.
    """
    if tokenizer.mask_id in token_ids:
        raise DataError(
            f"{where}: the {what} holds the mask token itself (id {tokenizer.mask_id}). Take it out of the text."
        )


def check_messages(messages: object, where: str) -> list[dict[str, str]]:
    """The same messages, when they are a non-empty list of objects with the texts `role` and `content`.

    Raises:
        DataError: they are not.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a non-empty list of objects with 'role' and 'content'.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise DataError(
                f"{where}: entry {index} of 'messages' must be an object with the texts 'role' and 'content'."
            )
    return messages


def conversation_text(messages: list[dict[str, str]]) -> str:
    """One text that identifies a conversation."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
