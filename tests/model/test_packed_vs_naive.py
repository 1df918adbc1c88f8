"""The central identity: a packed row has the loss and the gradients of one plain row per denoising step.

The naive side runs every state in which some token was decided as a text of its own, [finished blocks | block with its
masks], under an explicit mask, through the same weights; nothing of layouts, views or rows takes part in it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.diffusion.views import Item, largest_part, split_views
from megatron_dlm.model.policy import label_logprobs, policy_scores
from tests.diffusion.oracles import MASK_ID, PAD_ID, block_index, masked_views, random_group, states, trace_item
from tests.tiny import allowed_logprobs, explicit_logits, furthest, gradients, make_model, vocabulary

PER_MODULUS = [(block, remainder) for block in (1, 2, 4, 8) for remainder in range(block)]


@pytest.fixture(scope="module")
def model():
    return make_model(torch.float64)


@pytest.fixture(scope="module")
def shifted():
    return make_model(torch.float64, logit_shift=1)


def weight_of(response: int, index: int) -> float:
    """A weight of its own for every token, of either sign, so that no two can be exchanged unseen."""
    return float(np.sin(1.0 + 7 * response + 0.37 * index))


def packed(model, rows) -> tuple[torch.Tensor, int]:
    loss, count = torch.zeros((), dtype=torch.float64, device=platform.device()), 0
    for row in rows:
        row = row.to(platform.device())
        logprob = label_logprobs(policy_scores(model.forward_row(row), 0.8, vocabulary()), row.targets.label)
        weights = [
            weight_of(r, i) * w
            for r, i, w in zip(row.targets.response.tolist(), row.targets.index.tolist(), row.targets.weight.tolist())
        ]
        loss = loss - (torch.tensor(weights, dtype=torch.float64, device=loss.device) * logprob).sum()
        count += len(weights)
    return loss, count


def naive_state_loss(model, shown, block_of, decided, tokens, weights) -> torch.Tensor:
    """One state: the shown text under "my block and all before it"; decided positions are read at their own slots, or
    with a logit shift at the one before."""
    read = [max(position - model.logit_shift, 0) for position in decided]
    blocks = torch.tensor(block_of)
    logits = explicit_logits(
        model, torch.tensor(shown), torch.arange(len(shown)), blocks[None, :] <= blocks[:, None], torch.tensor(read)
    )
    logprob = allowed_logprobs(logits, 0.8)
    return -sum(weight * logprob[n, tokens[position]] for n, (position, weight) in enumerate(zip(decided, weights)))


def naive(model, traces, grid, shrinkage) -> tuple[torch.Tensor, int]:
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for response, trace in enumerate(traces):
        for state in states(trace, grid, shrinkage):
            weights = [weight_of(response, position - len(trace.prompt_ids)) for position in state.decided]
            loss = loss + naive_state_loss(model, state.shown, state.block_of, state.decided, trace.tokens, weights)
            count += len(weights)
    return loss, count


def compare(model, traces, grid, shrinkage, rows) -> None:
    loss, count = packed(model, rows)
    expected, expected_count = naive(model, traces, grid, shrinkage)
    assert count == expected_count == sum(len(trace.response_ids) for trace in traces)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11, abs=1e-11)
    assert furthest(gradients(model, loss), gradients(model, expected)) < 1e-10


def two_groups(block: int, remainder: int, rng: np.random.Generator):
    """Two responses that share one prompt, and three that share another."""
    first = random_group(remainder or block, [3, block + 1], block, rng, "p0")
    return first + random_group(block + remainder, [1, 4, block], block, rng, "p1")


@pytest.mark.parametrize("shrinkage", [1, 2])
@pytest.mark.parametrize("block, remainder", PER_MODULUS)
def test_a_packed_row_is_the_sum_of_its_denoising_states(model, block: int, remainder: int, shrinkage: int) -> None:
    rng = np.random.default_rng([block, remainder, shrinkage])
    traces, grid = two_groups(block, remainder, rng), Grid(block)
    items = [trace_item(trace, grid, shrinkage) for trace in traces]
    length = sum(item.own_length + item.shared_length for item in items)
    order = rng.permutation(len(items)).tolist()
    compare(
        model, traces, grid, shrinkage, [build_row([(index, items[index]) for index in order], length, MASK_ID, PAD_ID)]
    )


@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4]], [[0, 3], [4, 1], [2]]])
def test_which_rows_the_responses_share_does_not_matter(model, split: list[list[int]]) -> None:
    traces, grid = two_groups(4, 3, np.random.default_rng(3)), Grid(4)
    items = [trace_item(trace, grid) for trace in traces]
    compare(
        model,
        traces,
        grid,
        1,
        [build_row([(index, items[index]) for index in members], 128, MASK_ID, PAD_ID) for members in split],
    )


def canvases(horizon: int | None):
    """Responses of a model of full attention, to two prompts."""
    rng = np.random.default_rng(5)
    how = dict(full=True, behind=2, horizon=horizon)
    return random_group(3, [4, 7], 4, rng, "p0", **how) + random_group(5, [3], 4, rng, "p1", **how)


@pytest.mark.parametrize("horizon", [None, 1])
@pytest.mark.parametrize("shrinkage", [1, 3])
def test_full_attention(model, shrinkage: int, horizon: int | None) -> None:
    """One block for the whole text: nothing is shared, every view is a whole copy, with the masks behind it."""
    traces = canvases(horizon)
    items = [trace_item(trace, Grid(None), shrinkage) for trace in traces]
    compare(model, traces, Grid(None), shrinkage, [build_row(list(enumerate(items)), 400, MASK_ID, PAD_ID)])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("block", [4, None])
@pytest.mark.parametrize("ahead", [False, True], ids=["in place", "logits ahead"])
def test_a_response_may_stand_in_several_rows(model, shifted, ahead: bool, block: int | None, together: bool) -> None:
    """As many as its views, the smallest that hold it; or all parts in one row."""
    grid = Grid(block)
    traces = canvases(1) if block is None else two_groups(4, 3, np.random.default_rng(3))
    items = [trace_item(trace, grid) for trace in traces]
    parts = [(n, part) for n, item in enumerate(items) for part in split_views(item, largest_part(item))]
    assert len(parts) > len(traces) + 2
    used = lambda part: part.shared_length + part.own_length
    rows = [parts] if together else [[part] for part in parts]
    built = [build_row(row, sum(used(part) for _, part in row), MASK_ID, PAD_ID) for row in rows]
    compare(shifted if ahead else model, traces, grid, 1, built)


@pytest.mark.parametrize("prompt", [0, 1, 3, 4])
@pytest.mark.parametrize("block", [1, 4, None])
def test_a_model_that_predicts_one_position_ahead(shifted, block: int | None, prompt: int) -> None:
    rng, grid = np.random.default_rng([block or 0, prompt]), Grid(block)
    traces = random_group(prompt, [4, 7], block or 4, rng, "p0") + random_group(prompt + 2, [3], block or 4, rng, "p1")
    items = [trace_item(trace, grid) for trace in traces]
    compare(shifted, traces, grid, 1, [build_row(list(enumerate(items)), 400, MASK_ID, PAD_ID)])


@pytest.mark.parametrize("block, train_block", [(4, 8), (8, 4), (2, 8)])
def test_another_block_size_in_training_than_in_the_rollout(model, block: int, train_block: int) -> None:
    traces, grid = two_groups(block, 1, np.random.default_rng(block)), Grid(train_block)
    items = [trace_item(trace, grid) for trace in traces]
    compare(model, traces, grid, 1, [build_row(list(enumerate(items)), 400, MASK_ID, PAD_ID)])


@pytest.mark.parametrize("prompt", [1, 3, 5, 7, 8])
def test_a_grid_anchored_at_the_response(model, prompt: int) -> None:
    traces, grid = random_group(prompt, [3, 6], 4, np.random.default_rng(prompt)), Grid(4, "response")
    items = [trace_item(trace, grid) for trace in traces]
    compare(model, traces, grid, 1, [build_row(list(enumerate(items)), 160, MASK_ID, PAD_ID)])


@pytest.mark.parametrize("per", ["block", "sample"])
@pytest.mark.parametrize("block, remainder", [(1, 0), (4, 1), (4, 3), (8, 5), (None, 3)])
def test_views_of_supervised_fine_tuning(model, block: int | None, remainder: int, per: str) -> None:
    """One state per block: its hidden tokens, everything before it clean."""
    rng, grid = np.random.default_rng([block or 0, remainder]), Grid(block)
    items, expected, count = [], torch.zeros((), dtype=torch.float64), 0
    for response, length in enumerate((5, 9)):
        prompt = (block or 0) + remainder
        total, until = prompt + length, prompt + length - 1
        tokens = rng.integers(0, 50, total)
        views = masked_views(prompt, total, grid, MaskSchedule(per), stream=response, predict_until=until)
        items.append(Item(f"p{response}", tokens, prompt, views, grid))
        block_of = [block_index(position, prompt, grid) for position in range(total)]
        hidden, weight = {}, {}
        for n in range(len(views.block)):
            for column, position in enumerate(views.position[n].tolist()):
                if position >= 0 and views.masked[n, column]:
                    hidden[position], weight[position] = True, views.weight[n, column]
                    assert bool(views.target[n, column]) == (position < until)
        for number in sorted(set(block_of)):
            upto = [p for p in range(total) if block_of[p] <= number]
            shown = [MASK_ID if block_of[p] == number and p in hidden else int(tokens[p]) for p in upto]
            decided = [p for p in upto if block_of[p] == number and p in hidden and p < until]
            if decided:
                weights = [weight_of(response, p - prompt) * weight[p] for p in decided]
                expected = expected + naive_state_loss(
                    model, shown, [block_of[p] for p in upto], decided, tokens, weights
                )
                count += len(decided)
    loss, predicted = packed(model, [build_row(list(enumerate(items)), 160, MASK_ID, PAD_ID)])
    assert predicted == count > 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert furthest(gradients(model, loss), gradients(model, expected)) < 1e-10
