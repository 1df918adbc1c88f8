"""Values of a packed row, against single denoising states under an explicit mask; what the head is; its precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.rows import build_row
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, states, trace_item
from tests.tiny import (
    disturb,
    explicit_logits,
    furthest,
    gradients,
    make_model,
    make_session,
    make_state,
    model_config,
    one_process,
)


def make_value(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object):
    groups = one_process()
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.model.value import ValueModel

    config = model_config(**changes)
    with platform.cuda_calls_on_cpu():
        model = ValueModel(
            transformer_config(config, ParallelConfig(), dtype=dtype), model_shape(config), groups.pg_collection
        )
    return disturb(model, seed).to(platform.device())


def naive_values(model, trace, grid: Grid, shrinkage: int, shift: int) -> dict[int, torch.Tensor]:
    """The value of each response token, from one forward pass per state over one plain text."""
    found = {}
    for seen in states(trace, grid, shrinkage):
        blocks = torch.tensor(seen.block_of)
        values = explicit_logits(
            model,
            torch.tensor(seen.shown),
            torch.arange(len(seen.shown)),
            blocks[None, :] <= blocks[:, None],
            torch.tensor([max(position - shift, 0) for position in seen.decided]),
        )
        found |= dict(zip([position - len(trace.prompt_ids) for position in seen.decided], values))
    return found


CASES = {
    "block": dict(block_size=4),
    "block, shrinkage": dict(block_size=4, shrinkage=2),
    "full attention": dict(block_size=None),
    "logits ahead": dict(block_size=4, logit_shift=1),
    "full attention, logits ahead": dict(block_size=None, logit_shift=1),
    "tied embeddings": dict(block_size=4, untie_embeddings_and_output_weights=False),
}


@pytest.mark.parametrize("case", CASES)
def test_is_the_value_of_single_denoising_states(case: str) -> None:
    changes = dict(CASES[case])
    shrinkage, block, shift = changes.pop("shrinkage", 1), changes.pop("block_size"), changes.get("logit_shift", 0)
    if block is None:
        changes["full_attention"] = True
    model, grid = make_value(block_size=block, **changes), Grid(block)
    traces = random_group(5, [6, 3, 9], block or 4, np.random.default_rng(2), "p")
    items = [(n, trace_item(trace, grid, shrinkage)) for n, trace in enumerate(traces)]
    length = items[0][1].shared_length + sum(item.own_length for _, item in items) + 5
    row = build_row(items, length, MASK_ID, PAD_ID).to(platform.device())
    values = model.forward_row(row)
    slow = [naive_values(model, trace, grid, shrinkage, shift) for trace in traces]
    targets = list(zip(row.targets.response.tolist(), row.targets.index.tolist()))
    expected = torch.stack([slow[response][index] for response, index in targets])
    assert len(targets) == sum(len(trace.response_ids) for trace in traces) and values.shape == expected.shape
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    assert values.std() > 0.1
    weight = torch.linspace(-1, 1, len(values), dtype=torch.float64, device=values.device)
    loss, slow_loss = ((weight * one.square()).sum() for one in (values, expected))
    assert furthest(gradients(model, loss), gradients(model, slow_loss)) < 1e-9


@pytest.mark.parametrize("tied", [False, True])
def test_is_the_policy_with_another_head(tied: bool) -> None:
    policy = {name for name, _ in make_state(untie_embeddings_and_output_weights=not tied).named_parameters()}
    mine = {name for name, _ in make_value(untie_embeddings_and_output_weights=not tied).named_parameters()}
    assert policy - mine == (set() if tied else {"output_layer.weight"})
    assert mine - policy == {"value_head.weight"}


@pytest.mark.parametrize("changes", [{}, dict(num_experts=4, moe_router_topk=2)])
def test_begins_as_the_policy_that_expects_nothing(changes: dict) -> None:
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.training.backbone import copy_backbone

    session = make_session(**changes)
    policy = session.train_state(None, 1)
    value = session.value_state(OptimizerConfig(optimizer="sgd", lr=1.0, clip_grad=0.0), 4)
    disturb(policy.module, 3)
    assert copy_backbone(policy, value) == ["value_head.weight"]
    there = dict(policy.named_parameters())
    for name, parameter in value.named_parameters():
        assert not parameter.any() if name == "value_head.weight" else torch.equal(parameter, there[name]), name
    trace = random_group(5, [6], 4, np.random.default_rng(2), "p")[0]
    row = build_row([(0, trace_item(trace, Grid(4)))], 64, MASK_ID, PAD_ID).to(platform.device())
    assert not value.module.forward_row(row).any()
    # The optimizer has the same weights: a step without gradients leaves them.
    with platform.cuda_calls_on_cpu():
        value.optimizer.step()
    assert all(torch.equal(p, there[name]) for name, p in value.named_parameters() if name in there)


def test_another_shape_is_not_copied() -> None:
    from megatron_dlm.training.backbone import copy_backbone

    policy, value = make_session().train_state(None, 1), make_session(ffn_hidden_size=64).value_state(None, 1)
    with pytest.raises(ValueError, match="linear_fc1"):
        copy_backbone(policy, value)


def test_values_of_a_bf16_model_are_fp32_numbers() -> None:
    """The head's sum is not rounded to bf16 once more."""
    wide, narrow = make_value(torch.float64), make_value(torch.bfloat16)
    trace = random_group(5, [9], 4, np.random.default_rng(2), "p")[0]
    row = build_row([(0, trace_item(trace, Grid(4)))], 64, MASK_ID, PAD_ID).to(platform.device())
    values = narrow.forward_row(row)
    assert values.dtype == torch.float32 and (values != values.bfloat16()).any()
    assert (values.double() - wide.forward_row(row)).norm() < 0.2 * wide.forward_row(row).norm()
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).to(platform.device(), torch.bfloat16)
    exact = hidden.double() @ narrow.value_head.weight.double()[0]
    torch.testing.assert_close(narrow.head(hidden).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [make_model, make_value])
def test_a_row_of_padding_gives_every_parameter_a_gradient(make) -> None:
    """Of zeros. Where gradients are reduced as they come, one that never comes is waited for in vain."""
    model = make()
    row = build_row([], 64, MASK_ID, PAD_ID).to(platform.device())
    output = model.forward_row(row)
    assert len(output) == 0 and output.requires_grad
    output.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
