"""The kernels of the loss head against what torch makes of the same logits; without a GPU in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.model import head
from megatron_dlm.model.head import label_policy
from megatron_dlm.model.policy import Vocabulary

pytest.importorskip("triton")

WIDTH, DEVICE = 6, platform.device()


def inputs(targets: int, columns: int, vocabulary: Vocabulary, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states, weight, labels, and a weight of each target in a loss."""
    generator = torch.Generator().manual_seed(columns)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    labels = torch.randint(0, vocabulary.size, (targets,), generator=generator)
    labels[labels == vocabulary.mask_id] = (vocabulary.mask_id + 1) % vocabulary.size
    hidden, weight = draw(targets, WIDTH), 2 * draw(columns, WIDTH)
    leaves = [one.to(DEVICE, dtype).requires_grad_() for one in (hidden, weight)]
    return *leaves, labels.to(DEVICE), draw(targets).to(DEVICE)


def passes(given: tuple[Tensor, ...], temperature: Tensor | float, vocabulary: Vocabulary, chunk: int, fused: bool):
    """Values of both passes: log-probabilities, entropies, gradients of hidden states and weight."""
    hidden, weight, labels, share = given
    values = label_policy(hidden, weight, labels, temperature, vocabulary, None, chunk, True, fused)
    loss = (share * values[0]).sum() + 0.3 * (share * values[1].sin()).sum()
    return [one.detach() for one in (*values, *torch.autograd.grad(loss, (hidden, weight)))]


def doubled(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return *(one.detach().double().requires_grad_() for one in given[:2]), *given[2:]


@pytest.mark.parametrize(
    "columns, vocabulary",
    [
        (7, Vocabulary(7, 3)),
        (64, Vocabulary(64, 63)),
        (200, Vocabulary(190, 70)),
        (9001, Vocabulary(8990, 0)),
    ],
    ids=["a few tokens", "one block", "padding", "several blocks"],
)
@pytest.mark.parametrize("kind", [1.0, 0.7, "one for each"])
def test_values_and_gradients_are_those_in_float64(columns: int, vocabulary: Vocabulary, kind: float | str) -> None:
    targets = 9 if columns < 1000 else 3
    given = inputs(targets, columns, vocabulary, torch.float32)
    temperature = torch.linspace(0.5, 2.0, targets, device=DEVICE) if isinstance(kind, str) else kind
    found, by_torch = (passes(given, temperature, vocabulary, 4, fused) for fused in (True, False))
    wanted = passes(doubled(given), temperature, vocabulary, 4, False)
    for mine, other, right in zip(found, by_torch, wanted):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() < 1.1 * (other - right).norm() + 1e-7 * right.norm()
    for mine, right in zip(found[:2], wanted):
        torch.testing.assert_close(mine.double(), right, rtol=1e-6, atol=1e-6)
    assert not found[3][vocabulary.mask_id].any() and not found[3][vocabulary.size :].any()


def test_rounds_no_worse_than_torch_in_bfloat16() -> None:
    """Each error is at most that of torch's operations on the same logits, but for the order of sums."""
    vocabulary = Vocabulary(290, 7)
    given = inputs(9, 300, vocabulary, torch.bfloat16)
    results = [passes(given, 0.7, vocabulary, 4, fused) for fused in (True, False)]
    for mine, other, right in zip(*results, passes(doubled(given), 0.7, vocabulary, 4, False)):
        assert mine.dtype == other.dtype
        floor = torch.finfo(mine.dtype).eps * right.norm()
        assert (mine - right).norm() < 1.1 * (other - right).norm() + floor


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_loss_of_one_output_only(with_entropy: bool) -> None:
    vocabulary = Vocabulary(60, 5)
    given = inputs(9, 64, vocabulary, torch.float32)
    gradients = []
    for fused, (hidden, weight, labels, share) in ((True, given), (False, doubled(given))):
        values = label_policy(hidden, weight, labels, 0.7, vocabulary, None, 4, with_entropy, fused)
        assert (values[1] is None) != with_entropy
        gradients.append(torch.autograd.grad((share * values[int(with_entropy)]).sum(), (hidden, weight)))
    for mine, right in zip(*gradients):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


def test_no_targets_have_a_gradient_of_zeros() -> None:
    vocabulary = Vocabulary(60, 5)
    hidden, weight, labels, _ = inputs(0, 64, vocabulary, torch.float32)
    logprob, entropies = label_policy(hidden, weight, labels, 1.0, vocabulary, None, 4, True, True)
    assert logprob.shape == entropies.shape == (0,)
    (logprob.sum() + entropies.sum()).backward()
    assert hidden.grad.shape == (0, WIDTH) and not weight.grad.any()


def test_tokens_outside_the_policy_have_no_probability() -> None:
    vocabulary = Vocabulary(60, 5)
    hidden, weight, labels, _ = inputs(9, 64, vocabulary, torch.float32)
    labels[:3] = torch.tensor([5, 60, 63])
    logprob, _ = label_policy(hidden, weight, labels, 1.0, vocabulary, None, 4, fused=True)
    assert (logprob[:3] == -math.inf).all() and torch.isfinite(logprob[3:]).all()


def test_float64_is_left_to_torch() -> None:
    given = doubled(inputs(3, 64, Vocabulary(60, 5), torch.float32))
    both = [passes(given, 0.7, Vocabulary(60, 5), 2, fused) for fused in (True, False)]
    assert all(torch.equal(*pair) for pair in zip(*both))


@pytest.mark.parametrize(
    "vocabulary",
    [Vocabulary(95, 70), Vocabulary(40, 3), Vocabulary(51, 50)],
    ids=["mask in the second shard", "a shard of padding", "a shard of mask and padding"],
)
def test_the_statistics_of_two_shards_are_those_of_the_whole(vocabulary: Vocabulary) -> None:
    """What the head makes of them across ranks, here in one process."""
    from megatron_dlm.model import head_triton

    generator = torch.Generator().manual_seed(1)
    logits = (30 * torch.randn(9, 100, generator=generator)).to(DEVICE)
    labels = torch.randint(0, 3, (9,), generator=generator).to(DEVICE)
    whole = head._statistics(logits.double(), labels, 0.7, vocabulary, 0, True)
    parts = [
        head_triton.statistics(logits[:, first : first + 50].contiguous(), labels, 0.7, vocabulary, first, True)
        for first in (0, 50)
    ]
    assert all(torch.isfinite(one).all() for part in parts for one in part)
    highest = torch.maximum(parts[0][0], parts[1][0]).double()
    total, moment, picked = 0.0, 0.0, 0.0
    for own, mass, mean, label in ([one.double() for one in part] for part in parts):
        share = (own - highest).exp()
        total, moment = total + share * mass, moment + share * (mean + (own - highest) * mass)
        picked = picked + label
    for mine, right in zip((highest, total, moment, picked), whole):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(platform.is_cuda(), reason="this host has a GPU")
def test_the_flag_reaches_the_loss(monkeypatch) -> None:
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model import head_triton
    from megatron_dlm.model.head import target_policy
    from megatron_dlm.training.setup import Session
    from tests.tiny import Words, model_config, one_process, vocabulary

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked, original = [], head_triton.statistics
    monkeypatch.setattr(head_triton, "statistics", lambda *given: asked.append(len(given[0])) or original(*given))
    found = []
    for choice in ("triton", "auto", "torch"):
        session = Session(model_config(), ParallelConfig(loss_head=choice), Words(), one_process(), vocabulary())
        (model,) = session.train_state(None, 1).unwrapped_chunks()
        torch.nn.init.normal_(model.head_weight(), generator=torch.Generator().manual_seed(0))
        hidden = torch.linspace(-1, 1, 5 * model.config.hidden_size).view(5, -1)
        found.append(target_policy(model, hidden, torch.arange(5), 0.7, vocabulary(), 3)[0])
    assert asked == [3, 2]  # of a CPU's 'auto' nothing
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], found[2])
