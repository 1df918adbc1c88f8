"""What a teacher says of the tokens of an update, against running it over single naive states."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.value import ValueConfig
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import Plan, partition
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.rl.learner import Learner, Models
from megatron_dlm.rl.rows import build_rows
from megatron_dlm.rl.teacher import Teacher
from megatron_dlm.rl.update import policy_forward
from megatron_dlm.training.step import accumulate_gradients
from tests.diffusion.oracles import MASK_ID, PAD_ID, states
from tests.rl.learning import LONGEST, SEED, TEMPERATURE, advantages_of, records_of, responses, settings_of
from tests.tiny import (
    allowed_logprobs,
    explicit_logits,
    furthest,
    gradients,
    make_session,
    make_state,
    model_config,
    vocabulary,
)

FULL = dict(full_attention=True, block_size=None)
AUTOREGRESSIVE = dict(block_size=1, logit_shift=1)
OTHER_SIZES = dict(num_layers=1, hidden_size=24, ffn_hidden_size=40)  # than the policy's

# The policy's attention, the teacher's, and tokens of a row. One of full attention is split over rows.
PAIRS = {
    "the same blocks": ({}, {}, 64),
    "the same blocks, logits ahead": ({}, dict(logit_shift=1), 64),
    "both ahead": (dict(logit_shift=1), dict(logit_shift=1), 64),
    "smaller blocks": (dict(block_size=8), dict(block_size=4), 96),
    "larger blocks": ({}, dict(block_size=8), 64),
    "autoregressive": ({}, AUTOREGRESSIVE, 64),
    "autoregressive, all in one row": ({}, AUTOREGRESSIVE, 1024),
    "autoregressive beside full attention": (FULL, AUTOREGRESSIVE, 40),
    "autoregressive both": (AUTOREGRESSIVE, AUTOREGRESSIVE, 64),
    "full attention both": (FULL, FULL, 40),
    "full attention beside blocks": ({}, FULL, 64),
    "blocks beside full attention": (FULL, {}, 40),
}


def of(changes: dict) -> int | None:
    return changes.get("block_size", 4)


def traces_for(policy: dict) -> list[Trace]:
    return responses(block=of(policy) or 4, full=of(policy) is None)


def make_teacher(policy: dict, teacher: dict, anchor: str = "absolute") -> Teacher:
    changes = OTHER_SIZES | teacher
    return Teacher(make_state(seed=7, **changes), model_config(**changes), Grid(of(policy), anchor))


def prepare(policy: dict, teacher: dict, budget: int, config: RLConfig | None = None):
    """The policy's model, the teacher, the rows of one update with its hidden states, and the update's settings."""
    settings = settings_of(config or RLConfig(old_logprobs="current"), of(policy), budget)
    taught = make_teacher(policy, teacher, settings.states.grid.anchor)
    models = Models(make_state(**policy), teacher=taught)
    learner = Learner(make_session(**policy), models, ValueConfig(), SEED)
    traces = traces_for(policy)
    (update,) = learner.prepare(records_of(traces, settings), advantages_of(traces), traces, settings)
    return models, traces, update, settings


def naive(model, changes: dict, trace: Trace, anchor: str = "absolute") -> dict[int, torch.Tensor]:
    """Log-probabilities [52] of the teacher by the index of each response token: one pass for each state."""
    prompt, found = len(trace.prompt_ids), {}
    if changes == AUTOREGRESSIVE:
        for index in range(len(trace.response_ids)):
            text = torch.tensor(trace.tokens[: prompt + index])
            causal = torch.ones(len(text), len(text), dtype=torch.bool).tril()
            last = torch.tensor([len(text) - 1])
            found[index] = explicit_logits(model, text, torch.arange(len(text)), causal, last)[0]
    else:
        for state in states(trace, Grid(of(changes), anchor)):
            read = torch.tensor([position - model.logit_shift for position in state.decided])
            mask, places = torch.from_numpy(state.visible), torch.arange(len(state.shown))
            logits = explicit_logits(model, torch.tensor(state.shown), places, mask, read)
            found |= {position - prompt: line for position, line in zip(state.decided, logits)}
    return {index: allowed_logprobs(line[None], TEMPERATURE)[0] for index, line in found.items()}


def places_of(update) -> dict[tuple[int, int], tuple[int, int]]:
    """For each target the row and line where it stands, by (response, index)."""
    found = {}
    for number, row in enumerate(update.rows):
        targets = row.row.targets
        for line, key in enumerate(zip(targets.response.tolist(), targets.index.tolist())):
            assert key not in found
            found[key] = number, line
    return found


def in_order(traces, settings) -> list[Trace]:
    """The traces as `Targets.response` numbers them."""
    (members,) = partition(len(traces), 1, stream(SEED, "partition", settings.step))
    return [traces[index] for index in members]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_teacher_is_asked_in_its_own_states_of_the_trace(pair: str) -> None:
    policy, teacher, budget = PAIRS[pair]
    models, traces, update, settings = prepare(policy, teacher, budget)
    model = models.teacher.state.module
    assert len(update.rows) > 1 or budget == 1024
    assert models.teacher.shares_rows == (of(policy) == of(teacher) and teacher is not AUTOREGRESSIVE)
    tables = [models.teacher.scores(row.teacher_hidden, TEMPERATURE, vocabulary(), None) for row in update.rows]
    places, seen = places_of(update), 0
    with torch.no_grad():
        for number, trace in enumerate(in_order(traces, settings)):
            for index, expected in naive(model, teacher, trace).items():
                row, line = places[number, index]
                found = torch.log_softmax(tables[row][line], -1)[:52]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
                seen += 1
    assert seen == len(places) == sum(len(trace.response_ids) for trace in traces)


def test_a_grid_from_the_response_on_is_the_teachers_too() -> None:
    config = RLConfig(old_logprobs="current", grid_anchor="response")
    models, traces, update, settings = prepare({}, dict(block_size=8), 64, config)
    tables = [models.teacher.scores(row.teacher_hidden, TEMPERATURE, vocabulary(), None) for row in update.rows]
    places = places_of(update)
    with torch.no_grad():
        for number, trace in enumerate(in_order(traces, settings)):
            for index, expected in naive(models.teacher.state.module, dict(block_size=8), trace, "response").items():
                row, line = places[number, index]
                torch.testing.assert_close(torch.log_softmax(tables[row][line], -1)[:52], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("teacher", [{}, dict(block_size=8), AUTOREGRESSIVE], ids=["same", "larger", "autoregressive"])
def test_a_row_without_responses_has_nothing_to_ask(teacher: dict) -> None:
    """Some rank may have one."""
    settings = settings_of(RLConfig(old_logprobs="current"), 4, 64)
    taught, traces = make_teacher({}, teacher), responses(1)
    plan = Plan((((0,), ()),), 64, (((0,), ()),))
    rows = build_rows(
        records_of(traces, settings), plan, {0: traces[0]}, advantages_of(traces), settings, 0, MASK_ID, PAD_ID
    )
    full, empty = taught.with_hidden(rows, plan.length, {0: traces[0]}, MASK_ID, PAD_ID)
    assert len(full.teacher_hidden) == len(traces[0].response_ids) and empty.teacher_hidden.shape == (0, 24)
    assert taught.scores(empty.teacher_hidden, 1.0, vocabulary(), None).shape == (0, 64)


def distance(own: torch.Tensor, other: torch.Tensor, kind: str) -> torch.Tensor:
    """Of log-probabilities [52], by torch's own distributions."""
    allowed = ~own.isinf()
    p, q = (torch.distributions.Categorical(logits=one[allowed]) for one in (own, other))
    kl = torch.distributions.kl_divergence
    if kind == "jsd":
        middle = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
        return (kl(p, middle) + kl(q, middle)) / 2
    return kl(p, q) if kind == "reverse" else kl(q, p)


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("pair", ["the same blocks", "larger blocks", "autoregressive", "full attention both"])
def test_loss_and_gradient_are_those_of_the_divergence(pair: str, kind: str) -> None:
    """With the surrogate and its penalty switched off; each token counts alike."""
    policy, teacher, budget = PAIRS[pair]
    config = RLConfig(rl_method="opd", distill_coef=0.7, distill_kl=kind, old_logprobs="current")
    models, traces, update, settings = prepare(policy, teacher, budget, config)
    forward = policy_forward(vocabulary(), settings, models.teacher)
    metrics = accumulate_gradients(models.policy, update.rows, forward, update.length)
    student, total, tokens = models.policy.module, 0, 0
    for trace in traces:
        with torch.no_grad():
            taught = naive(models.teacher.state.module, teacher, trace)
        for index, own in naive(student, policy, trace).items():
            total, tokens = total + distance(own, taught[index], kind), tokens + 1
    assert metrics["loss"] == pytest.approx(0.7 * total.item() / tokens, rel=1e-9)
    assert metrics["distill_loss"] == pytest.approx(total.item() / tokens, rel=1e-9)
    assert metrics["teacher_kl"] == pytest.approx(total.item(), rel=1e-9)
    found = {name: parameter.main_grad for name, parameter in models.policy.named_parameters()}
    assert furthest(found, gradients(student, 0.7 * total / tokens)) < 1e-9


def test_a_teacher_goes_beside_rewards() -> None:
    """Surrogate, penalty and divergence add up; a sum of losses over the longest response stays one."""
    both = RLConfig(distill_coef=0.5)
    parts = (RLConfig(), RLConfig(policy_loss_coef=0.0, kl_loss_coef=0.0, distill_coef=0.5))
    losses = []
    for config in (both, *parts):
        models, traces, update, settings = prepare({}, {}, 64, config)
        forward = policy_forward(vocabulary(), settings, models.teacher)
        losses.append(accumulate_gradients(models.policy, update.rows, forward, update.length))
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"] + losses[2]["loss"], rel=1e-9)
    assert losses[0]["distill_loss"] == pytest.approx(losses[0]["teacher_kl"] / (len(traces) * LONGEST), rel=1e-9)


def test_masks_that_are_drawn_are_shown_to_a_teacher_of_the_same_blocks() -> None:
    """It then says of a token what it says in the drawn state; one of other blocks is asked in states of the trace."""
    config = RLConfig(rl_method="random_masking", old_logprobs="current", distill_coef=1.0)
    models, _, update, settings = prepare({}, {}, 64, config)
    itself = dataclasses.replace(models.teacher, state=models.policy, model=model_config())
    forward = policy_forward(vocabulary(), settings, itself)
    rows = [dataclasses.replace(row, teacher_hidden=None) for row in update.rows]
    rows = itself.with_hidden(rows, update.length, {}, 0, 0)
    metrics = accumulate_gradients(models.policy, rows, forward, update.length)
    assert abs(metrics["teacher_kl"]) < 1e-10 and metrics["targets"] > 0, "the policy is its own teacher"
    assert np.isfinite(metrics["loss"])
