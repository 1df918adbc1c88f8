"""The hash of a checkpoint: the same elsewhere, another after any change that training makes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from megatron_dlm.checkpoint.digest import PIECE, digest
from megatron_dlm.config.checkpoint import LoadConfig
from megatron_dlm.config.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    """What lies in a folder of HuggingFace: weights, of which each piece is other than the next, and settings."""
    where = tmp_path / "hf"
    where.mkdir()
    for name, size in (("a.safetensors", 10 * PIECE), ("b.safetensors", 100)):
        (where / name).write_bytes(np.random.default_rng(size).bytes(size))
    (where / "config.json").write_text("{}")
    (where / "README.md").write_text("x")
    return where


def of(folder) -> str:
    return digest(LoadConfig(hf_checkpoint=str(folder)))


def test_a_copy_is_the_same_checkpoint(folder, tmp_path) -> None:
    before = of(folder)
    (folder / "README.md").write_text("another")
    assert of(folder) == before == of(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "name, at", [("a.safetensors", 0), ("a.safetensors", 5 * PIECE), ("a.safetensors", -1), ("b.safetensors", 50)]
)
def test_other_weights_are_another(folder, name: str, at: int) -> None:
    before, content = of(folder), bytearray((folder / name).read_bytes())
    content[at] ^= 1
    (folder / name).write_bytes(content)
    assert of(folder) != before


def test_other_files_are_another(folder) -> None:
    found = {of(folder)}
    (folder / "b.safetensors").rename(folder / "c.safetensors")
    found.add(of(folder))
    (folder / "config.json").write_text("{ }")
    found.add(of(folder))
    (folder / "c.safetensors").unlink()
    assert len(found | {of(folder)}) == 4


def test_a_checkpoint_of_ours_is_that_of_its_iteration(folder, tmp_path) -> None:
    from megatron_dlm.checkpoint.distributed import save
    from tests.tiny import make_state

    for step in (1, 2):
        save(make_state(seed=step), tmp_path / "ckpt", step, {}, with_optimizer=False)
    newest, first = (digest(LoadConfig(load=str(tmp_path / "ckpt"), ckpt_step=step)) for step in (None, 1))
    assert newest == digest(LoadConfig(load=str(tmp_path / "ckpt"), ckpt_step=2)) != first
    with pytest.raises(CheckpointError, match="iter_0000003 is missing"):
        digest(LoadConfig(load=str(tmp_path / "ckpt"), ckpt_step=3))
