from __future__ import annotations

import math

import pytest
import torch

from megatron_dlm.model.policy import Vocabulary, by_chunks, divergence, entropy, label_logprobs, policy_scores
from tests.harness import pool
from tests.tiny import one_process

VOCABULARY = Vocabulary(size=11, mask_id=4)
ALLOWED = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]  # 16 columns, of which 11 to 15 are padding


def logits(rows: int = 6, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> torch.Tensor:
    drawn = 5 * torch.randn(rows, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_(requires_grad)


def expected(x: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-softmax over the allowed columns only."""
    return torch.log_softmax(x[:, ALLOWED].double() / temperature, dim=-1)


def test_two_tokens_of_equal_logit_have_half_the_probability_each() -> None:
    x = torch.full((1, 16), -math.inf)
    x[0, [2, 7]] = 3.0
    scores = policy_scores(x, 1.0, VOCABULARY)
    assert label_logprobs(scores, torch.tensor([7])).item() == pytest.approx(math.log(0.5))
    assert entropy(scores).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("temperature", [1.0, 0.8, 3.0])
def test_is_the_softmax_over_the_allowed_tokens(temperature: float) -> None:
    x = logits()
    scores, reference = policy_scores(x, temperature, VOCABULARY), expected(x, temperature)
    for column, token in enumerate(ALLOWED):
        torch.testing.assert_close(
            label_logprobs(scores, torch.full((6,), token)), reference[:, column], rtol=1e-12, atol=1e-12
        )
    torch.testing.assert_close(entropy(scores), -(reference.exp() * reference).sum(-1), rtol=1e-12, atol=1e-12)


def test_a_temperature_for_each_row() -> None:
    x, temperature = logits(), torch.tensor([1.0, 0.5, 0.8, 2.0, 1.0, 0.1])
    found = label_logprobs(policy_scores(x, temperature, VOCABULARY), torch.full((6,), 9))
    one_by_one = torch.stack(
        [expected(x[n : n + 1], float(temperature[n].double()))[0, ALLOWED.index(9)] for n in range(6)]
    )
    torch.testing.assert_close(found, one_by_one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("token", [4, 11, 15])
def test_forbidden_tokens_have_no_probability(token: int) -> None:
    x = logits()
    x[:, token] = 1000.0  # however much the model wants them
    scores = policy_scores(x, 1.0, VOCABULARY)
    assert (label_logprobs(scores, torch.full((6,), token)) == -math.inf).all()
    torch.testing.assert_close(
        label_logprobs(scores, torch.full((6,), 0)), expected(x, 1.0)[:, 0], rtol=1e-12, atol=1e-12
    )


def test_gradient_is_that_of_the_softmax_over_the_allowed_tokens() -> None:
    x, y = logits(requires_grad=True), logits(requires_grad=True)
    labels = torch.tensor([0, 10, 5, 3, 9, 1])
    weight = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1.0], dtype=torch.float64)
    (weight * label_logprobs(policy_scores(x, 0.7, VOCABULARY), labels)).sum().backward()
    columns = torch.tensor([ALLOWED.index(label) for label in labels.tolist()])
    (weight * expected_with_graph(y, 0.7)[torch.arange(6), columns]).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    assert (x.grad[:, [4, 11, 12, 13, 14, 15]] == 0).all()


def expected_with_graph(x: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(x[:, ALLOWED] / temperature, dim=-1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-6), (torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_is_computed_in_fp32_at_least(dtype: torch.dtype, tolerance: float) -> None:
    x = logits(dtype=dtype)
    scores = policy_scores(x, 1.0, VOCABULARY)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        label_logprobs(scores, torch.full((6,), 3)).double(), expected(x, 1.0)[:, 3], rtol=tolerance, atol=tolerance
    )


def test_large_logits_do_not_overflow() -> None:
    x = logits(dtype=torch.float32) + 1e4
    found = label_logprobs(policy_scores(x, 0.1, VOCABULARY), torch.full((6,), 3))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), expected(x, 0.1)[:, 3], rtol=1e-5, atol=2e-2)


def test_no_targets() -> None:
    x = logits(rows=0, requires_grad=True)
    scores = policy_scores(x, 1.0, VOCABULARY)
    logprob = label_logprobs(scores, torch.zeros(0, dtype=torch.int64))
    assert logprob.shape == (0,) and entropy(scores).shape == (0,)
    logprob.sum().backward()
    assert x.grad.shape == (0, 16)


def test_a_group_of_one_is_no_group() -> None:
    group, x = one_process().tp, logits()
    labels = torch.tensor([0, 10, 5, 3, 9, 1])
    alone, together = policy_scores(x, 0.8, VOCABULARY), policy_scores(x, 0.8, VOCABULARY, group)
    assert torch.equal(alone, together)
    assert torch.equal(label_logprobs(alone, labels), label_logprobs(together, labels, group))
    assert torch.equal(entropy(alone), entropy(together, group))


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [6, 16] of a policy and of its teacher, in one of whose rows they agree."""
    own, other = logits(), logits().flip(0)
    other[0] = own[0] + 3.0
    return own, other


def dense_divergence(own: torch.Tensor, other: torch.Tensor, kind: str, temperature: float = 0.7) -> torch.Tensor:
    """[6], by torch's distributions over the allowed tokens."""
    p, q = (torch.distributions.Categorical(logits=x[:, ALLOWED] / temperature) for x in (own, other))
    kl = torch.distributions.kl_divergence
    if kind == "jsd":
        middle = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
        return (kl(p, middle) + kl(q, middle)) / 2
    return kl(p, q) if kind == "reverse" else kl(q, p)


def weighted_sum(values: torch.Tensor) -> torch.Tensor:
    return (torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1.0], dtype=values.dtype) * values).sum()


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_divergence_is_that_of_the_distributions_over_the_allowed_tokens(kind: str) -> None:
    own, other = pair()
    own[:, 4], other[:, 12] = 1000.0, 1000.0  # however much the models want them
    x, y = own.clone().requires_grad_(), own.clone().requires_grad_()
    taught = policy_scores(other, 0.7, VOCABULARY)
    found, expected = divergence(policy_scores(x, 0.7, VOCABULARY), taught, kind), dense_divergence(y, other, kind)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found[0].item() == pytest.approx(0, abs=1e-12) and (found[1:] > 0.01).all()
    weighted_sum(found).backward()
    weighted_sum(expected).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)
    assert (x.grad[:, [4, 11, 12, 13, 14, 15]] == 0).all() and x.grad.abs().sum() > 0


def test_gradient_of_the_entropy() -> None:
    x, y = logits(requires_grad=True), logits(requires_grad=True)
    weighted_sum(entropy(policy_scores(x, 0.7, VOCABULARY))).backward()
    weighted_sum(torch.distributions.Categorical(logits=y[:, ALLOWED] / 0.7).entropy()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_divergence_of_no_targets_and_of_tokens_without_probability(kind: str) -> None:
    nothing = policy_scores(logits(rows=0), 1.0, VOCABULARY)
    assert divergence(nothing, nothing, kind).shape == (0,)
    x = torch.zeros(1, 16, requires_grad=True)
    sure = torch.zeros(1, 16)
    sure[0, 2] = 300.0  # in fp32 all others have probability 0
    for own, other in ((x, sure), (x + sure, torch.zeros(1, 16))):
        value = divergence(policy_scores(own, 1.0, VOCABULARY), policy_scores(other, 1.0, VOCABULARY), kind)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def sharded(tokens: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """On each of two ranks: value and gradient of entropy and divergences of its half of the vocabulary."""
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    groups = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    mine = slice(8 * groups.tp_rank, 8 * groups.tp_rank + 8)
    vocabulary = Vocabulary(tokens, VOCABULARY.mask_id)
    own, other = pair()
    taught = policy_scores(other[:, mine], 0.7, vocabulary, groups.tp)
    found = {}
    for name in ("entropy", "reverse", "forward", "jsd"):
        x = own[:, mine].clone().requires_grad_()
        scores = policy_scores(x, 0.7, vocabulary, groups.tp)
        value = entropy(scores, groups.tp) if name == "entropy" else divergence(scores, taught, name, groups.tp)
        weighted_sum(value).backward()
        found[name] = value.detach(), x.grad
    return found


@pytest.mark.parametrize("tokens", [11, 7], ids=["padding in one shard", "a shard of padding alone"])
def test_shards_of_the_vocabulary_have_their_part_of_the_gradient(tokens: int) -> None:
    allowed = [token for token in range(tokens) if token != VOCABULARY.mask_id]
    results = pool(2).run(sharded, tokens)
    own, other = pair()
    for name in results[0]:
        y = own.clone().requires_grad_()
        p, q = (torch.distributions.Categorical(logits=one[:, allowed] / 0.7) for one in (y, other))
        kl = torch.distributions.kl_divergence
        middle = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
        expected = {
            "entropy": p.entropy(),
            "reverse": kl(p, q),
            "forward": kl(q, p),
            "jsd": (kl(p, middle) + kl(q, middle)) / 2,
        }[name]
        weighted_sum(expected).backward()
        for rank in range(2):
            value, gradient = results[rank][name]
            torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradient, y.grad[:, 8 * rank : 8 * rank + 8], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_chunks_change_neither_values_nor_gradients(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(7, 12, generator=generator, dtype=torch.float64) for _ in range(2)]
    one, other = (tables[0].clone().requires_grad_(True) for _ in range(2))
    whole = divergence(one, tables[1], "reverse")
    pieces = by_chunks(lambda a, b: divergence(a, b, "reverse"), other, tables[1], size=size)
    assert torch.allclose(whole, pieces, rtol=1e-14)
    weight = torch.arange(1.0, 8.0, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((weight * value).sum(), table)[0] for value, table in ((whole, one), (pieces, other))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert by_chunks(lambda table: table.sum(1), other[:0]).shape == (0,)
