"""Tokenizers for the tests of data: tiny ones of both kinds, trained here, and a real one where there are test data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.data.train_tokenizer import train_tokenizer

TEST_DATA = Path(os.environ.get("MEGATRON_DLM_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["12+34+56=", "46+56=\\boxed{102}", "how many apples are there"], 280, folder, ["\\boxed{", "}"])
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> Tokenizer:
    return Tokenizer(tiny_folder)


@pytest.fixture(scope="session")
def pieces_folder(tmp_path_factory) -> Path:
    pytest.importorskip("sentencepiece")
    from megatron_dlm.data.train_sentencepiece import train_sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    texts = ["12+34+56=", "46+56=\\boxed{102}", "how many apples are there", "how many, how are"]
    train_sentencepiece(texts, 310, folder, ["\\boxed{", "}"])
    return folder


@pytest.fixture(scope="session")
def pieces(pieces_folder) -> Tokenizer:
    return Tokenizer(pieces_folder)


@pytest.fixture(scope="session")
def qwen_folder() -> Path:
    folder = TEST_DATA / "qwen3_tokenizer"
    if not folder.is_dir():
        pytest.skip("no qwen3_tokenizer in MEGATRON_DLM_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_folder) -> Tokenizer:
    return Tokenizer(qwen_folder)
