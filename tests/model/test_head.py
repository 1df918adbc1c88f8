from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dlm import platform
from megatron_dlm.model.head import label_policy
from megatron_dlm.model.policy import Vocabulary, entropy, label_logprobs, policy_scores
from tests.harness import pool
from tests.tiny import one_process

TARGETS, WIDTH, COLUMNS = 11, 6, 200  # runs of the backward pass: 18, 54 and 64 tokens for chunks of 1, 3 and 5
VOCABULARY = Vocabulary(size=190, mask_id=70)
TEMPERATURES = [1.0, 0.7, "one for each"]
CHUNKS = [1, 3, 5, 11, 100]


def temperature_of(kind: float | str) -> torch.Tensor | float:
    return torch.linspace(0.5, 2.0, TARGETS, dtype=torch.float64) if isinstance(kind, str) else kind


def inputs(dtype: torch.dtype = torch.float64, targets: int = TARGETS) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, labels, and a weight of each target in a loss."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    hidden, weight, share = draw(TARGETS, WIDTH), 2 * draw(COLUMNS, WIDTH), draw(TARGETS)
    labels = torch.randint(0, VOCABULARY.size, (TARGETS,), generator=generator)
    labels[0], labels[1], labels[labels == VOCABULARY.mask_id] = 0, VOCABULARY.size - 1, 3
    hidden, labels, share = hidden[:targets], labels[:targets], share[:targets]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, share


def expected(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor | float,
    vocabulary: Vocabulary = VOCABULARY,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies, by torch's distribution over the tokens of the policy alone."""
    allowed = [token for token in range(vocabulary.size) if token != vocabulary.mask_id]
    logits = hidden.double() @ weight.double()[allowed].T
    divisor = temperature[: len(hidden), None] if isinstance(temperature, torch.Tensor) else temperature
    policy = torch.distributions.Categorical(logits=logits / divisor)
    return policy.log_prob(torch.tensor([allowed.index(label) for label in labels.tolist()])), policy.entropy()


def loss_of(logprob: torch.Tensor, entropies: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return (share * logprob).sum() + 0.3 * (share.flip(0) * entropies.sin()).sum()


def test_two_tokens_of_equal_logit_have_half_the_probability_each() -> None:
    weight = torch.tensor([[1.0], [-400.0], [1.0]])
    logprob, entropies = label_policy(
        torch.ones(1, 1), weight, torch.tensor([2]), 1.0, Vocabulary(3, 9), None, 1, with_entropy=True
    )
    assert logprob.item() == pytest.approx(math.log(0.5)) and entropies.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", TEMPERATURES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_and_gradients_are_those_of_the_softmax_over_the_policys_tokens(chunk: int, kind: float | str) -> None:
    hidden, weight, labels, share = inputs()
    found = label_policy(hidden, weight, labels, temperature_of(kind), VOCABULARY, None, chunk, with_entropy=True)
    wanted = expected(hidden, weight, labels, temperature_of(kind))
    gradients = [torch.autograd.grad(loss_of(*pair, share), (hidden, weight)) for pair in (found, wanted)]
    for mine, other in zip((*found, *gradients[0]), (*wanted, *gradients[1])):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    outside = [VOCABULARY.mask_id, *range(VOCABULARY.size, COLUMNS)]
    assert not gradients[0][1][outside].any() and gradients[0][1].abs().sum() > 1


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("only", ["log-probabilities", "entropies", "log-probabilities without entropies"])
def test_either_output_has_its_own_gradient(only: str, chunk: int) -> None:
    hidden, weight, labels, share = inputs()
    both = only != "log-probabilities without entropies"
    logprob, entropies = label_policy(hidden, weight, labels, 0.7, VOCABULARY, None, chunk, with_entropy=both)
    assert both or entropies is None
    which = int(only == "entropies")
    gradients = [
        torch.autograd.grad((share * pair[which]).sum(), (hidden, weight))
        for pair in ((logprob, entropies), expected(hidden, weight, labels, 0.7))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4])
def test_no_targets_have_a_gradient_of_zeros(chunk: int) -> None:
    hidden, weight, labels, _ = inputs(targets=0)
    logprob, entropies = label_policy(hidden, weight, labels, 1.0, VOCABULARY, None, chunk, with_entropy=True)
    assert logprob.shape == entropies.shape == (0,) and logprob.requires_grad
    (logprob.sum() + entropies.sum()).backward()
    assert hidden.grad.shape == (0, WIDTH) and weight.grad.shape == weight.shape and not weight.grad.any()


def test_tokens_outside_the_policy_have_no_probability() -> None:
    hidden, weight, labels, _ = inputs()
    labels[:3] = torch.tensor([VOCABULARY.mask_id, VOCABULARY.size, COLUMNS - 1])
    logprob, _ = label_policy(hidden, weight, labels, 1.0, VOCABULARY, None, 4)
    assert (logprob[:3] == -math.inf).all() and torch.isfinite(logprob[3:]).all()


@pytest.mark.parametrize("frozen", ["hidden states", "weight"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    hidden, weight, labels, share = inputs()
    still, moving = (hidden, weight) if frozen == "hidden states" else (weight, hidden)
    still.requires_grad_(False)
    (share * label_policy(hidden, weight, labels, 0.7, VOCABULARY, None, 4)[0]).sum().backward()
    (wanted,) = torch.autograd.grad((share * expected(hidden, weight, labels, 0.7)[0]).sum(), moving)
    assert still.grad is None
    torch.testing.assert_close(moving.grad, wanted, rtol=1e-12, atol=1e-12)


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = policy_scores(hidden @ weight.T, 0.7, VOCABULARY)
    return label_logprobs(scores, labels), entropy(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_worse_than_the_whole_table(dtype: torch.dtype) -> None:
    """Against float64 on the same numbers: each error is at most one and a half times that of the table."""
    hidden, weight, labels, share = inputs(dtype)
    chunked = label_policy(hidden, weight, labels, 0.7, VOCABULARY, None, 3, with_entropy=True)
    assert all(value.dtype == torch.float32 for value in chunked)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    results = []
    for values, leaves in (
        (chunked, (hidden, weight)),
        (plain(hidden, weight, labels), (hidden, weight)),
        (expected(*exact, labels, 0.7), exact),
    ):
        gradients = torch.autograd.grad(loss_of(*values, share.to(values[0].dtype)), leaves)
        assert all(gradient.dtype == leaf.dtype for gradient, leaf in zip(gradients, leaves))
        results.append([tensor.detach().double() for tensor in (*values, *gradients)])
    for mine, table, right in zip(*results):
        floor = torch.finfo(dtype).eps * right.norm()
        assert (mine - right).norm() < 1.5 * (table - right).norm() + floor


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_is_never_there(dtype: torch.dtype) -> None:
    targets, width, columns, chunk = 96, 8, 512, 4
    hidden = torch.randn(targets, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(columns, width, dtype=dtype, requires_grad=True)
    labels, saved = torch.arange(targets), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    def largest(work) -> int:
        with Largest() as mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprob, entropies = work()
            (logprob.sum() + entropies.sum()).backward()
        return mode.elements

    vocabulary = Vocabulary(500, 3)
    chunked = largest(lambda: label_policy(hidden, weight, labels, 0.7, vocabulary, None, chunk, with_entropy=True))
    assert chunked == max(chunk * columns, columns * width, targets * width)  # a tile, or a gradient
    assert sum(saved) == hidden.numel() + weight.numel() + 3 * targets

    def by_table() -> tuple[torch.Tensor, torch.Tensor]:
        scores = policy_scores(hidden @ weight.T, 0.7, vocabulary)
        return label_logprobs(scores, labels), entropy(scores)

    assert largest(by_table) == targets * columns  # which the two counters would have seen
    assert max(saved) == targets * columns


def known(labels: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Labels that a smaller vocabulary has, too."""
    labels = labels.clamp(max=vocabulary.size - 1)
    return torch.where(labels == vocabulary.mask_id, 0, labels)


def sharded(vocabulary: Vocabulary, chunk: int, kind: float | str) -> tuple:
    """On each of two ranks, with its half of the weight: values, gradients, and the collectives of both passes."""
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    groups = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    hidden, weight, labels, share = inputs()
    half = COLUMNS // 2
    mine = weight.detach()[half * groups.tp_rank : half * (groups.tp_rank + 1)].clone().requires_grad_()
    counts, original = [], dist.all_reduce

    def counted(tensor: torch.Tensor, *args: object, **options: object):
        counts.append(tensor.numel())
        return original(tensor, *args, **options)

    dist.all_reduce = counted
    try:
        values = label_policy(
            copy_to_tensor_model_parallel_region(hidden, groups.tp), mine, known(labels, vocabulary),
            temperature_of(kind), vocabulary, groups.tp, chunk, with_entropy=True,
        )  # fmt: skip
        forward = len(counts)
        loss_of(*values, share).backward()
    finally:
        dist.all_reduce = original
    return [value.detach() for value in values], hidden.grad, mine.grad, (forward, len(counts) - forward)


@pytest.mark.parametrize(
    "vocabulary, chunk, kind",
    [
        (VOCABULARY, 3, 0.7),
        (Vocabulary(190, 170), 5, "one for each"),
        (Vocabulary(90, 70), 4, 1.0),
        (Vocabulary(101, 100), 100, 0.7),
    ],
    ids=["mask in the first shard", "mask in the second", "a shard of padding alone", "a shard of mask and padding"],
)
def test_shards_have_their_part(vocabulary: Vocabulary, chunk: int, kind: float | str) -> None:
    results = pool(2).run(sharded, vocabulary, chunk, kind)
    hidden, weight, labels, share = inputs()
    wanted = expected(hidden, weight, known(labels, vocabulary), temperature_of(kind), vocabulary)
    by_hidden, by_weight = torch.autograd.grad(loss_of(*wanted, share), (hidden, weight))
    for rank, (values, mine_by_hidden, mine_by_weight, collectives) in enumerate(results):
        shard = by_weight[COLUMNS // 2 * rank : COLUMNS // 2 * (rank + 1)]
        for found, right in zip((*values, mine_by_hidden, mine_by_weight), (*wanted, by_hidden, shard)):
            torch.testing.assert_close(found, right.detach(), rtol=1e-12, atol=1e-12)
        assert collectives == (2, 1)  # a MAX and a SUM; what copies the hidden states sums their gradients


def by_kernels_and_by_torch() -> tuple:
    """On each of two ranks: values and gradients, by the kernels and by torch."""
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    groups, half = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1), COLUMNS // 2
    results = []
    for fused in (True, False):
        hidden, weight, labels, share = (one.detach().to(platform.device()) for one in inputs(torch.float32))
        mine = weight[half * groups.tp_rank : half * (groups.tp_rank + 1)].clone().requires_grad_()
        copied = copy_to_tensor_model_parallel_region(hidden.requires_grad_(), groups.tp)
        values = label_policy(copied, mine, labels, 0.7, VOCABULARY, groups.tp, 4, True, fused)
        ((share * values[0]).sum() + 0.3 * (share * values[1]).sum()).backward()
        results.append([one.detach().cpu() for one in (*values, hidden.grad, mine.grad)])
    return results


def test_kernels_on_shards_agree_with_torch() -> None:
    pytest.importorskip("triton")
    for mine, right in pool(2).run(by_kernels_and_by_torch):
        for found, wanted in zip(mine, right):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_group_of_one_is_no_group() -> None:
    group = one_process().tp
    hidden, weight, labels, _ = inputs()
    found = [label_policy(hidden, weight, labels, 0.8, VOCABULARY, one, 4, with_entropy=True) for one in (None, group)]
    assert all(torch.equal(*pair) for pair in zip(*found))
