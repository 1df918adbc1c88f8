"""A rollout over replicas with uneven work, against one process, in every layout. In float64, where batches do not
matter to the last token."""

from __future__ import annotations

import dataclasses

import pytest

from tests.harness import pool

EXPERTS = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16)
LAYOUTS = {
    "dp2": (2, {}, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2), {}),
    "ep2": (2, dict(expert_model_parallel_size=2), EXPERTS),
    "dp2 tp2": (4, dict(tensor_model_parallel_size=2), {}),
    "tp2 ep2": (4, dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True), EXPERTS),
}
GROUPS, SAMPLES = 11, 3


def group_of(ticket: int) -> list:
    """Three responses; those of every other ticket are long."""
    from tests.rollout.test_engine import SAMPLING, requests

    sampling = dataclasses.replace(SAMPLING, threshold=0.2, ignore_eos=True, max_new_tokens=11 if ticket % 2 else 2)
    return requests(GROUPS * SAMPLES, sampling, samples=SAMPLES)[ticket * SAMPLES : (ticket + 1) * SAMPLES]


def plain(traces) -> dict[tuple[str, int], tuple]:
    found = {
        (trace.prompt_key, trace.sample): (trace.response_ids.tolist(), trace.steps.tolist(), trace.finish_reason)
        for trace in traces
    }
    assert len(found) == len(traces)
    return found


def roll_in(parallel: dict, sizes: dict, enough: int | None, save_to=None) -> tuple:
    from megatron_dlm.checkpoint.distributed import save
    from megatron_dlm.rollout.replicas import roll
    from tests.rollout.test_engine_parallel import make_rig

    state, rig = make_rig(parallel, dict(sizes, fp64=True), {})
    if save_to is not None:
        save(state, save_to, 0, {}, with_optimizer=False)
    counted = []
    harvest = roll(rig, "test", GROUPS, SAMPLES, group_of, enough=enough, progress=counted.append)
    assert rig.engine.idle and not rig.engine.scheduler.running and not rig.engine.scheduler.waiting
    assert enough is not None or sum(counted) == len(harvest.finished)
    return rig.replica, harvest.taken, plain(harvest.finished), plain(harvest.aborted), harvest.places


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> dict:
    """Weights of both models, and what one process generates with them."""
    found = {}
    for name, sizes in {"dense": {}, "experts": EXPERTS}.items():
        folder = tmp_path_factory.mktemp(name)
        ((_, taken, expected, aborted, _),) = pool(1).run(
            roll_in, {}, dict(sizes, folder=folder / "start"), None, folder / "start"
        )
        assert taken == list(range(GROUPS)) and not aborted and len(expected) == GROUPS * SAMPLES
        found[name] = folder / "start", expected
    return found


def by_replica(layout: str, start: dict, enough: int | None) -> tuple[dict[int, tuple], dict]:
    """What each replica got, on whose ranks it is the same; and what one process generates."""
    world, parallel, sizes = LAYOUTS[layout]
    folder, expected = start["experts" if sizes else "dense"]
    found: dict[int, tuple] = {}
    for replica, *rest in pool(world).run(roll_in, parallel, dict(sizes, folder=folder), enough):
        assert found.setdefault(replica, rest) == rest  # tensor-parallel ranks agree
    assert len(found) == world // parallel.get("tensor_model_parallel_size", 1)
    return found, expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_group_is_generated_once_and_as_on_one_process(start, layout: str) -> None:
    found, expected = by_replica(layout, start, None)
    together: dict = {}
    for _, finished, aborted, _ in found.values():
        assert not aborted and together.keys().isdisjoint(finished)
        together |= finished
    assert together == expected
    assert sorted(ticket for taken, *_ in found.values() for ticket in taken) == list(range(GROUPS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rollout_ends_when_enough_groups_are_complete(start, layout: str) -> None:
    enough, (found, expected) = 3, by_replica(layout, start, 3)
    places: dict[str, int] = {}
    for taken, finished, aborted, mine in found.values():
        assert places.keys().isdisjoint(mine) and finished.keys().isdisjoint(aborted)
        places |= mine
        for key, (tokens, steps, reason) in aborted.items():
            whole = expected[key]
            assert reason == "abort" and tokens == whole[0][: len(tokens)] and steps == whole[1][: len(steps)]
        assert all(whole == expected[key] for key, whole in finished.items())
        count = {key: sum(other == key for other, _ in finished) for key, _ in finished}
        assert {key for key, responses in count.items() if responses == SAMPLES} == mine.keys()
        assert {key for key, _ in [*finished, *aborted]} <= {f"p{ticket}" for ticket in taken}
    assert sorted(places.values()) == list(range(len(places))) and enough <= len(places) <= GROUPS


def test_one_process_stops_at_once_and_alike(start) -> None:
    folder, _ = start["dense"]
    results = [pool(1).run(roll_in, {}, dict(folder=folder), 3)[0] for _ in range(2)]
    assert results[0] == results[1]
    _, taken, _, aborted, places = results[0]
    assert len(places) == 3 and len(taken) < GROUPS and aborted


def test_nothing_is_generated_where_there_is_enough_already(start) -> None:
    folder, _ = start["dense"]
    assert pool(1).run(roll_in, {}, dict(folder=folder), 0) == [(0, [], {}, {}, {})]
