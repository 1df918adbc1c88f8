from __future__ import annotations

import multiprocessing

import pytest
import torch

from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.sft.loader import open_loader
from tests.sft.some_updates import MISTAKE, Several, check_a_process_ahead, content, of_many_kinds

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
DALI, CPU = "dali", torch.device("cpu")


def test_the_updates_of_the_default_loader() -> None:
    """Of all kinds, through a pipeline that asks for them in this process; each is kept while others come."""
    before = set(multiprocessing.active_children())
    loader = open_loader(Several(of_many_kinds(), 8), SFTConfig(dataloader_type=DALI, num_workers=0), CPU)
    found = [next(loader) for _ in range(24)]
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(Exception, match=MISTAKE):
        next(loader)
    loader.close()
    expected = [next(kind) for kind in of_many_kinds() for _ in range(8)]
    assert [content(one) for one in found] == [content(one) for one in expected]


def test_a_process_ahead() -> None:
    check_a_process_ahead(lambda many: open_loader(many, SFTConfig(dataloader_type=DALI), CPU))
