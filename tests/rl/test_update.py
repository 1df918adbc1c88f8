"""One update of the policy: against the formula over single denoising states, and against itself in other rows."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rl.methods import TARGET, counts_of, replay
from megatron_dlm.rl.objective import PolicyObjective
from megatron_dlm.rl.rows import RLRow, build_rows
from megatron_dlm.rl.update import (
    UpdateSettings,
    fetch,
    plan_updates,
    policy_forward,
    with_old_logprobs,
)
from megatron_dlm.training.step import accumulate_gradients
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, states
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

SETTINGS = UpdateSettings(
    objective=PolicyObjective(0.2, 0.3, 0.1),
    temperature=0.8,
    aggregation="constant",
    longest=12,
    num_updates=1,
    max_tokens_per_row=512,
    states=replay(Grid(4)),
)


@functools.cache
def state():
    return make_state(torch.float64)


def responses() -> list[Trace]:
    """Four prompts with three responses each, of all lengths modulo the block."""
    rng = np.random.default_rng(0)
    return [trace for n in range(4) for trace in random_group(3 + n, [2 + n, 7, 5 - n], 4, rng, f"p{n}")]


def graded(traces: list[Trace], settings: UpdateSettings) -> list[Graded]:
    records = []
    for index, trace in enumerate(traces):
        item = settings.states.item(trace, settings.step, settings.oldest_version)
        records.append(record_of(trace, index, item, counts_of(item, TARGET)))
    return records


def advantages(traces: list[Trace]) -> dict[tuple[str, int], float]:
    return {
        (trace.prompt_key, trace.sample): float(np.cos(5.0 * len(trace.prompt_ids) + 3 * trace.sample))
        for trace in traces
    }


def old_logprob(trace: Trace, index: int, now: float) -> float:
    """An old policy at some distance from the present one, token by token."""
    return now + 0.4 * float(np.sin(index + 5 * trace.sample + len(trace.prompt_ids)))


def rows_of(traces: list[Trace], settings: UpdateSettings) -> tuple[list[tuple[list[RLRow], int]], list]:
    """Rows of every update, old log-probabilities shifted by `old_logprob`."""
    groups = one_process()
    records = graded(traces, settings)
    updates = plan_updates(records, settings, groups, stream=11)
    prepared = []
    for (members, plan), mine in zip(updates, fetch(updates, traces, groups)):
        rows = build_rows(members, plan, mine, advantages(traces), settings, 0, MASK_ID, PAD_ID)
        shifted = []
        for row in with_old_logprobs(state(), rows, plan.length, vocabulary(), settings):
            pairs = zip(row.row.targets.response.tolist(), row.row.targets.index.tolist(), row.old_logprob.tolist())
            old = torch.tensor(
                [old_logprob(mine[response], index, now) for response, index, now in pairs], dtype=torch.float64
            )
            shifted.append(dataclasses.replace(row, old_logprob=old))
        prepared.append((shifted, plan.length))
    return prepared, updates


def run(settings: UpdateSettings, traces: list[Trace]) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
    """Metrics, gradients and number of rows of the only update."""
    ((rows, length),), _ = rows_of(traces, settings)
    metrics = accumulate_gradients(state(), rows, policy_forward(vocabulary(), settings), length)
    return metrics, {name: parameter.main_grad.clone() for name, parameter in state().named_parameters()}, len(rows)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_of_the_head_do_not_change_an_update(chunk: int, entropy_coef: float) -> None:
    found = [
        run(dataclasses.replace(SETTINGS, entropy_coef=entropy_coef, loss_chunk_size=size), responses())
        for size in (0, chunk)
    ]
    (table, by_table, _), (chunked, by_chunks, _) = found
    assert table["entropy"] > 1 and ("entropy_loss" in table) == bool(entropy_coef)
    assert chunked == pytest.approx(table, rel=1e-10, abs=1e-12)
    assert furthest(by_chunks, by_table) < 1e-10


def in_two_versions(traces: list[Trace]) -> list[Trace]:
    """The same, begun by weights of version 1 and ended by version 2: of one response all, of another nothing."""
    ages = [0, 3, 2, 5, 100, 1, 4, 6, 3, 2, 1, 2]
    versions = [np.where(np.arange(len(trace.response_ids)) < age, 1, 2) for trace, age in zip(traces, ages)]
    return [dataclasses.replace(trace, weight_versions=own) for trace, own in zip(traces, versions)]


@pytest.mark.parametrize("aggregation", ["constant", "response", "token"])
@pytest.mark.parametrize("shrinkage", [1, 2])
@pytest.mark.parametrize("oldest", [0, 2])
def test_is_the_objective_over_single_denoising_states(aggregation: str, shrinkage: int, oldest: int) -> None:
    """Of the tokens that are young enough; the others stand in the same states."""
    traces = in_two_versions(responses())
    settings = dataclasses.replace(
        SETTINGS, aggregation=aggregation, states=replay(Grid(4), shrinkage), oldest_version=oldest
    )
    metrics, grads, _ = run(settings, traces)
    young = [int((trace.weight_versions >= oldest).sum()) for trace in traces]
    model, loss, tokens, clipped = make_model(torch.float64), 0, sum(young), 0
    assert tokens < sum(len(trace.response_ids) for trace in traces) or oldest == 0
    largest = 0.0
    for trace, length in zip(traces, young):
        advantage = advantages(traces)[trace.prompt_key, trace.sample]
        weight = {
            "constant": 1 / (len(traces) * 12), "response": 1 / (len(traces) * max(length, 1)), "token": 1 / tokens
        }[aggregation]  # fmt: skip
        for seen in states(trace, Grid(4), shrinkage):
            blocks = torch.tensor(seen.block_of)
            logits = explicit_logits(
                model,
                torch.tensor(seen.shown),
                torch.arange(len(seen.shown)),
                blocks[None, :] <= blocks[:, None],
                torch.tensor(seen.decided),
            )
            for n, position in enumerate(seen.decided):
                if trace.weight_versions[position - len(trace.prompt_ids)] < oldest:
                    continue
                logprob = allowed_logprobs(logits, 0.8)[n, trace.tokens[position]]
                old = old_logprob(trace, position - len(trace.prompt_ids), logprob.item())
                ratio = torch.exp(logprob - old)
                largest = max(largest, ratio.item())
                clipped += bool(torch.min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage) < ratio * advantage)
                surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
                loss = loss + weight * (-surrogate + 0.1 * (torch.exp(old - logprob) - 1 - (old - logprob)))
    assert metrics["targets"] == tokens
    assert metrics["pg_clipfrac"] == clipped > 3
    assert metrics["ratio_max"] == pytest.approx(largest, rel=1e-10)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-10)
    assert furthest(grads, gradients(model, loss)) < 1e-10


@pytest.mark.parametrize("budget", [36, 50, 77, 130])
@pytest.mark.parametrize("aggregation", ["constant", "response", "token"])
def test_rows_do_not_change_an_update(budget: int, aggregation: str) -> None:
    """Row budget, number of microbatches, order of the responses."""
    settings = dataclasses.replace(SETTINGS, aggregation=aggregation)
    metrics, grads, count = run(settings, responses())
    assert count == 1
    other_metrics, other, rows = run(dataclasses.replace(settings, max_tokens_per_row=budget), responses()[::-1])
    assert rows > 1
    assert furthest(other, grads) < 1e-10
    for name in metrics:
        assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-10, abs=1e-12), name


def test_advantages_of_responses_are_not_mixed_up() -> None:
    """All advantage on one response: only its tokens have a gradient of the surrogate."""
    traces = responses()
    settings = dataclasses.replace(SETTINGS, objective=PolicyObjective(0.2, 0.2, 0.0))
    ((rows, _),), ((records, _),) = rows_of(traces, settings)
    expected = advantages(traces)
    for row in rows:
        for response, advantage in zip(row.row.targets.response.tolist(), row.advantage.tolist()):
            assert advantage == expected[records[response].group, records[response].sample]


@pytest.mark.parametrize("updates", [1, 3, 5])
def test_every_response_is_in_one_update(updates: int) -> None:
    traces = responses()
    settings = dataclasses.replace(SETTINGS, num_updates=updates, max_tokens_per_row=64)
    prepared, planned = rows_of(traces, settings)
    assert len(prepared) == updates
    found = [(record.group, record.sample) for records, _ in planned for record in records]
    assert sorted(found) == sorted(advantages(traces))
    for (rows, _), (records, _) in zip(prepared, planned):
        counted = sum(len(row.row.targets.slot) for row in rows)
        assert counted == sum(record.num_targets for record in records)


def test_rollout_log_probabilities_are_taken_as_they_are() -> None:
    traces, groups = responses(), one_process()
    settings = dataclasses.replace(SETTINGS, old_logprobs="rollout", max_tokens_per_row=64)
    updates = plan_updates(graded(traces, settings), settings, groups, stream=11)
    ((records, plan),) = updates
    (mine,) = fetch(updates, traces, groups)
    rows = with_old_logprobs(
        state(),
        build_rows(records, plan, mine, advantages(traces), settings, 0, MASK_ID, PAD_ID),
        plan.length,
        vocabulary(),
        settings,
    )
    for row in rows:
        wanted = [
            mine[response].logprobs[index]
            for response, index in zip(row.row.targets.response.tolist(), row.row.targets.index.tolist())
        ]
        assert row.old_logprob.tolist() == wanted
