"""Each objective against a plain loop: its states written out one by one, each run as a text of its own."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.balance import load_of
from megatron_dlm.diffusion.keys import stream, uniforms
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import pack_parts
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.diffusion.views import split_views
from megatron_dlm.sft.objective import sft_forward
from megatron_dlm.sft.updates import sft_items
from megatron_dlm.training.step import accumulate_gradients
from tests.diffusion.oracles import MASK_ID, PAD_ID
from tests.tiny import allowed_logprobs, explicit_logits, furthest, gradients, make_model, make_state, vocabulary

SEED, STEP = 3, 17


@functools.cache
def state(logit_shift: int = 0):
    return make_state(torch.float64, logit_shift=logit_shift)


@functools.cache
def model(logit_shift: int = 0):
    return make_model(torch.float64, logit_shift=logit_shift)


def samples(count: int = 6) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for n in range(count):
        prompt, response = rng.integers(0, 50, 1 + n).tolist(), rng.integers(0, 50, 3 + (n * 5) % 8).tolist()
        found.append(Sample(f"s{n}", tuple(prompt), tuple(response)))
    return found


@dataclass
class State:
    """A text as the model sees it once: what is shown, who sees whom, and what is predicted where, with weights."""

    shown: list[int]
    sees: torch.Tensor
    targets: list[tuple[int, int, float]] = field(default_factory=list)  # (slot read, label, weight)


def blocks_of(length: int, block: int | None) -> torch.Tensor:
    """Block-causal attention over `length` positions; everything sees everything without blocks."""
    index = torch.arange(length) // (block or length)
    return index[None, :] <= index[:, None]


def naive(states: list[State], total: int, shift: int = 0) -> tuple[torch.Tensor, int]:
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for one in states:
        if not one.targets:
            continue
        slots = torch.tensor([slot for slot, _, _ in one.targets])
        position = torch.arange(len(one.shown))
        logprob = allowed_logprobs(explicit_logits(model(shift), torch.tensor(one.shown), position, one.sees, slots))
        for n, (_, label, weight) in enumerate(one.targets):
            loss = loss - weight * logprob[n, label]
            count += 1
    return loss / total, count


def ours(chosen: list[Sample], sft: SFTConfig, grid: Grid, shift: int = 0, budget: int = 256):
    drawn = sft_items(chosen, STEP, SEED, grid, sft, PAD_ID)
    parts = [split_views(item, budget) for item in drawn.items]
    plan = pack_parts([[load_of(part) for part in item] for item in parts], budget)
    rows = [
        build_row([(item, parts[item][part]) for item, part in zip(*row)], plan.length, MASK_ID, PAD_ID)
        for row in zip(plan.ranks[0], plan.parts[0])
    ]
    forward = sft_forward(
        vocabulary(), drawn.num_predicted, 0, drawn.causal_from if sft.ar_loss_coef else None, sft.confidence_coef
    )
    one = state(shift)
    metrics = accumulate_gradients(one, [row.to(platform.device()) for row in rows], forward, plan.length)
    return metrics, {name: parameter.main_grad.clone() for name, parameter in one.named_parameters()}, drawn


def check(chosen: list[Sample], sft: SFTConfig, grid: Grid, states: list[State], total: int, shift: int = 0) -> None:
    expected, count = naive(states, total, shift)
    wanted = gradients(model(shift), expected)
    for budget in (64, 256):
        metrics, grads, drawn = ours(chosen, sft, grid, shift, budget)
        assert (drawn.num_predicted, metrics["targets"] + metrics.get("causal_targets", 0)) == (total, count)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-10)
        assert furthest(grads, wanted) < 1e-9


def draw(sample: Sample, number: int, positions: list[int], units: list[int], low: float, high: float):
    """Mask `number` of a sample and the ratio of each of its tokens: uniforms of (unit, 2n) and (position, 2n + 1)."""
    key, two = stream(SEED, "sft-mask", STEP, sample.key, 0), 2 * number
    ratio = [low + (high - low) * float(uniforms(key, torch.tensor([unit]), torch.tensor([two]))) for unit in units]
    lots = [float(uniforms(key, torch.tensor([p]), torch.tensor([two + 1]))) for p in positions]
    return [lot < t for lot, t in zip(lots, ratio)], ratio, lots


def block_states(sample: Sample, block: int, hidden: set[int], weights: dict[int, float], until: int, shift: int = 0):
    """One state per block in which something is hidden, behind finished text."""
    prompt, text = len(sample.prompt_ids), [*sample.prompt_ids, *sample.response_ids]
    text += [PAD_ID] * (-len(text) % block)
    for start in range(prompt // block * block, len(text), block):
        inside = [p for p in range(max(start, prompt), start + block) if p in hidden]
        shown = [MASK_ID if p in inside else text[p] for p in range(start + block)]
        found = State(shown, blocks_of(start + block, block))
        for p in inside:
            if p < until:
                read = max(p - shift, 0)
                found.targets.append((read, text[p], weights[p]))
        yield found


BLOCKS = [4, 8]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("pairs, draws", [(False, 1), (False, 2), (True, 1)])
def test_semi_autoregressive_blocks(block: int, pairs: bool, draws: int) -> None:
    """Each token hidden with a chance of its own between 0.1 and 0.9, all hidden ones alike."""
    sft = SFTConfig(sft_objective="semi_ar", complementary_masks=pairs, mask_draws=draws)
    states, total = [], 0
    for sample in samples():
        prompt, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
        positions = list(range(prompt, end + -end % block))
        total += len(positions)
        for number in range(draws):
            hidden, _, _ = draw(sample, number, positions, positions, 0.1, 0.9)
            masks = [{p for p, h in zip(positions, hidden) if h}]
            masks += [set(positions) - masks[0]] if pairs else []
            for mask in masks:
                weight = 1 / (draws * (1 + pairs))
                states += block_states(sample, block, mask, dict.fromkeys(positions, weight), 10**6)
    check(samples(), sft, Grid(block), states, total)


@pytest.mark.parametrize("canvas", [None, 14])
@pytest.mark.parametrize("slices", [2, 5])
def test_semi_autoregressive_slices_under_full_attention(slices: int, canvas: int | None) -> None:
    """A slice behind finished text, and before nothing but masks."""
    sft = SFTConfig(sft_objective="semi_ar", slice_size=slices, canvas_length=canvas)
    states, total = [], 0
    for sample in samples():
        prompt, text = len(sample.prompt_ids), [*sample.prompt_ids, *sample.response_ids]
        positions, length = list(range(prompt, len(text))), max(len(text), prompt + (canvas or 0))
        total += len(positions)
        hidden, _, _ = draw(sample, 0, positions, positions, 0.1, 0.9)
        for start in range(prompt, len(text), slices):
            inside = {p for p, h in zip(positions, hidden) if h and start <= p < start + slices}
            shown = [
                text[p] if p < start + slices and p < len(text) and p not in inside else MASK_ID for p in range(length)
            ]
            states.append(State(shown, blocks_of(length, None), [(p, text[p], 1.0) for p in sorted(inside)]))
    check(samples(), sft, Grid(None), states, total)


@pytest.mark.parametrize("canvas", [None, 14])
@pytest.mark.parametrize("grid, shift", [(Grid(4), 0), (Grid(None), 0), (Grid(None), 1)], ids=str)
def test_random_masking(grid: Grid, shift: int, canvas: int | None) -> None:
    """One ratio for the response, all hidden tokens alike."""
    if grid.block_size is not None and canvas is not None:
        return
    sft = SFTConfig(sft_objective="random_masking", mask_draws=2, canvas_length=canvas, loss_on_pad=False)
    states, total = [], 0
    for sample in samples():
        prompt, text = len(sample.prompt_ids), [*sample.prompt_ids, *sample.response_ids]
        positions = list(range(prompt, len(text) + (-len(text) % 4 if grid.block_size else 0)))
        total += len(sample.response_ids)
        for number in range(2):
            hidden, _, _ = draw(sample, number, positions, [0] * len(positions), 0.1, 0.9)
            mask = {p for p, h in zip(positions, hidden) if h}
            if grid.block_size:
                states += block_states(sample, 4, mask, dict.fromkeys(positions, 0.5), len(text))
                continue
            length = max(len(text), prompt + (canvas or 0))
            shown = [text[p] if p < len(text) and p not in mask else MASK_ID for p in range(length)]
            targets = [(p - shift, text[p], 0.5) for p in sorted(mask)]
            states.append(State(shown, blocks_of(length, None), targets))
    check(samples(), sft, grid, states, total, shift)


def test_a_mask_hides_at_least_one_token_of_each_block() -> None:
    """Where the draw hides none: that whose lot came nearest to its ratio."""
    sft = SFTConfig(
        min_mask_ratio=0.05, max_mask_ratio=0.2, mask_at_least_one=True, loss_on_pad=False, max_loss_weight=9.0
    )
    states, total, forced = [], 0, 0
    for sample in samples():
        prompt, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
        positions = list(range(prompt, end + -end % 4))
        total += end - prompt
        hidden, ratio, lots = draw(sample, 0, positions, [p // 4 for p in positions], 0.05, 0.2)
        mask = {p for p, h in zip(positions, hidden) if h}
        for start in range(prompt // 4 * 4, end, 4):
            learned = list(range(max(prompt, start), min(start + 4, end)))
            if not mask & set(learned):
                mask.add(min(learned, key=lambda p: lots[p - prompt] / ratio[p - prompt]))
                forced += 1
        weights = {p: min(1 / t, 9.0) for p, t in zip(positions, ratio)}
        states += block_states(sample, 4, mask, weights, end)
    assert forced > 3
    check(samples(), sft, Grid(4), states, total)


def with_steps(chosen: list[Sample], block: int) -> list[Sample]:
    rng, found = np.random.default_rng(1), []
    for sample in chosen:
        prompt, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
        steps, last = [], 0
        for start in range(prompt // block * block, end, block):
            inside = range(max(start, prompt), min(start + block, end))
            mine = rng.integers(1, 4, len(inside))
            steps += (last + 1 + np.unique(mine, return_inverse=True)[1]).tolist()
            last = max(steps)
        found.append(Sample(sample.key, sample.prompt_ids, sample.response_ids, tuple(steps)))
    return found


@pytest.mark.parametrize("loss_on_pad", [True, False])
@pytest.mark.parametrize("grid", [Grid(4), Grid(8), Grid(None)], ids=str)
def test_steps_of_a_trace(grid: Grid, loss_on_pad: bool) -> None:
    """Each token in the state in which it was decided; pads of the last block after all others."""
    sft, states, total = SFTConfig(sft_objective="trace", loss_on_pad=loss_on_pad), [], 0
    for sample in with_steps(samples(), 4):
        prompt, text = len(sample.prompt_ids), [*sample.prompt_ids, *sample.response_ids]
        written, block = len(text), grid.block_size
        text += [PAD_ID] * (-len(text) % block if block else 0)
        steps = [0] * prompt + list(sample.step_map) + [max(sample.step_map) + 1] * (len(text) - written)
        until = len(text) if loss_on_pad else written
        total += until - prompt
        for start in range(prompt // block * block, len(text), block) if block else [0]:
            end = start + block if block else len(text)
            for step in sorted({steps[p] for p in range(max(start, prompt), min(end, until))}):
                shown = [MASK_ID if p >= max(start, prompt) and steps[p] >= step else text[p] for p in range(end)]
                found = [(p, text[p], 1.0) for p in range(max(start, prompt), min(end, until)) if steps[p] == step]
                states.append(State(shown, blocks_of(end, block), found))
    check(with_steps(samples(), 4), sft, grid, states, total)


def test_steps_that_shrink() -> None:
    sft = SFTConfig(sft_objective="trace", shrinkage=2, loss_on_pad=False)
    sample = Sample("s", (7, 8, 9, 10), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 1, 3, 4, 4, 5, 6))
    text, merged = [7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8], [0] * 4 + [2, 2, 2, 3, 5, 5, 5, 6]
    states = []
    for start in (4, 8):
        for step in sorted(set(merged[start : start + 4])):
            shown = [MASK_ID if p >= start and merged[p] >= step else text[p] for p in range(start + 4)]
            targets = [(p, text[p], 1.0) for p in range(start, start + 4) if merged[p] == step]
            states.append(State(shown, blocks_of(start + 4, 4), targets))
    check([sample], sft, Grid(4), states, 8)


def causal_states(chosen: list[Sample], weight: float) -> list[State]:
    states = []
    for sample in chosen:
        prompt, text = len(sample.prompt_ids), [*sample.prompt_ids, *sample.response_ids]
        targets = [(p - 1, text[p], weight) for p in range(max(prompt, 1), len(text))]
        states.append(State(text, blocks_of(len(text), 1), targets))
    return states


@pytest.mark.parametrize("grid, shift", [(Grid(1), 1), (Grid(4), 0), (Grid(4), 1), (Grid(None), 0)], ids=str)
def test_next_token(grid: Grid, shift: int) -> None:
    """Whatever the model's blocks, the text is read causally, and at the token before, with a logit shift or not."""
    chosen = [*samples(), Sample("s2", samples()[2].prompt_ids, (4, 5, 6)), Sample("d", (), (9, 8, 7, 6))]
    total = sum(len(sample.response_ids) for sample in chosen)
    check(chosen, SFTConfig(sft_objective="ar"), grid, causal_states(chosen, 1.0), total, shift)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_loss_of_next_tokens_beside_the_objective(shift: int) -> None:
    sft = SFTConfig(min_mask_ratio=1.0, ar_loss_coef=0.5, loss_on_pad=False)
    states = causal_states(samples(), 0.5)
    for sample in samples():
        prompt, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
        positions = range(prompt, end + -end % 4)
        states += block_states(sample, 4, set(positions), dict.fromkeys(positions, 1.0), end, shift)
    total = sum(len(sample.response_ids) for sample in samples())
    check(samples(), sft, Grid(4), states, total, shift)
    metrics, _, _ = ours(samples(), sft, Grid(4), shift)
    assert metrics["targets"] == metrics["causal_targets"] == total  # nobody's prompt is empty


def test_a_noised_prompt_is_learned_like_the_response() -> None:
    sft = SFTConfig(min_mask_ratio=1.0, noise_prompt=True)
    chosen = samples()
    joined = [Sample(one.key, (), one.prompt_ids + one.response_ids) for one in chosen]
    states, total = [], 0
    for one in joined:
        length = len(one.response_ids) + -len(one.response_ids) % 4
        total += length
        states += block_states(one, 4, set(range(length)), dict.fromkeys(range(length), 1.0), length)
    check(chosen, sft, Grid(4), states, total)


@pytest.mark.parametrize("grid", [Grid(None), Grid(32), Grid(4)], ids=str)
def test_samples_of_one_key_have_prompts_of_their_own(grid: Grid) -> None:
    """Keys forget white space, tokens do not."""
    chosen = [Sample("s", (1, 2), (3, 4, 5)), Sample("s", (1, 6, 2), (3, 4, 5)), Sample("s", (1, 2), (3, 4, 5))]
    drawn = sft_items(chosen, STEP, SEED, grid, SFTConfig(ar_loss_coef=1.0, min_mask_ratio=1.0), PAD_ID)
    row = build_row(list(enumerate(drawn.items)), 256, MASK_ID, PAD_ID)
    assert len(drawn.items) == 6 and len(row.targets.slot) == sum(item.views.num_targets for item in drawn.items)


def test_the_largest_ratio_rises_and_weights_wait() -> None:
    sft = SFTConfig(min_mask_ratio=0.001, mask_ratio_warmup_iters=1000)
    chosen = [Sample("s", (1,), tuple(range(40)))] * 20
    shares = []
    for step in (0, 499, 999, 1000):
        drawn = sft_items(chosen, step, SEED, Grid(4), sft, PAD_ID)
        weights = np.concatenate([item.views.weight[item.views.target] for item in drawn.items] or [np.ones(1)])
        assert (weights == 1).all() == (step < 1000)
        shares.append(sum(item.views.num_targets for item in drawn.items) / drawn.num_predicted)
    assert shares[0] < 0.02 and abs(shares[1] - 0.25) < 0.05 and abs(shares[2] - 0.5) < 0.06, shares


def test_the_expectation_is_the_bound_over_all_masks() -> None:
    """A block of three tokens: the integral over the ratio of each of the 8 masks' chances, times 1/t and what the
    model says under it, against the mean of what is drawn."""
    sample, low = Sample("s", (3, 4, 5, 6, 7), (11, 12, 13)), 0.02
    text = [*sample.prompt_ids, *sample.response_ids]
    cost = {}
    for mask in itertools.product((False, True), repeat=3):
        shown = [MASK_ID if p >= 5 and mask[p - 5] else text[p] for p in range(8)]
        slots = [p for p in range(5, 8) if mask[p - 5]]
        if slots:
            logprob = allowed_logprobs(
                explicit_logits(model(), torch.tensor(shown), torch.arange(8), blocks_of(8, 4), torch.tensor(slots))
            )
            cost[mask] = -sum(float(logprob[n, text[p]]) for n, p in enumerate(slots))
    nodes, shares = np.polynomial.legendre.leggauss(200)
    ratio, shares = low + (1 - low) * (nodes + 1) / 2, shares / 2
    bound = sum(
        float((shares * ratio ** sum(mask) * (1 - ratio) ** (3 - sum(mask)) / ratio).sum()) * value
        for mask, value in cost.items()
    )
    closed = sum(
        math.factorial(k - 1) * math.factorial(3 - k) / 6 * value for mask, value in cost.items() if (k := sum(mask))
    )
    assert bound == pytest.approx(closed, rel=0.05)  # which is the bound without the smallest ratios
    sft, found = SFTConfig(min_mask_ratio=low, max_loss_weight=1 / low), []
    for step in range(6000):
        drawn = sft_items([sample], step, SEED, Grid(4), sft, PAD_ID)
        total = 0.0
        for item in drawn.items:
            mask = tuple(item.views.target[0, 1:].tolist())
            total += float(item.views.weight[0, 1:].max()) * cost[mask]
        found.append(total)
    assert np.mean(found) == pytest.approx(bound, abs=4 * np.std(found) / len(found) ** 0.5)
    assert np.std(found) / len(found) ** 0.5 < 0.05 * bound
