"""Prompts for reinforcement learning and evaluation.

A source is a JSON-lines file or a generator of the reasoning_gym package. A prompt carries what its verdict needs
(ground truth, verifier, metadata), so that sources can be mixed in one run.

Invariants (tests/data/test_prompts.py):
  - keys are unique, and depend on the question alone: not on file, line, template or tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from megatron_dlm.config.errors import DataError
from megatron_dlm.data import reasoning_gym
from megatron_dlm.data.jsonl import read_jsonl
from megatron_dlm.data.records import content_key, prompt_of, question_tokens
from megatron_dlm.data.tasks import read_task

if TYPE_CHECKING:
    from megatron_dlm.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task.

    Attributes:
        key: content hash of the question.
        token_ids: the prompt as the model sees it, templates applied.
        question: the text before any template.
        ground_truth: the expected answer, as text.
        verifier: which judge decides (rewards/scorers.py).
        metadata: what else the judge needs; plain data.
        source: where it was read from, as the user wrote it.
    """

    key: str
    token_ids: tuple[int, ...]
    question: str
    ground_truth: str
    verifier: str
    metadata: dict = field(default_factory=dict, compare=False)
    source: str = field(default="", compare=False)


class Dropped(NamedTuple):
    """How many records were left out, and why."""

    too_long: int
    duplicate: int
    no_answer: int  # the ground truth is null or blank: nothing could ever be right


def load_prompts(
    sources: list[str],
    tokenizer: Tokenizer,
    prompt_template: str = "{question}",
    apply_chat_template: bool = False,
    max_prompt_len: int | None = None,
) -> tuple[list[Prompt], Dropped]:
    """Read all sources.

    Args:
        sources: paths of JSON-lines files with `ground_truth_answer` (data/tasks.py: and how it is judged) and one of
            `question`, `prompt`, `messages` (data/records.py says what they mean), or
            `reasoning_gym:NAME?size=500&seed=1`.
        prompt_template: text with {question}.
        apply_chat_template: whether questions become the user's turn of the tokenizer's chat template.
        max_prompt_len: longer prompts, in tokens, are left out; None keeps all.

    Returns:
        (prompts in source order, counts of what was left out). Of two prompts with the same question the first stays.

    Raises:
        DataError: a source cannot be read, or nothing is left.
    """
    prompts: dict[str, Prompt] = {}
    too_long = duplicate = no_answer = 0
    for source in sources:
        if source.startswith(reasoning_gym.PREFIX):
            found = _from_generator(source, tokenizer, prompt_template, apply_chat_template)
        else:
            found = _from_file(source, tokenizer, prompt_template, apply_chat_template)
        for prompt in found:
            if not prompt.ground_truth.strip():
                no_answer += 1
            elif prompt.key in prompts:
                duplicate += 1
            elif max_prompt_len is not None and len(prompt.token_ids) > max_prompt_len:
                too_long += 1
            else:
                prompts[prompt.key] = prompt
    if not prompts:
        limit = "" if max_prompt_len is None else f" of at most {max_prompt_len} tokens"
        raise DataError(
            f"No prompt{limit} was found in {', '.join(sources) or 'an empty list of sources'}. "
            "Give other data or a larger limit."
        )
    return list(prompts.values()), Dropped(too_long, duplicate, no_answer)


def _from_file(path: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool) -> list[Prompt]:
    prompts = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        task = read_task(record, where)
        question, token_ids = prompt_of(task.record, where, tokenizer, prompt_template, apply_chat_template)
        if not token_ids:
            raise DataError(f"{where}: the prompt has no tokens. Give every prompt at least one.")
        prompts.append(
            Prompt(
                content_key(question),
                tuple(token_ids),
                question,
                task.ground_truth,
                task.verifier,
                task.metadata,
                path,
            )
        )
    return prompts


def _from_generator(source: str, tokenizer: Tokenizer, prompt_template: str, apply_chat_template: bool) -> list[Prompt]:
    prompts = []
    for task in reasoning_gym.generate(source):
        token_ids = question_tokens(task.question, tokenizer, prompt_template, apply_chat_template)
        prompts.append(
            Prompt(
                content_key(task.question),
                tuple(token_ids),
                task.question,
                task.answer,
                reasoning_gym.NAME,
                task.metadata,
                source,
            )
        )
    return prompts
