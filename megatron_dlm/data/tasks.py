"""How a record of a prompt file is to be judged.

ground_truth_answer   the expected answer;
verifier              which judge compares it (rewards/scorers.py), by name; mathematics where nothing is said;
options               texts to choose from, which makes the record one of multiple choice: they are put below its
                      `question`, a line each, as "A. text" (a `prompt` or `messages` are taken as they stand), and the
                      answer is a letter or the text of an option;
tests                 make it one of programming, without ground_truth_answer: data/code_tasks.py.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_dlm.config.errors import DataError
from megatron_dlm.config.fields import one_of, suggest
from megatron_dlm.data.choices import LETTERS, plain
from megatron_dlm.data.code_tasks import CODE, is_code_task, read_code_task
from megatron_dlm.data.jsonl import text_field

MATH, CHOICE = "math", "multiple_choice"
FILE_VERIFIERS = (MATH, CHOICE, "judge")  # those that a record may name


class Task(NamedTuple):
    """What a record asks for.

    Attributes:
        record: the record whose prompt is to be read: the same, with its options in the question.
        ground_truth: '' where the record's is null.
        verifier: the judge's name. metadata: what else the judge needs.
    """

    record: dict
    ground_truth: str
    verifier: str
    metadata: dict


def read_task(record: dict, where: str) -> Task:
    """The task of a record.

    Args:
        where: file and line, for the error.

    Raises:
        DataError: its answer is missing, its verifier unknown, or its options are no options.
    """
    if is_code_task(record) and record.get("verifier", CODE) == CODE:
        record, metadata = read_code_task(record, where)
        return Task(record, f"{len(metadata['tests'])} tests", CODE, metadata)
    truth = text_field(record, "ground_truth_answer", where, null="")
    verifier = _verifier(record, where)
    if record.get("options") is None:
        return Task(record, truth, verifier, {})
    options = _options(record["options"], where)
    if verifier == CHOICE and truth.strip():
        _check_answer(truth, options, where)
    if "question" in record:
        lines = [text_field(record, "question", where)]
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
        record = record | {"question": "\n".join(lines)}
    return Task(record, truth, verifier, {"options": options})


def _verifier(record: dict, where: str) -> str:
    if record.get("verifier") is None:
        return MATH if record.get("options") is None else CHOICE
    name = text_field(record, "verifier", where)
    if name not in FILE_VERIFIERS:
        hint = suggest(name, FILE_VERIFIERS, f"Use {one_of(FILE_VERIFIERS)}.")
        raise DataError(f"{where}: 'verifier' is {name[:60]!r}, and a file's prompts have no such judge. {hint}")
    return name


def _options(options: object, where: str) -> list[str]:
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"{where}: 'options' must be a list of 2 to {len(LETTERS)} texts.")
    texts = [
        text_field({"options": option}, "options", f"{where}, option {index}") for index, option in enumerate(options)
    ]
    if len({plain(text) for text in texts}) != len(texts) or not all(text.strip() for text in texts):
        raise DataError(f"{where}: 'options' holds the same text twice, or one without any. Make them differ.")
    return texts


def _check_answer(truth: str, options: list[str], where: str) -> None:
    letters = LETTERS[: len(options)]
    if plain(truth) not in map(plain, options) and truth.strip().upper() not in list(letters):
        raise DataError(
            f"{where}: 'ground_truth_answer' is {truth[:60]!r}, which is no option. Give a letter from A to "
            f"{letters[-1]}, or the text of an option."
        )
