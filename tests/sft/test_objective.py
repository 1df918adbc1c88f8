"""The loss of block SFT against a loop over single blocks, each run as a text of its own."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.planner import Load, pack
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.sft.objective import sft_forward
from megatron_dlm.sft.updates import sft_items
from megatron_dlm.training.step import accumulate_gradients
from tests.diffusion.oracles import MASK_ID, PAD_ID
from tests.tiny import allowed_logprobs, explicit_logits, furthest, gradients, make_model, make_state, vocabulary

SEED, STEP = 3, 17


@functools.cache
def state():
    return make_state(torch.float64)


def samples(count: int = 9) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            f"s{n}", tuple(rng.integers(0, 50, 1 + n).tolist()), tuple(rng.integers(0, 50, 3 + (n * 5) % 8).tolist())
        )
        for n in range(count)
    ]


def settings(schedule: MaskSchedule, loss_on_pad: bool, redraw_masks: bool = True) -> SFTConfig:
    return SFTConfig(
        mask_ratio_per=schedule.per,
        min_mask_ratio=schedule.min_ratio,
        max_mask_ratio=schedule.max_ratio,
        max_loss_weight=schedule.max_weight,
        loss_on_pad=loss_on_pad,
        redraw_masks=redraw_masks,
    )


def naive(
    model, chosen: list[Sample], block: int, schedule: MaskSchedule, loss_on_pad: bool
) -> tuple[torch.Tensor, int, int]:
    """(loss, number of predicted tokens, response tokens D)."""
    loss, predicted, total = 0, 0, 0
    for sample in chosen:
        prompt, text = len(sample.prompt_ids), [*sample.prompt_ids, *sample.response_ids]
        written = len(text)
        while len(text) % block:
            text.append(PAD_ID)
        until = len(text) if loss_on_pad else written
        total += until - prompt
        response = torch.arange(prompt, len(text))
        hidden, weight = schedule.draw(stream(SEED, "sft-mask", STEP, sample.key, 0), response, response // block)
        for start in range(prompt // block * block, len(text), block):
            inside = [p for p in range(max(start, prompt), start + block) if hidden[p - prompt]]
            decided = [p for p in inside if p < until]
            if not decided:
                continue
            shown = torch.tensor([MASK_ID if p in inside else text[p] for p in range(start + block)])
            blocks = torch.arange(start + block) // block
            logits = explicit_logits(
                model, shown, torch.arange(len(shown)), blocks[None, :] <= blocks[:, None], torch.tensor(decided)
            )
            logprob = allowed_logprobs(logits)
            for n, position in enumerate(decided):
                loss = loss - weight[position - prompt] * logprob[n, text[position]]
                predicted += 1
    return loss / total, predicted, total


def packed(
    chosen: list[Sample], block: int, schedule: MaskSchedule, loss_on_pad: bool, budget: int = 512, step: int = STEP
):
    drawn = sft_items(chosen, step, SEED, Grid(block), settings(schedule, loss_on_pad), PAD_ID)
    plan = pack([Load(item.group, item.shared_length, item.own_length) for item in drawn.items], budget, 1, 16)
    rows = [
        build_row([(i, drawn.items[i]) for i in members], plan.length, MASK_ID, PAD_ID).to(platform.device())
        for members in plan.ranks[0]
    ]
    metrics = accumulate_gradients(state(), rows, sft_forward(vocabulary(), drawn.num_predicted), plan.length)
    return (
        metrics,
        {name: parameter.main_grad.clone() for name, parameter in state().named_parameters()},
        drawn,
        len(rows),
    )


@pytest.mark.parametrize("loss_on_pad", [True, False])
@pytest.mark.parametrize("block, per", [(1, "block"), (4, "block"), (4, "sample"), (8, "block")])
def test_is_the_loss_of_single_blocks(block: int, per: str, loss_on_pad: bool) -> None:
    schedule = MaskSchedule(per, max_weight=4.0)
    model = make_model(torch.float64)
    loss, predicted, total = naive(model, samples(), block, schedule, loss_on_pad)
    metrics, grads, drawn, _ = packed(samples(), block, schedule, loss_on_pad)
    assert (drawn.num_predicted, metrics["targets"]) == (total, predicted)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-11)
    assert furthest(grads, gradients(model, loss)) < 1e-10


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_of_the_head_do_not_change_an_update(chunk: int, tied: bool) -> None:
    one = make_state(torch.float64, untie_embeddings_and_output_weights=not tied)
    drawn = sft_items(samples(), STEP, SEED, Grid(4), settings(MaskSchedule(), True), PAD_ID)
    rows = [build_row([(0, item)], 64, MASK_ID, PAD_ID).to(platform.device()) for item in drawn.items[:3]] + [
        build_row([], 64, MASK_ID, PAD_ID).to(platform.device())
    ]  # and one without targets
    found = []
    for size in (0, chunk):
        metrics = accumulate_gradients(one, rows, sft_forward(vocabulary(), drawn.num_predicted, size), 64)
        found.append((metrics, {name: parameter.main_grad.clone() for name, parameter in one.named_parameters()}))
    (table, by_table), (chunked, by_chunks) = found
    assert table["targets"] > 7 and chunked == pytest.approx(table, rel=1e-12)
    assert furthest(by_chunks, by_table) < 1e-11


@pytest.mark.parametrize("budget", [40, 64, 96])
def test_rows_do_not_change_an_update(budget: int) -> None:
    metrics, grads, _, one = packed(samples(), 4, MaskSchedule(), True)
    other_metrics, other, _, rows = packed(samples()[::-1], 4, MaskSchedule(), True, budget)
    assert one == 1 < rows
    assert furthest(other, grads) < 1e-10
    for name in metrics:
        assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-11), name


def masks(chosen: list[Sample], step: int, seed: int = SEED) -> list[list[tuple[int, ...]]]:
    drawn = sft_items(chosen, step, seed, Grid(4), settings(MaskSchedule(), True), PAD_ID)
    return [
        [
            tuple(item.views.position[item.views.masked].tolist())
            for item in drawn.items
            if item.group == repr(sample.prompt_ids)
        ]
        for sample in chosen
    ]


def test_masks_are_drawn_anew_at_every_step_and_for_every_seed() -> None:
    one = masks(samples(), 1)
    assert masks(samples(), 1) == one
    assert masks(samples(), 2) != one and masks(samples(), 1, seed=4) != one
    assert masks(samples()[::-1], 1)[::-1] == one  # whoever stands beside it


def test_masks_can_stay() -> None:
    """Then they are those of one draw for each sample, whatever the step and whoever stands beside it."""
    chosen, schedule, grid = samples(), MaskSchedule(), Grid(4)

    def hidden(some: list[Sample], step: int, redraw: bool) -> list[dict[int, float]]:
        found = []
        for sample in some:
            drawn = sft_items([sample], step, SEED, grid, settings(schedule, True, redraw), PAD_ID).items
            found.append({int(p): float(w) for one in drawn for p, w in predicted(one)})
        return found

    def predicted(item):
        views = item.views
        return zip(views.position[views.target], views.weight[views.target], strict=True)

    kept = hidden(chosen, 1, False)
    for sample, found in zip(chosen, kept, strict=True):
        prompt, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
        position = torch.arange(prompt, -(-end // 4) * 4)
        masked, weight = schedule.draw(stream(SEED, "sft-mask", sample.key), position, position // 4)
        assert found == dict(zip(position[masked].tolist(), weight[masked].tolist()))
    assert hidden(chosen, 2, False) == kept and hidden(chosen[::-1], 9, False)[::-1] == kept
    assert hidden(chosen, 1, True) != kept
    twice = sft_items([chosen[3], chosen[3]], 5, SEED, grid, settings(schedule, True, False), PAD_ID).items
    assert list(predicted(twice[0])) == list(predicted(twice[1])) and len(twice) == 2


def test_a_sample_that_comes_twice_has_two_masks() -> None:
    sample = samples()[3]  # its response is the longest
    (first, second), _ = masks([sample, sample], 1)
    assert first != second


def test_the_expected_loss_is_the_evidence_bound_per_token() -> None:
    """With an indifferent model (all logits equal) each token costs log 51 x w(t) x P(hidden | t) = log 51, whatever t.

    That holds while 1/t is not clipped.
    """
    state = make_state(torch.float64)
    with torch.no_grad():
        state.module.output_layer.weight.zero_()
    chosen, losses = samples(), []
    for step in range(150):
        drawn = sft_items(
            chosen, step, SEED, Grid(4), settings(MaskSchedule(min_ratio=0.2, max_weight=5.0), True), PAD_ID
        )
        losses.append(
            sum(float(item.views.weight[item.views.target].sum()) for item in drawn.items) / drawn.num_predicted
        )
    assert np.mean(losses) == pytest.approx(1, abs=4 * np.std(losses) / len(losses) ** 0.5)
    row = build_row([(0, drawn.items[0])], 64, MASK_ID, PAD_ID).to(platform.device())
    metrics = accumulate_gradients(state, [row], sft_forward(vocabulary(), 1), 64)
    assert metrics["nll"] / metrics["targets"] == pytest.approx(np.log(51))


def test_full_attention_has_no_padding_block() -> None:
    sample = samples()[4]
    drawn = sft_items([sample], 0, SEED, Grid(None), settings(MaskSchedule(min_ratio=0.9), True), PAD_ID)
    assert drawn.num_predicted == len(sample.response_ids)
    assert drawn.items[0].tokens.tolist() == [*sample.prompt_ids, *sample.response_ids]
