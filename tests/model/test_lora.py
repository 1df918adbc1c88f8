"""Adapters on one process: against a model whose weights are the merged ones, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dlm.config.lora import LoraConfig
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group
from tests.tiny import make_model

EVERY = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def adapted(targets: list[str] = EVERY, **changes: object):
    """A float64 model with adapters that are far from nothing."""
    from megatron_dlm.model.lora import attach, freeze_all_but_adapters

    model = make_model(**changes)
    attach(model, LoraConfig(3, 6.0, targets), seed=1)
    freeze_all_but_adapters(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.b"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def row():
    """A packed row of a trace."""
    from megatron_dlm.diffusion.layout import Grid
    from megatron_dlm.diffusion.rows import build_row
    from megatron_dlm.rl.methods import replay

    traces = random_group(5, [7, 4], 4, np.random.default_rng(0), "p")
    items = [(number, replay(Grid(4)).item(trace, 0)) for number, trace in enumerate(traces)]
    return build_row(items, 96, MASK_ID, PAD_ID)


def loss_of(model) -> Tensor:
    logits = model.forward_row(row())
    return (logits.log_softmax(-1) * torch.cos(torch.arange(logits.numel()).view_as(logits) * 1.0)).sum()


@pytest.mark.parametrize("targets", [EVERY, ["linear_proj"], ["linear_fc1"]], ids=" ".join)
def test_values_and_gradients_are_those_of_the_merged_model(targets: list[str]) -> None:
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW from a plain model of the merged weights."""
    model, naive = adapted(targets), make_model()
    plain = dict(naive.named_parameters())
    factors = {
        name: (parameter, dict(model.named_parameters())[name[:-1] + "b"])
        for name, parameter in model.named_parameters()
        if name.endswith("lora.a")
    }
    assert len(factors) == 2 * len(targets)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            plain[name.removesuffix("lora.a") + "weight"] += 6.0 / 3 * b @ a
    found, expected = loss_of(model), loss_of(naive)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward(), expected.backward()
    for name, (a, b) in factors.items():
        of_weight = plain[name.removesuffix("lora.a") + "weight"].grad
        for got, wanted in ((a.grad, 2 * b.T @ of_weight), (b.grad, 2 * of_weight @ a.T)):
            assert wanted.norm() > 1e-3 and (got - wanted).norm() <= 1e-10 * wanted.norm(), name
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if ".lora." in name}


def test_a_new_adapter_changes_nothing_and_has_drawn_a_as_its_key_says() -> None:
    from megatron_dlm.model.lora import adapted_layers, attach, detach

    model, plain = make_model(), make_model()
    before = loss_of(model)
    attach(model, LoraConfig(8), seed=5)
    assert torch.equal(loss_of(model), before)
    drawn = {name: layer.lora.a.detach().clone() for name, layer in adapted_layers(model)}
    values = torch.cat([a.flatten() * a.shape[1] ** 0.5 for a in drawn.values()])
    assert abs(values.mean()) < 0.05 and values.std().item() == pytest.approx(1, abs=0.05)
    assert len({value for a in drawn.values() for value in a.flatten().tolist()}) == values.numel()
    attach(plain, LoraConfig(8), seed=6)
    assert not any(torch.equal(layer.lora.a, drawn[name]) for name, layer in adapted_layers(plain))
    detach(model)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in make_model().named_parameters()}
    attach(model, LoraConfig(8), seed=5)
    assert all(torch.equal(layer.lora.a, drawn[name]) for name, layer in adapted_layers(model))


def test_merging_into_the_weights() -> None:
    from megatron_dlm.model.lora import detach, merge_into_weights

    model = adapted()
    before = loss_of(model).item()
    merge_into_weights(model)
    detach(model)
    assert loss_of(model).item() == pytest.approx(before, rel=1e-12)
    assert loss_of(make_model()).item() != pytest.approx(before, rel=1e-3)


def test_layers_of_experts_get_none() -> None:
    from megatron_dlm.model.lora import adapted_layers

    model = adapted(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=16)
    assert {name.split(".")[-2] for name, _ in adapted_layers(model)} == {"linear_qkv", "linear_proj"}
