from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megatron_dlm.sft.parcel import ALIGNMENT, pack, unpack
from tests.sft.some_updates import content, of_many_kinds


@dataclass(frozen=True, slots=True)
class Thing:
    rows: list
    number: float | None
    words: dict


def test_a_value_without_tensors() -> None:
    buffer, label = pack(Thing([], 0.1, {"a": [1, None]}))
    assert len(buffer) == ALIGNMENT and unpack(buffer, label) == Thing([], 0.1, {"a": [1, None]})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64, torch.bool])
def test_tensors_of_any_length_lie_on_whole_numbers(dtype: torch.dtype) -> None:
    rows = [[torch.randint(0, 9, (n,)).to(dtype), torch.tensor(True).expand(n)] for n in (3, 0, 1, 16)]
    buffer, label = pack(Thing(rows, None, {}))
    found = unpack(buffer, label)
    assert content(found) == content(Thing(rows, None, {}))
    starts = [tensor.data_ptr() - buffer.data_ptr() for row in found.rows for tensor in row if len(tensor)]
    assert all(start % ALIGNMENT == 0 and 0 <= start < len(buffer) for start in starts)


def test_an_update_of_each_kind() -> None:
    for kind in of_many_kinds():
        for _ in range(8):
            update = next(kind)
            assert content(unpack(*pack(update))) == content(update)
