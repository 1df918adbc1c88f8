"""Each RL method against its formula, written out over single states of single responses on a toy model."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from megatron_dlm.config.objective import METHODS, ObjectiveConfig, with_method
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.diffusion.draws import quadrature
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.rl.methods import States, counts_of
from megatron_dlm.rl.rows import build_rows
from megatron_dlm.rl.update import plan_updates, policy_forward, update_settings, with_old_logprobs
from megatron_dlm.training.step import accumulate_gradients
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group
from tests.rl.records import record_of
from tests.tiny import (
    allowed_logprobs,
    explicit_logits,
    furthest,
    gradients,
    make_model,
    make_state,
    one_process,
    vocabulary,
)

TEMPERATURE, LONGEST, SEED, STEP = 0.8, 12, 5, 3


@functools.cache
def state():
    return make_state(torch.float64)


def responses() -> list[Trace]:
    rng = np.random.default_rng(0)
    return [trace for n in range(3) for trace in random_group(3 + n, [2 + n, 7], 4, rng, f"p{n}")]


def advantage_of(trace: Trace) -> float:
    return float(np.cos(5.0 * len(trace.prompt_ids) + 3 * trace.sample))


def shift(index: int, sample: int, view: int) -> float:
    """How far the old policy is from the present one, state by state."""
    return 0.3 * math.sin(index + 5 * sample + 3 * view)


@dataclasses.dataclass
class Seen:
    """What the toy model says of one target: its log-probability, the old policy's, and the entropy there."""

    logprob: torch.Tensor
    old: float
    entropy: torch.Tensor
    index: int
    view: int


def see(model, states: States, trace: Trace) -> list[Seen]:
    """Every target of a response, from its naive text: finished blocks, then the block as its view shows it."""
    views, prompt, found = states.item(trace, STEP).views, len(trace.prompt_ids), []
    for number in range(len(views.block)):
        own = views.position[number][views.position[number] >= 0]
        end = int(own.max()) + 1
        shown = trace.tokens[:end].copy()
        shown[views.position[number][views.masked[number]]] = MASK_ID
        blocks = torch.arange(end) // 4
        targets = views.position[number][views.target[number]]
        visible = blocks[None, :] <= blocks[:, None]
        logits = explicit_logits(model, torch.tensor(shown), torch.arange(end), visible, torch.tensor(targets))
        table = allowed_logprobs(logits, TEMPERATURE)
        entropy = -(table.exp() * table.masked_fill(table.isinf(), 0)).sum(-1)
        for n, position in enumerate(targets.tolist()):
            logprob, index = table[n, trace.tokens[position]], position - prompt
            old = logprob.item() + shift(index, trace.sample, number + 1)
            found.append(Seen(logprob, old, entropy[n], index, number + 1))
    return found


def ours(config: RLConfig) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of one update through the trainer's rows."""
    states, traces = States.of(config, 4, SEED), responses()
    records = []
    for index, trace in enumerate(traces):
        item = states.item(trace, STEP)
        records.append(record_of(trace, index, item, counts_of(item, states.method.unit)))
    settings = dataclasses.replace(
        update_settings(config, states, TEMPERATURE),
        num_updates=1,
        longest=LONGEST,
        step=STEP,
        max_tokens_per_row=max(record.load.shared + record.load.own for record in records),
    )
    ((members, plan),) = plan_updates(records, settings, one_process(), 7)
    mine = {index: traces[record.index] for index, record in enumerate(members)}
    advantages = {(trace.prompt_key, trace.sample): advantage_of(trace) for trace in traces}
    rows = build_rows(members, plan, mine, advantages, settings, 0, MASK_ID, PAD_ID)
    assert len(rows) > 1
    rows = with_old_logprobs(state(), rows, plan.length, vocabulary(), settings)
    shifted = []
    for row in rows:
        targets, view = row.row.targets, row.row.layout.view
        moves = [
            shift(index, mine[response].sample, int(view[slot]))
            for response, index, slot in zip(targets.response.tolist(), targets.index.tolist(), targets.slot.tolist())
        ]
        old = None if row.old_logprob is None else row.old_logprob + torch.tensor(moves, dtype=torch.float64)
        shifted.append(dataclasses.replace(row, old_logprob=old))
    metrics = accumulate_gradients(state(), shifted, policy_forward(vocabulary(), settings), plan.length)
    return metrics, {name: parameter.main_grad.clone() for name, parameter in state().named_parameters()}


def surrogate(delta: torch.Tensor, advantage: float, low: float, high: float) -> torch.Tensor:
    ratio = torch.exp(delta)
    return torch.min(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)


def k3(delta: torch.Tensor) -> torch.Tensor:
    return torch.exp(-delta) - 1 + delta


# Each takes (states, traces, model) and returns the loss of the method at its own defaults.
def tracerl(states, traces, seen) -> torch.Tensor:
    total = 0
    for trace, targets in zip(traces, seen):
        for one in targets:
            delta = one.logprob - one.old
            total = total - surrogate(delta, advantage_of(trace), 0.2, 0.2) + 0.01 * k3(delta)
    return total / (len(traces) * LONGEST)


def dipo(states, traces, seen) -> torch.Tensor:
    """Strictly on-policy: the gradient of A log p, over all tokens of the update alike."""
    total, tokens = 0, 0
    for trace, targets in zip(traces, seen):
        for one in targets:
            total = total - advantage_of(trace) * torch.exp(one.logprob - one.logprob.detach())
            tokens += 1
    return total / tokens


def masked(states, traces, seen) -> torch.Tensor:
    """Random masking, and coupled masks as independent rows: draws of masks are averaged."""
    return tracerl(states, traces, seen) / states.draws.draws


def paired(states, traces, seen) -> torch.Tensor:
    """A token's log-probability is the mean of those under the full mask and under its masks of the pairs."""
    total = 0
    for trace, targets in zip(traces, seen):
        prompt, views = len(trace.prompt_ids), states.item(trace, STEP).views
        for index in range(len(trace.response_ids)):
            own = [one for one in targets if one.index == index]
            whole = [one for one in own if all(views.masked[one.view - 1][views.position[one.view - 1] >= prompt])]
            # A mask of a pair can hide a whole block as well: the full mask is the first of its block.
            first = min(whole, key=lambda one: one.view)
            assert first in own and len(own) == states.draws.draws + 1
            delta = sum(one.logprob - one.old for one in own) / len(own)
            total = total - surrogate(delta, advantage_of(trace), 0.2, 0.2) + 0.01 * k3(delta)
    return total / (len(traces) * LONGEST)


def slim_rl(states, traces, seen) -> torch.Tensor:
    """Per node the mean log-ratio of what it hides; nodes by their quadrature weights."""
    total, weights = 0, quadrature(states.draws.draws)[1]
    for trace, targets in zip(traces, seen):
        by_node = _by_mask(states, trace, targets)
        kept = [(weight, members) for weight, members in zip(weights, by_node) if members]
        delta = sum(weight * sum(one.logprob - one.old for one in members) / len(members) for weight, members in kept)
        delta = delta / sum(weight for weight, _ in kept)
        total = total - surrogate(delta, advantage_of(trace), 0.1, 0.1) + 0.01 * k3(delta)
    return total / len(traces)


def espo(states, traces, seen) -> torch.Tensor:
    """exp((bound - old bound) / length); the penalty is half the squared difference of bounds over the length."""
    total = 0
    for trace, targets in zip(traces, seen):
        length = len(trace.response_ids)
        key = stream(SEED, "rl-mask", STEP, trace.prompt_key, trace.sample)
        ratio = states.draws.draw(key, 0, np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64))[1].item()
        here, there = _by_mask(states, trace, targets)
        bound = lambda value: 0.5 * (sum(map(value, here)) / ratio + sum(map(value, there)) / (1 - ratio))
        difference = bound(lambda one: one.logprob) - bound(lambda one: one.old)
        total = total - surrogate(difference / length, advantage_of(trace), 0.2, 0.2)
        total = total + 0.01 * 0.5 * difference**2 / length
    return total / len(traces)


def ebpo(states, traces, seen) -> torch.Tensor:
    total, (nodes, weights) = 0, quadrature(states.draws.draws)
    for trace, targets in zip(traces, seen):
        delta = 0
        for node, weight, members in zip(nodes, weights, _by_mask(states, trace, targets)):
            delta = delta + weight / node * sum(one.logprob - one.old for one in members)
        total = total - surrogate(delta, advantage_of(trace), 0.2, 0.2)
    return total / len(traces)


def _by_mask(states: States, trace: Trace, targets: list[Seen]) -> list[list[Seen]]:
    """Targets by the mask that hid them, told from the masks themselves: drawn again, one after the other."""
    from megatron_dlm.diffusion import draws as drawn

    key = stream(SEED, "rl-mask", STEP, trace.prompt_key, trace.sample)
    learned, how = np.ones(len(trace.response_ids), dtype=bool), states.draws
    views, prompt = states.item(trace, STEP).views, len(trace.prompt_ids)
    if states.method.draw is drawn.elbo_views:
        position = np.arange(prompt, len(trace.tokens))[None]
        mask = how.draw(key, 0, position, position[:, 0])[0][0]
        hidden = [set(np.flatnonzero(mask)), set(np.flatnonzero(~mask))]
    else:
        blocks = -(-len(trace.tokens) // 4) - prompt // 4
        hidden = []
        for number, node in enumerate(quadrature(how.draws)[0]):
            uniform = drawn._uniforms(key, number, np.arange(prompt, len(trace.tokens))[None], 1)[0]
            block = np.arange(prompt, len(trace.tokens)) // 4 - prompt // 4
            spread = min(0.2, node, 1 - node) if states.method.draw is drawn.quadrature_views else 0
            fall = spread * np.cos(np.pi * (block + 0.5) / blocks)
            hidden.append(set(np.flatnonzero(uniform < node + fall)))
    assert learned.all()
    found = [[] for _ in hidden]
    for one in targets:
        row = one.view - 1
        shown = views.position[row][views.masked[row]] - prompt
        window = views.position[row][views.position[row] >= prompt] - prompt
        fitting = [n for n, own in enumerate(hidden) if set(shown) == own & set(window)]
        # Masks of equal looks are told apart by how often that view came before.
        same = [
            other
            for other in range(row)
            if views.block[other] == views.block[row] and np.array_equal(views.masked[other], views.masked[row])
        ]
        found[fitting[len(same)]].append(one)
    return found


CASES = {
    "tracerl": (dict(), tracerl),
    "dipo": (dict(), dipo),
    "random_masking": (dict(mask_draws=3), masked),
    "random_masking per token": (dict(rl_method="random_masking", mask_ratio_per="token"), masked),
    "coupled": (dict(mask_draws=2), masked),
    "coupled paired": (dict(rl_method="coupled", coupled_estimator="paired", mask_draws=2), paired),
    "slim_rl": (dict(), slim_rl),
    "espo": (dict(), espo),
    "ebpo": (dict(), ebpo),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_formula(name: str) -> None:
    changes, formula = CASES[name]
    config = with_method(RLConfig(**{"rl_method": name, **changes}))
    metrics, grads = ours(config)
    states, traces, model = States.of(config, 4, SEED), responses(), make_model(torch.float64)
    loss = formula(states, traces, [see(model, states, trace) for trace in traces])
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert furthest(grads, gradients(model, loss)) < 1e-9


@pytest.mark.parametrize("name", ["tracerl", "coupled", "espo"])
def test_the_entropy_is_raised_with_the_weights_of_the_loss(name: str) -> None:
    config = with_method(RLConfig(rl_method=name, policy_loss_coef=0.0, kl_loss_coef=0.0, entropy_coef=0.7))
    metrics, grads = ours(config)
    states, traces, model = States.of(config, 4, SEED), responses(), make_model(torch.float64)
    total = 0
    for trace in traces:
        targets, views = see(model, states, trace), states.item(trace, STEP).views
        weights = views.weight[views.target]
        share = weights / weights.sum() / len(traces) if name == "espo" else weights / (len(traces) * LONGEST)
        total = total - sum(own * one.entropy for own, one in zip(share, targets))
    assert metrics["loss"] == pytest.approx(0.7 * total.item(), rel=1e-9)
    assert furthest(grads, gradients(model, 0.7 * total)) < 1e-9


def test_slices_are_means_of_their_own() -> None:
    """Each step of a block counts the same, however many tokens it decided: eq. 3 of the paper, over all steps."""
    config = with_method(RLConfig(loss_aggregation="slice", kl_loss_coef=0.0))
    metrics, grads = ours(config)
    states, traces, model = States.of(config, 4, SEED), responses(), make_model(torch.float64)
    means = []
    for trace in traces:
        targets = see(model, states, trace)
        for view in {one.view for one in targets}:
            own = [
                surrogate(one.logprob - one.old, advantage_of(trace), 0.2, 0.2) for one in targets if one.view == view
            ]
            means.append(sum(own) / len(own))
    loss = -sum(means) / len(means)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert furthest(grads, gradients(model, loss)) < 1e-9


def test_the_penalty_can_be_summed_within_slices() -> None:
    """As the published code for full attention does: a mean over slices of sums."""
    config = with_method(
        RLConfig(loss_aggregation="slice", kl_aggregation="slice_sum", policy_loss_coef=0.0, kl_loss_coef=0.5)
    )
    metrics, _ = ours(config)
    states, traces, model = States.of(config, 4, SEED), responses(), make_model(torch.float64)
    seen = [see(model, states, trace) for trace in traces]
    slices = sum(len({one.view for one in targets}) for targets in seen)
    total = sum(k3(one.logprob - one.old) for targets in seen for one in targets)
    assert metrics["loss"] == pytest.approx(0.5 * total.item() / slices, rel=1e-9)


def test_every_method_fills_what_it_decides_on_and_nothing_else() -> None:
    for name in METHODS:
        filled = with_method(ObjectiveConfig(rl_method=name))
        assert all(getattr(filled, field) is not None for field in ("eps_clip", "old_logprobs", "mask_draws"))
        assert with_method(filled) == filled
    assert with_method(ObjectiveConfig(rl_method="dipo", kl_loss_coef=0.3)).kl_loss_coef == 0.3
    assert with_method(ObjectiveConfig(rl_method="dipo")).normalize_advantages_by_std is False


def test_masks_are_drawn_anew_in_each_step() -> None:
    states = States.of(with_method(RLConfig(rl_method="random_masking")), 4, SEED)
    trace = responses()[1]
    views = [states.item(trace, step).views.masked for step in (1, 1, 2)]
    assert np.array_equal(views[0], views[1]) and not (
        views[0].shape == views[2].shape and np.array_equal(views[0], views[2])
    )


@pytest.mark.parametrize("name", ["tracerl", "random_masking", "espo"])
def test_the_stop_token_can_be_left_out(name: str) -> None:
    config = with_method(RLConfig(rl_method=name, learn_stop_token=False))
    states, trace = States.of(config, 4, SEED), responses()[1]
    last = len(trace.tokens) - len(trace.tail_ids) - 1
    for stopped in (True, False):
        one = dataclasses.replace(trace, finish_reason="stop" if stopped else "length")
        predicted = set()
        for step in range(12):
            views = states.item(one, step).views
            predicted |= set(views.position[views.target].tolist())
        assert (last in predicted) == (not stopped)
        assert len(predicted) == len(trace.response_ids) - stopped
