"""Weights in FP8: the numbers, the product, and which layers have them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tiny import make_model, one_process

one_process()  # megatron-core must not be imported before the platform is ready

from megatron_dlm.model import fp8  # noqa: E402
from megatron_dlm.parallel.self_test import relative_difference  # noqa: E402


def numbers_of_e4m3() -> list[float]:
    """All that are not negative, from their bits: sign, 4 of the exponent, 3 of the fraction; the last is no number."""
    found = []
    for bits in range(127):
        exponent, fraction = bits >> 3, bits & 7
        found.append((1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction / 8 * 2.0**-6)
    return found


def drawn(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of very different sizes; the second is zeros."""
    generator = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, columns, generator=generator) * 10.0 ** torch.arange(-3, rows - 3)[:, None].clamp(max=4)
    wide[1] = 0
    return wide.to(dtype)


def test_each_number_is_the_nearest_under_the_scale_of_its_row() -> None:
    wide = drawn(5, 40)
    data, scale = fp8.quantise_rows(wide)
    assert data.dtype == fp8.FP8 and scale.shape == (5, 1) and scale.dtype == torch.float32
    there = numbers_of_e4m3()
    for row in range(5):
        largest = max(abs(value) for value in wide[row].tolist())
        assert scale[row].item() == pytest.approx(max(largest, 1e-30) / 448, rel=1e-6)
        for mine, right in zip(data[row].float().tolist(), wide[row].tolist()):
            right /= scale[row].item()
            nearest = min(abs(abs(right) - number) for number in there)
            assert abs(mine - right) <= nearest + 1e-4 * abs(right) and mine * right >= 0
    assert data[0].float().abs().max() == 448 and not data[1].float().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_the_dequantised_numbers(dtype: torch.dtype) -> None:
    x, weight = drawn(7, 48), drawn(6, 48)
    given = [fp8.quantise_rows(one) for one in (x, weight)]
    found = fp8.scaled_product(*given[0], *given[1], dtype)
    right = torch.zeros(7, 6, dtype=torch.float64)
    (x8, x_scale), (w8, w_scale) = [[part.double() for part in one] for one in given]
    for token in range(7):
        for output in range(6):
            right[token, output] = sum((x8[token] * x_scale[token]) * (w8[output] * w_scale[output]))
    assert found.dtype == dtype
    assert relative_difference(found, right) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    assert 1e-3 < relative_difference(found, x.double() @ weight.double().t()) < 0.05  # it is rounded, and near
    assert fp8.scaled_product(*[part[:0] for part in given[0]], *given[1], dtype).shape == (0, 6)


def test_the_operation_of_a_gpu_means_the_same() -> None:
    """A torch newer than 2.11 emulates it on a CPU, where it takes the layouts and scales that a GPU is given."""
    x, weight = fp8.quantise_rows(drawn(7, 48)), fp8.quantise_rows(drawn(32, 48))
    options = dict(out_dtype=torch.bfloat16, use_fast_accum=False)
    try:
        found = torch._scaled_mm(x[0], weight[0].t(), x[1], weight[1].t(), **options)
    except RuntimeError as error:
        if "only supports per-tensor scaling" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__} emulates one scale for a whole tensor, and none for each row")
    assert relative_difference(fp8.scaled_product(*x, *weight, torch.bfloat16), found) < 4e-3


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_operation_of_a_gpu_takes_what_it_is_given(tokens: int) -> None:
    """torch checks layouts and scales of tensors that only say that they are on a GPU."""
    made = lambda rows, columns: (torch.empty(rows, columns, dtype=fp8.FP8), torch.empty(rows, 1))
    with FakeTensorMode(), torch.device("cuda", 0):
        found = fp8.scaled_product(*made(tokens, 48), *made(32, 48), torch.bfloat16)
        assert found.shape == (tokens, 32) and found.dtype == torch.bfloat16 and found.is_cuda
        with pytest.raises(RuntimeError, match="divisible by 16"):
            fp8.scaled_product(*made(tokens, 40), *made(32, 40), torch.bfloat16)


def test_one_kernel_rounds_activations(monkeypatch) -> None:
    """What Triton's interpreter can show: it converts exact numbers only (for the rest, see test_kernels.py)."""
    pytest.importorskip("triton")
    from megatron_dlm.model import fp8_triton

    exact = torch.tensor([number * sign for number in numbers_of_e4m3() for sign in (1, -1)])
    wide = torch.stack([exact, exact.flip(0) / 8, 0 * exact, exact.roll(9) * 16]).bfloat16()
    wide[3, 100:] = 0
    wide[3, 7] = -448 * 16
    for block in (4096, 64):
        monkeypatch.setattr(fp8_triton, "_BLOCK", block)
        for given in (wide, wide[:, :50].clone(), wide[:0]):
            (data, scale), (right, right_scale) = fp8_triton.quantise_rows(given), fp8.quantise_rows(given)
            assert torch.equal(scale, right_scale)
            if given.shape[1] > 50:
                assert torch.equal(data.view(torch.uint8) & 127, right.view(torch.uint8) & 127)
                assert torch.equal(data.float(), right.float())


def test_the_layers_of_attention_and_feed_forward_keep_fp8(monkeypatch) -> None:
    monkeypatch.setattr(fp8, "_ELEMENTS_AT_ONCE", 100)  # several parts
    experts = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=16)
    model = make_model(torch.bfloat16, add_qkv_bias=True, **experts)
    wide = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = sum(parameter.nbytes for parameter in model.parameters())
    fp8.hold_in_fp8(model)
    layers = dict(fp8.fp8_layers(model))
    kinds = {name.split(".")[-2] for name in layers}
    assert kinds == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert len(layers) == 2 * (2 + 2 * 5)  # layers; attention, four experts and the shared one
    for name, parameter in model.named_parameters():
        assert (parameter.dtype == fp8.FP8) == (name in layers)
    for name, layer in layers.items():
        fp8.load(layer, wide[name])
        assert fp8.holds(layer, wide[name])
    saved = sum(layer.weight.numel() for layer in layers.values())
    assert before - sum(parameter.nbytes for parameter in model.parameters()) == saved
    name, layer = next(iter(layers.items()))
    other = wide[name].clone()
    other[0, 0] += other[0].abs().max() / 8
    assert not fp8.holds(layer, other)
    hidden = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for path in ("self_attention.linear_qkv", "mlp.experts.local_experts.1.linear_fc2"):
        name = f"decoder.layers.1.{path}.weight"
        layer = layers[name]
        data, scale = fp8.quantise_rows(wide[name])
        output, _ = layer(hidden)
        right = fp8.scaled_product(*fp8.quantise_rows(hidden[:, 0]), data, scale, torch.bfloat16)
        bias = 0 if layer.bias is None else layer.bias
        assert torch.equal(output[:, 0], right + bias)
