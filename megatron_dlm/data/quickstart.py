"""A small, complete data set to try the system with: supervised samples, prompts, held-out prompts and a tokenizer.

Either sums of three two-digit numbers, made here, or any file of questions and answers, split here.

  sums     question "47+85+36", response "132+36=\\boxed{168}": the intermediate sum is written out;
  a file   question as it is, response its solution, where it has one, and \\boxed{answer}.

Invariants (tests/data/test_quickstart.py):
  - nothing held out is trained on: no question, and no three operands in any order;
  - what is held out depends on the seed and on num_test, not on how much is trained on;
  - every response is right in the eyes of the math judge, but for those in which the teacher was told to slip.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path

import torch

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.data.jsonl import read_jsonl, text_field, write_jsonl
from megatron_dlm.data.records import content_key
from megatron_dlm.data.train_tokenizer import smallest_vocabulary, train_tokenizer
from megatron_dlm.diffusion.keys import stream, uniforms

WHOLE_TOKENS = ("=\\boxed{", "\\boxed{", "}")  # one token each: short responses, and nothing to misspell
OPERANDS = range(10, 100)
SOURCE_VOCABULARY = 2048
DEFAULT_SUMS = 20_000


@dataclass(frozen=True, slots=True)
class Split:
    """Records of the three files: `sft` has question and response, the other two question and ground_truth_answer."""

    sft: list[dict]
    prompts: list[dict]
    heldout: list[dict]


def sums(seed: int, num_train: int | None, num_test: int, num_sft: int | None = None, slips: float = 0.0) -> Split:
    """Three-term sums. Samples, prompts and held-out prompts have no three operands in common.

    Args:
        seed: names the draw.
        num_train: number of prompts; None for 20,000.
        num_test: number of held-out prompts.
        num_sft: number of supervised samples; None for as many as prompts.
        slips: share of the supervised samples whose teacher slipped: one of the two sums is off by 1 or by 10.

    Raises:
        ConfigError: there are not that many sums.
    """
    num_train = DEFAULT_SUMS if num_train is None else num_train
    num_sft = num_train if num_sft is None else num_sft
    triples = list(combinations_with_replacement(OPERANDS, 3))
    _check_sizes(num_train, num_test, num_sft, slips)
    wanted = num_test + num_sft + num_train
    if wanted > len(triples):
        raise ConfigError(
            f"There are {len(triples)} sums of three two-digit numbers, too few for {num_test} held out, "
            f"{num_sft} supervised samples and {num_train} prompts. Use --num-train "
            f"{max((len(triples) - num_test) // 2, 1)} or less, without a --num-sft larger than that."
        )
    triples.sort(key=lambda triple: stream(seed, "quickstart-sums", *triple))
    records = [_sum(seed, triple) for triple in triples[:wanted]]
    sft = records[num_test : num_test + num_sft]
    return Split(
        sft=[{"question": record["question"], "response": _teacher(seed, record["question"], slips)} for record in sft],
        prompts=[_prompt(record) for record in records[num_test + num_sft :]],
        heldout=[_prompt(record) for record in records[:num_test]],
    )


def from_source(path: str | Path, seed: int, num_train: int | None, num_test: int, num_sft: int | None = None) -> Split:
    """Split a file of questions and answers.

    Samples and prompts are made from the same questions, held-out prompts from others.

    Args:
        path: JSON lines with `question`, `ground_truth_answer` and, if there is one, `solution` or `response`.
        seed: names the draw.
        num_train: number of questions to train on; None for all that are not held out.
        num_test: number of held-out questions.
        num_sft: how many of the questions to train on become supervised samples; None for all of them.

    Raises:
        DataError: the file cannot be read or is too small.
    """
    _check_sizes(num_train, num_test, num_sft)
    records: dict[str, dict] = {}
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        question, answer = (
            text_field(record, "question", where),
            text_field(record, "ground_truth_answer", where, null=""),
        )
        if not answer.strip():
            continue  # nothing to learn, nothing to judge
        solution = next((text_field(record, name, where) for name in ("solution", "response") if record.get(name)), "")
        records.setdefault(
            content_key(question), {"question": question, "answer": answer, "response": _boxed(solution, answer)}
        )
    wanted = num_test + (1 if num_train is None else num_train)
    if len(records) < wanted:
        raise DataError(
            f"{path} has {len(records)} different questions with an answer, "
            f"but {num_test} held out and {wanted - num_test} to train on are asked for. "
            "Use a larger file, or lower --num-test or --num-train."
        )
    order = sorted(records, key=lambda key: stream(seed, "quickstart-source", key))
    train = [records[key] for key in order[num_test : None if num_train is None else wanted]]
    return Split(
        sft=[{"question": record["question"], "response": record["response"]} for record in train[:num_sft]],
        prompts=[_prompt(record) for record in train],
        heldout=[_prompt(records[key]) for key in order[:num_test]],
    )


def write(split: Split, folder: str | Path, vocab_size: int) -> int:
    """Write sft.jsonl, prompts.jsonl, heldout.jsonl and tokenizer/, trained on the first two.

    Returns:
        The size of the vocabulary.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("sft", "prompts", "heldout"):
            write_jsonl(folder / f"{name}.jsonl", getattr(split, name))
    except OSError as error:
        raise DataError(f"The data cannot be written to {folder} ({error}). Choose another folder.") from None
    texts = [text for record in (*split.sft, *split.prompts) for text in record.values()]
    return train_tokenizer(texts, vocab_size, folder / "tokenizer", WHOLE_TOKENS)


def make(
    folder: str | Path,
    source: str | None,
    seed: int,
    num_train: int | None,
    num_test: int,
    num_sft: int | None = None,
    slips: float = 0.0,
) -> str:
    """The whole tool: make or split, write, and say in one line what was written."""
    if source is None:
        split, vocab_size = sums(seed, num_train, num_test, num_sft, slips), smallest_vocabulary(WHOLE_TOKENS)
    else:
        split, vocab_size = from_source(source, seed, num_train, num_test, num_sft), SOURCE_VOCABULARY
    size = write(split, folder, vocab_size)
    counts = f"{len(split.sft)} supervised samples, {len(split.prompts)} prompts, {len(split.heldout)} held-out prompts"
    return f"Wrote {counts} and a tokenizer of {size} tokens to {folder}."


def _check_sizes(num_train: int | None, num_test: int, num_sft: int | None, slips: float = 0.0) -> None:
    if not 0 <= slips <= 1:
        raise ConfigError(f"--slips is {slips}. Give the share of wrong demonstrations, from 0 to 1.")
    if num_test < 1 or any(number is not None and number < 1 for number in (num_train, num_sft)):
        raise ConfigError(
            f"--num-train, --num-sft and --num-test must be at least 1 (they are {num_train}, {num_sft} and "
            f"{num_test})."
        )


def _sum(seed: int, triple: tuple[int, int, int]) -> dict:
    ordered = sorted(enumerate(triple), key=lambda entry: stream(seed, "quickstart-order", *triple, entry[0]))
    a, b, c = (value for _, value in ordered)
    return {"question": f"{a}+{b}+{c}", "answer": str(a + b + c)}


def _teacher(seed: int, question: str, slips: float) -> str:
    """The worked answer to a sum, by a teacher who slips in a share of the questions, in the first sum or in the
    second.
    """
    a, b, c = map(int, question.split("+"))
    slipped, where, size = uniforms(stream(seed, "quickstart-slip", question), torch.arange(3)).tolist()
    slip = (-10, -1, 1, 10)[int(4 * size)] if slipped < slips else 0
    first = a + b + (slip if where < 0.5 else 0)
    return f"{first}+{c}=\\boxed{{{first + c + (slip if where >= 0.5 else 0)}}}"


def _prompt(record: dict) -> dict:
    return {"question": record["question"], "ground_truth_answer": record["answer"]}


def _boxed(solution: str, answer: str) -> str:
    return f"{solution.rstrip()}\n\\boxed{{{answer}}}" if solution.strip() else f"\\boxed{{{answer}}}"
