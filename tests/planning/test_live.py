"""Bytes of tensors that come and go, against counts by hand."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from megatron_dlm.planning.live import LiveBytes, SavedBytes


def test_what_comes_goes():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        assert live.now == 4000
        b = a + 1
        del a
        assert (live.now, live.peak) == (4000, 8000)
        del b
    assert (live.now, live.peak) == (0, 8000)


def test_views_and_changes_in_place_are_no_new_bytes():
    with LiveBytes() as live:
        a = torch.zeros(100)
        a.view(10, 10)[2].add_(1)
        assert live.peak == 400


def test_what_was_there_before_does_not_count():
    a = torch.zeros(100)
    with LiveBytes() as live:
        a.mul_(2)
        assert live.peak == 0


def test_saved_storages_count_once_and_without_parameters():
    weight = torch.ones(10, 10, requires_grad=True)
    saved = SavedBytes([weight])
    with saved.counting():
        x = torch.ones(5, 10, requires_grad=True) * 1  # what multiplies by a number keeps nothing
        y = (x @ weight).tanh() + (x @ weight).sigmoid()
        loss = y.sum()
    assert saved.total() == 4 * (50 + 50 + 50)  # x for both products once, and the two results
    del loss, y, x
    assert saved.total() == 0


def test_recomputation_saves_its_input_only():
    x = torch.ones(100, requires_grad=True) * 1
    saved = SavedBytes()
    with saved.counting():
        y = checkpoint(lambda z: z.tanh().tanh().tanh(), x, use_reentrant=True)
    assert saved.total() == 400
    del y
