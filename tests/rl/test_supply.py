"""Steps that do not wait for their last responses: what is learned, what is kept, and what is owed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.rl.methods import replay
from megatron_dlm.rollout.replicas import Job, requests_for, roll
from tests.harness import pool
from tests.rl.test_trainer import RL, ROLLOUT, Always, EvenFirst, make_trainer, prompts
from tests.rollout.test_engine import same
from tests.tiny import disturb, make_session, quiet

SEED = 5
OVER = dataclasses.replace(
    ROLLOUT,
    rollout_batch_size=3,
    over_sampling_batch_size=6,
    partial_rollout=True,
    n_samples_per_prompt=4,
    rollout_max_response_len=17,
    stop_token_ids=list(range(46, 50)),
    max_running_requests=9,
)
DROPPING = dataclasses.replace(OVER, partial_rollout=False)


def open_supply(config=OVER, given=None):
    """A float64 model's engine and a supply of prompts for it."""
    from megatron_dlm.rl.supply import Supply
    from megatron_dlm.rollout.rig import RolloutRig

    session = make_session(fp64=True)
    state = session.train_state(None, 1)
    disturb(state.module, 0)
    rig = RolloutRig.open(session, state, config, 6, config.rollout_max_response_len)
    return rig, Supply(given or prompts(13), "tracerl", SEED, rig, config, rig.sampling(config), {})


def one_step(rig, supply, step: int) -> tuple[list[str], list]:
    """Keys of the new prompts of a step, and the traces that it learns from."""
    fresh, samples = supply.begin(step), supply.samples
    group = lambda ticket: requests_for([fresh[ticket]], samples, supply.sampling, Job(SEED, step))
    harvest = roll(rig, "test", len(fresh), samples, group, supply.going_on(SEED), supply.missing)
    return [prompt.key for prompt in fresh], supply.settle(harvest, fresh, step)


def groups_of(traces) -> Counter:
    return Counter(trace.prompt_key for trace in traces)


def undisturbed(rig, supply, begun: dict[str, int]) -> dict[tuple[str, int], object]:
    """All responses of groups that began in these steps, generated in one go."""
    requests = []
    for key, step in begun.items():
        requests += requests_for([supply.prompts[key]], supply.samples, supply.sampling, Job(SEED, step))
    return {(trace.prompt_key, trace.sample): trace for trace in rig.engine.run(requests)}


@pytest.mark.parametrize(
    "changes", [{}, {"longest_first": True}, {"max_running_requests": 64, "rollout_batch_size": 2}]
)
def test_what_goes_on_under_the_same_weights_ends_as_if_it_had_not_stopped(changes: dict) -> None:
    config = dataclasses.replace(OVER, **changes)
    rig, supply = open_supply(config)
    continued = 0
    began: dict[str, int] = {}
    for step in range(8):
        fresh, traces = one_step(rig, supply, step)
        began |= dict.fromkeys(fresh, step)
        assert groups_of(traces) == dict.fromkeys(groups_of(traces), 4)
        assert len(groups_of(traces)) == config.rollout_batch_size
        expected = undisturbed(rig, supply, {key: began[key] for key in groups_of(traces)})
        for trace in traces:
            whole = expected[trace.prompt_key, trace.sample]
            # Steps on a block that was cut off are forwards that an undisturbed response does not have.
            assert trace.num_forwards >= whole.num_forwards
            same(dataclasses.replace(trace, num_forwards=0), dataclasses.replace(whole, num_forwards=0))
        continued += sum((trace.prompt_key, trace.sample) in supply.continued for trace in traces)
    assert continued > 8


def test_steps_repeat() -> None:
    runs = []
    for _ in range(2):
        rig, supply = open_supply()
        steps = [one_step(rig, supply, step) for step in range(4)]
        runs.append(
            [(keys, [(t.prompt_key, t.sample, t.response_ids.tolist()) for t in traces]) for keys, traces in steps]
        )
        runs[-1].append([(group.key, group.step, sorted(group.traces)) for group in supply.kept])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("config", [OVER, DROPPING], ids=["keeping", "dropping"])
@pytest.mark.parametrize("count", [6, 13])
def test_no_prompt_is_lost_and_none_comes_twice(config, count: int) -> None:
    """Turns that the sampler gave were learned from, are at work, or owed; a step never works on a prompt twice."""
    rig, supply = open_supply(config, prompts(count))
    given: Counter = Counter()
    take = supply.sampler.take

    def counted(number: int):
        found = take(number)
        given.update(prompt.key for prompt in found)
        return found

    supply.sampler.take = counted
    learned: Counter = Counter()
    for step in range(12):
        before = [group.key for group in supply.kept]
        fresh, traces = one_step(rig, supply, step)
        at_work = [*before, *fresh]
        assert len(set(at_work)) == len(at_work) <= 6
        learned.update(set(groups_of(traces)))
        kept_now, owed = [group.key for group in supply.kept], supply.progress()["owed"]
        assert len(set(owed)) == len(owed)
        for key, times in given.items():
            turns = learned[key] + kept_now.count(key) + owed.count(key)
            # A prompt is owed one turn at most; with so few prompts one is offered while it is owed its last turn.
            assert turns == times if count == 13 else 1 <= turns <= times
        assert config.partial_rollout or not kept_now
    assert sum(learned.values()) == 12 * 3 and len(learned) == count


@pytest.mark.parametrize("config", [ROLLOUT, OVER, DROPPING], ids=["waiting", "keeping", "dropping"])
def test_the_rate_of_a_rollout_counts_what_was_generated_in_it(config) -> None:
    """Whether it is learned now, later or never; the engine is watched as it hands responses out."""
    trainer = make_trainer(rollout=config)
    engine, had, news = trainer.rig.engine, {}, []

    def watched(method):
        def call(*args):
            traces = method(*args)
            for trace in traces:
                key = (trace.prompt_key, trace.sample)
                news.append(len(trace.response_ids) - had.pop(key, 0))
                if trace.finish_reason == "abort" and config.partial_rollout:
                    had[key] = len(trace.response_ids)
            return traces

        return call

    engine.step, engine.abort = watched(engine.step), watched(engine.abort)
    counted, learned = 0.0, 0.0
    for _ in range(4):
        news.clear()
        metrics = trainer.step(quiet())
        assert metrics["perf/rollout_tokens_per_sec"] * metrics["perf/rollout_time"] == pytest.approx(sum(news))
        counted, learned = counted + sum(news), learned + metrics["rollout/tokens"]
    waiting = sum(len(trace.response_ids) for group in trainer.supply.kept for trace in group.traces.values())
    if config is DROPPING:
        assert counted > learned and not waiting
    else:
        assert counted == learned + waiting and (waiting > 0) == (config is OVER)


def test_prompts_that_were_dropped_begin_the_next_step() -> None:
    rig, supply = open_supply(DROPPING)
    first, traces = one_step(rig, supply, 0)
    dropped = [key for key in first if key not in groups_of(traces)]
    second, _ = one_step(rig, supply, 1)
    assert len(dropped) == 3 and second[:3] == dropped


def test_those_that_finish_too_late_are_learned_from_next() -> None:
    """All are complete after the same pass: the prompts are shorter than a block, and so are the responses."""
    config = dataclasses.replace(OVER, rollout_max_response_len=1, denoising_steps=1, max_running_requests=64)
    rig, supply = open_supply(config, [prompt for prompt in prompts(40) if len(prompt.token_ids) < 4])
    first, traces = one_step(rig, supply, 0)
    learned = list(groups_of(traces))
    assert learned == first[:3] and [group.key for group in supply.kept] == first[3:]
    version = rig.engine.weight_version
    rig.engine.weight_version += 1
    second, traces = one_step(rig, supply, 1)
    assert second == [] and list(groups_of(traces)) == first[3:]  # nothing was missing, so nothing was begun
    assert {int(value) for trace in traces for value in trace.weight_versions} == {version}
    third, _ = one_step(rig, supply, 2)
    assert len(third) == 6


def test_after_an_update_each_token_has_the_version_of_the_weights_that_decided_it() -> None:
    rig, supply = open_supply()
    began: dict[str, int] = {}
    before: dict[int, dict] = {}
    mixed = 0
    for step in range(5):
        going_on = {group.key: began[group.key] for group in supply.kept}
        fresh, traces = one_step(rig, supply, step)
        began |= dict.fromkeys(fresh, step)
        version = rig.engine.weight_version
        assert version == step + 1
        for trace in traces:
            versions = trace.weight_versions
            assert len(versions) == len(trace.response_ids) and np.all(np.diff(versions) >= 0)
            assert began[trace.prompt_key] + 1 <= versions.min() and versions.max() <= version
            if trace.prompt_key not in going_on:
                assert set(versions.tolist()) == {version}
            first = int((versions == began[trace.prompt_key] + 1).sum())
            if 0 < first < len(versions):  # what the first weights decided is what they would have decided in one go
                whole = before[began[trace.prompt_key]][trace.prompt_key, trace.sample]
                assert trace.response_ids[:first].tolist() == whole.response_ids[:first].tolist()
                np.testing.assert_allclose(trace.logprobs[:first], whole.logprobs[:first], rtol=0, atol=1e-12)
                mixed += 1
            # The trace is learned as a whole, or without what older weights decided.
            assert replay(Grid(4)).item(trace, 0).views.num_targets == len(versions)
            assert replay(Grid(4)).item(trace, 0, version).views.num_targets == int((versions == version).sum())
        before[step] = undisturbed(rig, supply, dict.fromkeys(fresh, step))
        disturb(rig.state.module, step + 1)
        rig.refit()
    assert mixed > 4


def test_rl_steps_say_how_old_their_tokens_are() -> None:
    trainer = make_trainer(rollout=OVER)
    found = [trainer.step(quiet()) for _ in range(5)]
    assert found[0]["rollout/partial_ratio"] == found[0]["rollout/stale_token_ratio"] == 0
    assert found[0]["rollout/aborted"] > 0
    assert max(metrics["rollout/partial_ratio"] for metrics in found) > 0.1
    for metrics in found:
        assert all(np.isfinite(value) for value in metrics.values())
        assert 0 <= metrics["rollout/stale_token_ratio"] <= metrics["rollout/partial_ratio"] + 1
        assert metrics["rollout/version_lag_mean"] <= metrics["rollout/version_lag_max"]
    stale = [metrics for metrics in found if metrics["rollout/stale_token_ratio"] > 0]
    assert stale and all(metrics["rollout/version_lag_max"] >= 1 for metrics in stale)
    plain = make_trainer().step(quiet())
    assert not any(name in plain for name in found[0] if name.endswith(("aborted", "partial_ratio", "lag_mean")))


def test_nothing_is_learned_of_masked_tokens() -> None:
    targets = []
    for mask in (False, True):
        trainer = make_trainer(rollout=dataclasses.replace(OVER, mask_offpolicy_in_partial_rollout=mask))
        counted = []
        grade = trainer.collector.grade

        def spy(step, traces, grade=grade, trainer=trainer, counted=counted):
            rollout = grade(step, traces)
            fresh = sum((trace.weight_versions == trainer.rig.engine.weight_version).sum() for trace in traces)
            counted.append((sum(record.num_targets for record in rollout.graded), fresh, rollout.graded))
            return rollout

        trainer.collector.grade = spy
        for _ in range(5):
            trainer.step(quiet())
        targets.append(counted)
    assert all(learned == sum(record.length for record in graded) for learned, _, graded in targets[0])
    assert all(learned == fresh for learned, fresh, _ in targets[1])
    assert any(learned < sum(record.length for record in graded) for learned, _, graded in targets[1])


def test_a_step_of_old_tokens_alone_is_an_empty_one() -> None:
    """Masked from end to end: all groups of the second step were complete in the first."""
    late = dataclasses.replace(
        OVER,
        rollout_max_response_len=1,
        denoising_steps=1,
        max_running_requests=64,
        mask_offpolicy_in_partial_rollout=True,
    )
    trainer = make_trainer(rollout=late, rl=dataclasses.replace(RL, min_group_accuracy=0.0, max_group_accuracy=1.0))
    trainer.step(quiet())
    trainer.rig.refit()
    metrics = trainer.step(quiet())
    assert metrics["rollout/stale_token_ratio"] == 1 and metrics["rollout/learned_ratio"] == 0
    assert not any(name.startswith("train/") for name in metrics)


# ---- several processes

LAYOUTS = {
    "dp2": (2, dict(), {}),
    "ep2": (
        2,
        dict(expert_model_parallel_size=2),
        dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16),
    ),
    "dp2 tp2": (4, dict(tensor_model_parallel_size=2), {}),
}


def steps_in(parallel: dict, sizes: dict, count: int, load_from: Path | None, save_to: Path | None) -> list[tuple]:
    """Of each step: its metrics, its groups, what this replica keeps, and what is owed."""
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.training.setup import Session
    from tests.rl.test_kept import resume, save
    from tests.tiny import Words, model_config, vocabulary

    settings = ParallelConfig(**parallel)
    groups = initialize(settings, seed=1)
    session = Session(model_config(init_method_std=0.3, **sizes), settings, Words(), groups, vocabulary())

    def make(progress: dict):
        state = session.train_state(OptimizerConfig(lr=1e-3), 100)
        rig = RolloutRig.open(session, state, OVER, 6, OVER.rollout_max_response_len)
        scorer = EvenFirst() if load_from is None else Always(False)
        return TraceRLTrainer(session, state, rig, scorer, prompts(13), RL, OVER, SEED, progress)

    trainer = make({}) if load_from is None else resume(load_from, make)[0]
    seen = []
    grade = trainer.collector.grade

    def spy(step, traces):
        seen.append(grade(step, traces))
        return seen[-1]

    trainer.collector.grade = spy
    kept_now = lambda: [(group.key, sorted(group.traces)) for group in trainer.supply.kept]
    found = [(None, None, kept_now(), trainer.supply.progress()["owed"])]
    for _ in range(count):
        metrics = trainer.step(quiet())
        learned = [(record.group, record.sample) for record in seen[-1].graded]
        found.append((metrics, learned, kept_now(), trainer.supply.progress()["owed"]))
    if save_to is not None:
        save(trainer, save_to)
    return [(trainer.rig.replica, *step) for step in found]


def check(results: list[list[tuple]]) -> list[set[str]]:
    """All ranks agree; returns the groups of each step that are at work after it."""
    at_work = []
    for number, ranks in enumerate(zip(*results, strict=True)):
        replicas: dict[int, list] = {}
        for replica, metrics, learned, in_work, owed in ranks:
            assert (learned, owed) == (ranks[0][2], ranks[0][4])
            assert replicas.setdefault(replica, in_work) == in_work
            if number:
                rollout = {name: value for name, value in metrics.items() if name.startswith(("rollout/", "train/"))}
                assert rollout == {name: ranks[0][1][name] for name in rollout}
        keys = [key for in_work in replicas.values() for key, _ in in_work]
        assert len(set(keys)) == len(keys) <= 6
        at_work.append(set(keys))
    return at_work


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_learn_from_whole_groups_and_keep_the_rest(layout: str, tmp_path) -> None:
    world, parallel, sizes = LAYOUTS[layout]
    saves = tmp_path if layout == "dp2 tp2" else None
    results = pool(world).run(steps_in, parallel, sizes, 4, None, saves)
    at_work, partial = check(results), 0.0
    for number, (_, metrics, learned, _, _) in list(enumerate(results[0]))[1:]:
        groups = Counter(key for key, _ in learned)
        assert len(groups) == 3 and set(groups.values()) == {4} and len(set(learned)) == 12
        assert at_work[number].isdisjoint(groups)
        partial += metrics["rollout/partial_ratio"]
    assert partial > 0
    if saves is None:
        return
    others = pool(2).run(steps_in, {}, sizes, 1, saves, None)  # on two processes that are a replica each
    assert check(others)[0] == at_work[-1] and others[0][0][4] == results[0][-1][4]
    gone_on = {key for key, _ in others[0][1][2]} & at_work[-1]
    assert gone_on and others[0][1][1]["rollout/partial_ratio"] > 0
