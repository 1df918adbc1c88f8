"""benchmarks/attention.py at small sizes: its row, what it counts, and that it notices what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import Case, differences, figures, row_layout, visible_pairs
from megatron_dlm.diffusion.layout import visible
from megatron_dlm.model import attention_flex
from megatron_dlm.model.attention import DenseAttention
from megatron_dlm.model.attention_flex import FlexAttention

SMALL = "--prompt 16 --response 48 --heads 4 --kv-heads 2 --width 16 --dtype fp32 --repeats 1"


@pytest.mark.parametrize("views, samples", [(1, 1), (3, 2)])
def test_the_row_and_its_pairs(views: int, samples: int) -> None:
    prompt, blocks, block = 8, 5, 4
    case = Case(prompt, blocks * block, block, views, samples)
    layout = row_layout(case)
    assert len(layout.group) == prompt + samples * (1 + views) * blocks * block
    # A copy of block n, and the finished block itself, see the prompt and the n blocks before, and themselves.
    of_response = sum((1 + views) * block * (prompt + (n + 1) * block) for n in range(blocks))
    expected = sum(block * (n + 1) * block for n in range(prompt // block)) + samples * of_response
    assert visible_pairs(layout) == int(visible(layout, layout).sum()) == expected


def test_all_ways_agree_and_are_written(tmp_path, capsys) -> None:
    file = tmp_path / "figures.json"
    assert attention.main([*SMALL.split(), "--views", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [one["backend"] for one in found] == ["flex", "dense", "whole"]
    assert all(one["error"] is None and one["forward_tflops"] > 0 and one["difference"] < 1e-5 for one in found)
    assert capsys.readouterr().out.count("\n") >= 6
    assert set(figures(SMALL, "cpu")) == {"forward", "backward", "mask", "gain", "gain by group"}


def test_a_backend_that_differs_or_fails_is_told(monkeypatch, capsys) -> None:
    class Wrong(DenseAttention):
        def __call__(self, layer, q, k, v, scale):
            return super().__call__(layer, q, k, v, 1.1 * scale)

    monkeypatch.setitem(attention.BACKENDS, "flex", Wrong)
    assert attention.main(SMALL.split()) == 1
    assert "flex differ by more than rounding" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="FlexAttention differs by"):
        figures(SMALL, "cpu")

    def broken(layout):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(attention.BACKENDS, "flex", broken)
    assert attention.main(SMALL.split()) == 0
    assert "flex was not measured: RuntimeError: no kernel image" in capsys.readouterr().out


def test_what_is_compiled_goes_forward_and_backward(monkeypatch) -> None:
    """Traced as for a GPU: such a graph goes back only once, and one serves both lengths."""
    import torch.nn.attention.flex_attention as torch_flex

    compiled = torch.compile(attention_flex.attend, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention_flex, "compiled", lambda: compiled)
    monkeypatch.setattr(FlexAttention, "_on_cpu", FlexAttention._on_gpu)
    (found,) = attention.measure(Case(16, 496, heads=4, kv_heads=2, width=16, dtype="fp32"), 1, ["flex"])
    assert found.error is None and found.graphs == 1


def test_another_device_than_asked_for_is_refused(capsys) -> None:
    assert attention.main([*SMALL.split(), "--device", "cuda"]) == 2
    with pytest.raises(RuntimeError, match="runs on cpu, not on cuda"):
        figures(SMALL, "cuda")


def test_differences_from_the_oracle() -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        found = differences(dtype)
        assert len(found) == 6 and max(found.values()) < tolerance
        assert dtype == torch.float64 or min(found.values()) > 0
