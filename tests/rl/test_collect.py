"""Rounds of a step: they go on until its batch is full, and every rank and every resumed run makes the same ones."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.rewards.base import Verdict
from tests.harness import pool
from tests.rl.test_trainer import RL, ROLLOUT, Always, comparable, prompts
from tests.tiny import disturb, make_session, quiet

BATCH, SAMPLES = 3, 4
SMALL = dataclasses.replace(ROLLOUT, rollout_batch_size=BATCH, n_samples_per_prompt=SAMPLES, rollout_max_response_len=5)
TO_THE_END = dataclasses.replace(RL, overlong_margin=-1)  # no response is too long
FILLING = CurriculumConfig(dynamic_sampling=True)
BY_DIFFICULTY = CurriculumConfig(prompt_sampling="difficulty", difficulty_floor=0.1, dynamic_sampling=True)


def kind(key: str) -> str:
    """Of ten prompts four are mixed."""
    return "right" if int(key[1:]) % 10 < 3 else "wrong" if int(key[1:]) % 10 < 6 else "mixed"


class ByPrompt:
    """Some prompts are always answered right, some never, the others every other time."""

    def score(self, items):
        turns, verdicts = Counter(), []
        for prompt, _ in items:
            turns[prompt.key] += 1
            right = {"right": 1, "wrong": 0, "mixed": turns[prompt.key] % 2}[kind(prompt.key)]
            verdicts.append(Verdict(float(right), ""))
        return verdicts


def make(
    curriculum=FILLING, scorer=None, count=30, progress=None, rl=TO_THE_END, rollout=SMALL, given=None, session=None
):
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig

    session = session or make_session()
    state = session.train_state(OptimizerConfig(lr=1e-3), 100)
    disturb(state.module, 0)
    rig = RolloutRig.open(session, state, rollout, 6, rollout.rollout_max_response_len)
    return TraceRLTrainer(
        session, state, rig, scorer or ByPrompt(), given or prompts(count), rl, rollout, seed=5, progress=progress,
        curriculum=curriculum,
    )  # fmt: skip


def collect(trainer, step: int):
    """(rollout, metrics, keys in the order in which they were asked) of a step without learning."""
    rollout, _, metrics = trainer.collector.collect(step, quiet(), nullcontext, nullcontext)
    return rollout, metrics, [prompt.key for prompt in trainer.supply.asked]


def test_without_dynamic_sampling_a_step_has_one_round() -> None:
    rollout, metrics, asked = collect(make(CurriculumConfig()), 0)
    assert len(asked) == BATCH and not rollout.surplus and rollout.candidates == rollout.graded
    kinds = Counter(kind(key) for key in asked)
    assert metrics == {
        "rollout/usable_ratio": kinds["mixed"] / BATCH,
        "rollout/dropped_too_easy": kinds["right"],
        "rollout/dropped_too_hard": kinds["wrong"],
    }


def test_a_step_goes_on_until_its_batch_is_full() -> None:
    trainer, rounds = make(), []
    for step in range(8):
        rollout, metrics, asked = collect(trainer, step)
        kinds = Counter(kind(key) for key in asked)
        mixed = [key for key in asked if kind(key) == "mixed"]
        assert len(set(asked)) == len(asked) and kinds["mixed"] >= BATCH
        learned = {record.group for record in rollout.candidates if kind(record.group) == "mixed"}
        assert learned == set(mixed[:BATCH]) and rollout.surplus == set(mixed[BATCH:])
        assert metrics["rollout/usable_ratio"] == kinds["mixed"] / len(asked)
        assert metrics["rollout/dropped_too_easy"] == kinds["right"]
        assert metrics["rollout/dropped_too_hard"] == kinds["wrong"]
        rounds.append(metrics["rollout/sampling_rounds"])
        # Every record points to its trace, whatever round it is of.
        assert len(rollout.graded) == len(rollout.traces) == SAMPLES * len(asked)
        for record in rollout.graded:
            trace = rollout.traces[record.index]
            assert (record.group, record.sample) == (trace.prompt_key, trace.sample)
        assert [(r.group, r.sample) for r in rollout.graded] == sorted((r.group, r.sample) for r in rollout.graded)
    assert max(rounds) > 2 and len(set(rounds)) > 1


def test_what_was_usable_and_not_needed_begins_the_next_step() -> None:
    trainer, owed, happened = make(rollout=dataclasses.replace(SMALL, rollout_batch_size=4)), [], 0
    for step in range(10):
        rollout, _, asked = collect(trainer, step)
        assert asked[: len(owed)] == owed[: len(asked)]
        owed = trainer.supply.progress()["owed"]  # with turns that an epoch offered while they were at work
        assert [key for key in owed if key in rollout.surplus] == [key for key in asked if key in rollout.surplus]
        happened += bool(rollout.surplus)
    assert happened > 1


def test_later_rounds_ask_for_as_many_as_the_usable_share_lets_expect() -> None:
    trainer, asked = make(rollout=dataclasses.replace(SMALL, rollout_batch_size=10)), []
    more = trainer.supply.more
    trainer.supply.more = lambda count, step: asked.append(count) or more(count, step)
    _, _, keys = collect(trainer, 0)
    had = 10
    for count in asked:
        usable = sum(kind(key) == "mixed" for key in keys[:had])
        assert count == max(0, min(10, -(-(10 - usable) * had // usable)) if usable else 10)
        had += count
    assert len(asked) > 1 and had == len(keys)


@pytest.mark.parametrize(("count", "limit", "asked"), [(30, 4, 4 * BATCH), (7, 8, 7), (3, 8, 3)])
def test_a_step_ends_with_its_rounds_or_with_the_prompts(count: int, limit: int, asked: int) -> None:
    config = CurriculumConfig(dynamic_sampling=True, max_sampling_rounds=limit)
    trainer = make(config, Always(False), count)
    for step in range(3):
        rollout, metrics, keys = collect(trainer, step)
        assert len(set(keys)) == len(keys) == asked and not rollout.surplus
        assert metrics["rollout/sampling_rounds"] == -(-asked // BATCH) and metrics["rollout/usable_ratio"] == 0
        assert metrics["rollout/dropped_too_hard"] == asked


def test_the_phases_of_every_round_are_told_apart() -> None:
    trainer, phases = make(), []

    @contextmanager
    def told(name: str):
        phases.append(name)
        yield

    _, _, metrics = trainer.collector.collect(0, quiet(), lambda: told("generate"), lambda: told("judge"))
    assert phases == ["generate", "judge"] * int(metrics["rollout/sampling_rounds"]) and len(phases) > 2


def test_the_trainer_learns_from_a_full_batch() -> None:
    trainer = make(rollout=dataclasses.replace(SMALL, rollout_batch_size=4))
    for _ in range(3):
        metrics = trainer.step(quiet())
        asked = len(trainer.supply.asked)
        assert metrics["rollout/learned_ratio"] == 4 / asked and metrics["train/updates"] == 2


def test_all_rounds_are_dumped(tmp_path) -> None:
    trainer = make(rl=dataclasses.replace(TO_THE_END, save_debug_rollout_data=str(tmp_path)))
    rollout, metrics, _ = collect(trainer, 0)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == metrics["rollout/sampling_rounds"] and files[0] == "step_000000_rank_0000.jsonl"
    assert sum(len(path.read_text().splitlines()) for path in tmp_path.iterdir()) == len(rollout.graded)


def mixed_prompts() -> list:
    return [dataclasses.replace(prompt, source="even" if n % 2 == 0 else "odd") for n, prompt in enumerate(prompts(40))]


CURRICULA = {
    "epochs": FILLING,
    "difficulty": BY_DIFFICULTY,
    "mixture": CurriculumConfig(prompt_weights=[3.0, 1.0], dynamic_sampling=True),
    "mixture by difficulty": dataclasses.replace(BY_DIFFICULTY, prompt_weights=[3.0, 1.0]),
}


@pytest.mark.parametrize("name", CURRICULA)
def test_a_resumed_run_takes_the_same_prompts(name: str, tmp_path) -> None:
    whole = make(CURRICULA[name], given=mixed_prompts())
    for step in range(4):
        collect(whole, step)
    saved, write = json.loads(json.dumps(whole.supply.progress())), whole.supply.files()
    resumed = make(CURRICULA[name], given=mixed_prompts()[20:] + mixed_prompts()[:20], progress=saved)
    resumed.rig.engine.weight_version = whole.rig.engine.weight_version
    assert (write is not None) == ("difficulty" in name) == (saved.get("pass_rates", 0) > 0)
    if write is not None:
        write(tmp_path)
        resumed.supply.rates.restore(tmp_path)
    for step in range(4, 8):
        one, other = collect(whole, step), collect(resumed, step)
        assert one[1:] == other[1:]
        assert [dataclasses.replace(r, index=0) for r in one[0].graded] == [
            dataclasses.replace(r, index=0) for r in other[0].graded
        ]


def test_a_mixture_keeps_its_proportions_over_steps() -> None:
    trainer = make(CurriculumConfig(prompt_weights=[3.0, 1.0]), given=mixed_prompts())
    source, had = {prompt.key: prompt.source for prompt in mixed_prompts()}, Counter()
    for step in range(24):
        _, _, asked = collect(trainer, step)
        had.update(source[key] for key in asked)
        owed = Counter(source[key] for key in trainer.supply.progress()["owed"])
        drawn = {name: had[name] + owed[name] for name in ("even", "odd")}
        assert abs(drawn["odd"] - sum(drawn.values()) / 4) <= 1.5


def test_rates_are_those_of_all_groups_that_were_judged() -> None:
    trainer = make(BY_DIFFICULTY)
    visits: Counter = Counter()
    for step in range(6):
        _, metrics, asked = collect(trainer, step)
        visits.update(asked)
    rates = trainer.supply.rates
    expected = {"right": 1.0, "wrong": 0.0, "mixed": 0.5}
    for key, times in visits.items():
        row = rates.rows([key])[0]
        assert rates.visits[row] == times and rates.rates[row] == expected[kind(key)]
    assert metrics["curriculum/seen_ratio"] == len(visits) / 30
    found = Counter(kind(key) for key in visits)
    assert metrics["curriculum/solved_ratio"] == found["right"] / len(visits)
    assert metrics["curriculum/unsolved_ratio"] == found["wrong"] / len(visits)


def test_what_is_mixed_is_asked_more_often_then() -> None:
    trainer = make(dataclasses.replace(BY_DIFFICULTY, dynamic_sampling=False))
    asked = [collect(trainer, step)[2] for step in range(40)]
    late = Counter(kind(key) for keys in asked[10:] for key in keys)
    assert {key for keys in asked for key in keys} == {prompt.key for prompt in prompts(30)}
    assert late["mixed"] > 0.75 * late.total()  # 12 x 1.1 of 12 x 1.1 + 18 x 0.1 are 88%


# ---- several processes


def steps_in(parallel: dict, name: str, count: int) -> list:
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session
    from tests.tiny import Words, model_config, vocabulary

    settings = ParallelConfig(**parallel)
    groups = initialize(settings, seed=1)
    session = Session(model_config(init_method_std=0.3), settings, Words(), groups, vocabulary())
    trainer, found = make(CURRICULA[name], given=mixed_prompts(), session=session), []
    for step in range(count):
        rollout, metrics, asked = collect(trainer, step)
        mine = [record for record in rollout.graded if record.owner == groups.rank]
        traces = [rollout.traces[record.index] for record in mine]
        assert [(t.prompt_key, t.sample) for t in traces] == [(r.group, r.sample) for r in mine]
        assert sorted(record.index for record in mine) == list(range(len(rollout.traces)))
        learned = sorted({record.group for record in rollout.candidates})
        found.append((asked, learned, sorted(rollout.surplus), metrics, trainer.supply.progress()))
    learned = trainer.step(quiet())  # and a step is learned from what was collected in several rounds
    metrics = {name: value for name, value in comparable(learned).items() if not name.startswith("memory/")}
    return [*found, metrics]


def test_two_replicas_make_the_rounds_of_one() -> None:
    name = "mixture by difficulty"
    one, other = pool(2).run(steps_in, {}, name, 6)
    assert one == other and one[-1]["rollout/learned_ratio"] > 0
    alone = make(CURRICULA[name], given=mixed_prompts())
    for step, (asked, _, surplus, metrics, progress) in enumerate(one[:-1]):
        rollout, expected, keys = collect(alone, step)
        assert (asked, surplus, metrics) == (keys, sorted(rollout.surplus), expected)
        assert progress == alone.supply.progress()
    assert max(len(asked) for asked, *_ in one[:-1]) > BATCH
