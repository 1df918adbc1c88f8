"""Rows of fine-tuning hold hardly any padding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.packing import made_up, measure, read
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.data.tokenizer import Tokenizer

TEST_DATA = Path(os.environ.get("MEGATRON_DLM_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
LARGEST = 0.03


@pytest.mark.parametrize(("batch", "ranks"), [(128, 1), (128, 4), (256, 1), (256, 4)])
def test_texts_of_such_lengths_waste_under_three_percent(batch: int, ranks: int) -> None:
    assert measure(made_up(1024), 4096, 4, batch, ranks, updates=4).mean < LARGEST


def test_real_texts_waste_under_three_percent() -> None:
    files = [str(TEST_DATA / name) for name in ("gsm8k_test.jsonl", "math500.jsonl")]
    tokenizer = TEST_DATA / "qwen3_tokenizer"
    if not all(os.path.exists(path) for path in [*files, tokenizer]):
        pytest.skip("no such files in MEGATRON_DLM_TEST_DATA")
    words = Tokenizer(tokenizer)
    samples = read(files, words)
    for batch, ranks in ((128, 4), (256, 1)):
        found = measure(samples, 4096, 4, batch, ranks, words.mask_id, words.pad_id, updates=4)
        assert found.mean < LARGEST, (batch, ranks)


def test_padding_is_counted() -> None:
    """Three texts of one block of 64 tokens, in rows that hold one of them: of two rows for each of two ranks, one is
    empty."""
    samples = [Sample(f"{n:032x}", (1,) * 32, (n,) * 32) for n in range(3)]
    waste = measure(samples, 100, 64, 3, 2, updates=1)
    assert waste.mean == waste.worst == 1 / 4 and waste.rows == 4
