"""Tokenizers for the tests of data: a tiny one, trained here, and a real one where the shared test data are present."""

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
def qwen() -> Tokenizer:
    folder = TEST_DATA / "qwen3_tokenizer"
    if not folder.is_dir():
        pytest.skip("no qwen3_tokenizer in MEGATRON_DLM_TEST_DATA")
    return Tokenizer(folder)
