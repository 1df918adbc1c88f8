"""The small passes of training's kernels: they agree here, notice what is broken, and decide what a session takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.errors import DependencyError
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.diffusion.layout import CLEAN
from megatron_dlm.model import attention_backends
from megatron_dlm.model.attention_flex import FlexAttention
from megatron_dlm.model.self_test import attention_pairs, head_pairs
from megatron_dlm.parallel import self_test
from megatron_dlm.training import setup
from megatron_dlm.training.setup import Session
from tests.tiny import Words, model_config, one_process, vocabulary

DEVICE = platform.device()


class BlindAttention(FlexAttention):
    """Takes noisy copies for finished text."""

    def __init__(self, layout) -> None:
        super().__init__(dataclasses.replace(layout, view=torch.full_like(layout.view, CLEAN)))


class BrokenAttention(FlexAttention):
    def __call__(self, *_):
        raise RuntimeError("no valid triton configs")


def worst(pairs) -> float:
    return max(self_test.relative_difference(mine, right) for _, mine, right in pairs)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kernels_and_torch_agree(dtype: torch.dtype, bound: float) -> None:
    pytest.importorskip("triton")
    assert worst(attention_pairs(4, 2, 16, dtype, DEVICE)) < bound
    assert worst(head_pairs(dtype, DEVICE)) < bound


@pytest.fixture
def session(monkeypatch):
    """Makes a session that thinks its kernels are compiled, and can have all of them."""
    monkeypatch.setattr(self_test, "_found", {})
    monkeypatch.setattr(self_test, "_told", set())
    monkeypatch.setattr(self_test, "needed", lambda: True)
    monkeypatch.setattr(attention_backends, "served", lambda name, *_: "flex" if name == "auto" else name)
    monkeypatch.setattr(setup, "by_triton", lambda flag, choice: choice != "torch")

    def of(**settings) -> Session:
        return Session(model_config(), ParallelConfig(**settings), Words(), one_process(), vocabulary())

    return of


@pytest.mark.parametrize("kind, said", [(BlindAttention, "differs by"), (BrokenAttention, "no valid triton configs")])
def test_a_session_does_without_attention_that_does_not_work(session, monkeypatch, capsys, kind, said: str) -> None:
    auto = session(loss_head="torch")
    assert auto.train_state(None, 1).unwrapped_chunks()[0].attention_backend == "flex"
    monkeypatch.setattr(self_test, "_found", {})
    monkeypatch.setitem(attention_backends.KINDS, "flex", kind)
    state = auto.train_state(None, 1)
    assert state.unwrapped_chunks()[0].attention_backend == "dense"
    assert ", dense attention; " in auto.describe(state)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--attention-backend auto is dense here, because") and said in line
    with pytest.raises(DependencyError, match="--attention-backend flex does not work here: .*Use --attention-backend"):
        session(loss_head="torch", attention_backend="flex").train_state(None, 1)


def test_a_session_does_without_a_loss_head_that_does_not_work(session, monkeypatch, capsys) -> None:
    head_triton = pytest.importorskip("megatron_dlm.model.head_triton")
    auto = session(attention_backend="dense")
    assert auto.train_state(None, 1).unwrapped_chunks()[0].fused_head
    monkeypatch.setattr(self_test, "_found", {})
    monkeypatch.setattr(head_triton, "gradient_", lambda logits, *_: logits)
    assert not auto.train_state(None, 1).unwrapped_chunks()[0].fused_head
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--loss-head auto is torch here, because") and "the gradient of hidden states" in line
    with pytest.raises(DependencyError, match="--loss-head triton does not work here: .*Use --loss-head torch."):
        session(attention_backend="dense", loss_head="triton").train_state(None, 1)
