"""Two thousand requests of all kinds through a cache that is far too small, with aborts and lost caches on the way."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.options import EngineOptions
from megatron_dlm.rollout.request import Request, rollout_stream
from tests.rollout.test_engine import by_key, same
from tests.tiny import make_model, vocabulary

COUNT, LONGEST = 2000, 64
POLICIES = ("static", "dynamic", "sequential", "entropy_bounded")


def requests(rng: np.random.Generator) -> list[Request]:
    """Groups of 1 to 6 responses; every setting of a group is drawn anew."""
    wanted: list[Request] = []
    while len(wanted) < COUNT:
        key, prompt = f"p{len(wanted)}", rng.integers(0, 50, rng.integers(1, 30))
        block = int(rng.choice([1, 2, 3, 4, 8, 16, 32]))
        room = (LONGEST // block) * block - len(prompt)
        sampling = SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_k=int(rng.choice([0, 0, 5])),
            top_p=float(rng.choice([1.0, 0.8])),
            max_new_tokens=int(rng.integers(1, min(room, 25) + 1)),
            block_size=block,
            denoising_steps=int(rng.integers(1, block + 1)),
            remasking=str(rng.choice(POLICIES)),
            threshold=float(rng.choice([0.1, 0.3, 0.9])),
            stop_token_ids=tuple(rng.integers(0, 50, 3).tolist()),
            ignore_eos=bool(rng.random() < 0.2),
        )
        for sample in range(rng.integers(1, 7)):
            wanted.append(Request(prompt, sampling, key, sample, rollout_stream(5, 0, key, sample)))
    return wanted[:COUNT]


def key_of(one) -> tuple[str, int]:
    return one.prompt_key, one.sample


def test_soak() -> None:
    rng = np.random.default_rng(11)
    model = make_model(torch.float64, num_layers=1)
    wanted = requests(rng)
    calm = EngineOptions(256, LONGEST, page_size=16, share_prompts=False)
    reference = by_key(Engine(model, vocabulary(), calm).run(wanted))

    # One text may need 13 pages and a copy; thirty sequences share 28.
    engine = Engine(
        model,
        vocabulary(),
        EngineOptions(30, LONGEST, 80, page_size=5, rounds_per_sync=3, kv_cache_bytes=28 * 5 * 2 * 2 * 8 * 8),
    )
    order = rng.permutation(COUNT) // 100 + np.arange(COUNT)  # groups stay more or less together
    todo = [wanted[index] for index in np.argsort(order, kind="stable")]
    finished, by = [], {key_of(request): request for request in wanted}
    aborts = again = 0
    while todo or not engine.idle:
        if todo and len(engine.scheduler.waiting) < 40:
            burst = int(rng.integers(1, 60))
            engine.submit(todo[:burst])
            del todo[:burst]
        finished += engine.step()
        event = rng.random()
        if event < 0.02:
            running = [key_of(one.request) for one in engine.scheduler.running.values()]
            waiting = [key_of(request) for request in engine.scheduler.waiting]
            chosen = [key for key in running + waiting if rng.random() < 0.2]
            begun = {key_of(trace): trace for trace in engine.abort(chosen)}
            for key in chosen:
                # Some go on where they were, others begin anew; most of these sooner, some later.
                partial = begun.get(key) if rng.random() < 0.7 else None
                request = dataclasses.replace(by[key], partial=partial)
                todo.insert(int(rng.integers(0, len(todo) + 1)), request)
                again += partial is not None and len(partial.response_ids) > 0
            aborts += len(chosen)
        elif event < 0.025:
            engine.sleep()
        elif event < 0.03:
            engine.drop_cache()
        pool = engine.scheduler.pool
        assert pool.num_free + sum(count > 0 for count in pool.references) == pool.num_pages

    assert len(finished) == COUNT
    for key, trace in by_key(finished).items():
        trace.num_forwards = reference[key].num_forwards  # dropped blocks were forwards too
        same(trace, reference[key])
    assert engine.stats.preemptions > 50 and engine.stats.shared_tokens > 1000 and aborts > 100 and again > 20
    engine.drop_cache()
    pool = engine.scheduler.pool
    assert pool.num_free == pool.num_pages and not any(pool.references) and not len(engine.scheduler.prefixes)
