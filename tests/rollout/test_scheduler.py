"""What the scheduler plans, without a model."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.rollout.plan import Plan
from megatron_dlm.rollout.request import Request
from megatron_dlm.rollout.scheduler import Scheduler
from tests.diffusion.oracles import random_trace

BLOCK = 4


def request(prompt: int, new: int = 16, key: str = "p", sample: int = 0, fill: int | None = None) -> Request:
    """A prompt of one repeated token, so that other keys have other prompts."""
    tokens = np.full(prompt, sum(key.encode()) if fill is None else fill)
    return Request(tokens, SamplingParams(max_new_tokens=new, block_size=BLOCK), key, sample, 0)


def scheduler(slots: int = 8, pages: int = 100, page_size: int = 4, tokens: int = 1000, **flags) -> Scheduler:
    return Scheduler(slots, pages, page_size, tokens, **flags)


def spans(plan: Plan) -> list[tuple[int, int, bool]]:
    return [(span.first, span.end, span.denoise) for span in plan.spans]


def finish_block(one: Scheduler, slots: range | list[int]) -> None:
    for slot in slots:
        one.stepped(one.running[slot], block_done=True)


def test_a_prompt_rides_on_the_first_denoising_step_and_a_commit_on_the_next() -> None:
    one = scheduler()
    one.submit([request(10)])
    assert spans(one.plan()) == [(0, 12, True)]
    assert spans(one.plan()) == [(8, 12, True)]  # the block is not finished: the same again
    finish_block(one, [0])
    assert spans(one.plan()) == [(8, 16, True)]
    assert spans(one.plan()) == [(12, 16, True)]


def test_commits_that_are_not_fused_are_passes_of_their_own() -> None:
    one = scheduler(fuse_commit=False)
    one.submit([request(6)])
    assert [spans(one.plan()) for _ in range(2)] == [[(0, 4, False)], [(4, 8, True)]]
    finish_block(one, [0])
    plan = one.plan()
    assert spans(plan) == [(4, 8, False)] and plan.spans[0].commit
    assert spans(one.plan()) == [(8, 12, True)]


def test_a_group_computes_its_prompt_once_and_shares_its_pages() -> None:
    one = scheduler(page_size=8)
    one.submit([request(14, sample=sample) for sample in range(3)])
    assert spans(one.plan()) == [(0, 16, True)]  # the others wait for it
    plan = one.plan()
    assert sorted(spans(plan)) == [(12, 16, True)] * 3
    first, *others = one.running.values()
    assert all(other.pages[0] == first.pages[0] for other in others)  # 8 of 12 tokens: a full page, held together
    assert len({one.pages[1] for one in (first, *others)}) == 3  # the page filled in part is copied
    assert plan.copies == [(first.pages[1], other.pages[1]) for other in others]
    assert one.num_shared_tokens == 24


def test_other_prompts_and_other_blocks_share_nothing() -> None:
    one = scheduler()
    one.submit([request(8, key="a"), request(8, key="b")])
    assert spans(one.plan()) == [(0, 12, True)] * 2
    assert not set(one.running[0].pages) & set(one.running[1].pages)


def test_prompts_take_what_decoding_leaves_in_chunks_of_blocks() -> None:
    one = scheduler(tokens=24)
    one.submit([request(3, key=f"d{n}") for n in range(3)])
    one.plan()
    one.submit([request(50, key="long")])
    seen = [spans(one.plan()) for _ in range(6)]
    assert all(len(found) == 4 for found in seen)  # nobody who decodes has to wait
    assert [found[-1][:2] for found in seen[:5]] == [(0, 12), (12, 24), (24, 36), (36, 48), (48, 52)]
    assert all(sum(end - first for first, end, _ in found) <= 24 for found in seen)


def test_a_prompt_comes_forward_even_where_decoding_leaves_nothing() -> None:
    one = scheduler(slots=9, tokens=32)
    one.submit([request(3, key=f"d{n}") for n in range(8)])
    one.plan()
    one.submit([request(50, key="long")])
    ends = []
    for _ in range(30):
        ends += [span.end for span in one.plan().spans if span.slot == 8]
    assert ends[0] >= 4 and max(ends) == 52


def test_the_first_of_a_pass_always_fits_and_they_take_turns() -> None:
    one = scheduler(tokens=1)
    one.submit([request(3, key=f"d{n}") for n in range(3)])
    slots = [[span.slot for span in one.plan().spans] for _ in range(6)]
    assert slots == [[0], [1], [2], [0], [1], [2]]


def test_the_youngest_loses_its_pages_and_comes_back_later() -> None:
    one = scheduler(slots=2, pages=9, share_prompts=False)
    one.submit([request(7, key="a"), request(7, key="b")])
    assert len(one.plan().spans) == 2
    for _ in range(2):
        finish_block(one, [0, 1])
        one.plan()
    finish_block(one, [0, 1])  # each needs a fifth page of nine
    plan, young = one.plan(), one.running[1]
    assert [span.slot for span in plan.spans] == [0] and young.starved
    assert len(young.pages) == 4 and one.num_preemptions == 0  # what it has is of no use to anybody yet
    finish_block(one, [0])
    plan = one.plan()
    assert [span.slot for span in plan.spans] == [0] and one.num_preemptions == 1
    assert young.starved and young.pages == [] and young.cached == 0 and young.start == 16
    one.submit([request(3, key="c")])
    one.finish(one.running[0])
    plan = one.plan()
    assert [(span.slot, span.first, span.end) for span in plan.spans if span.slot == 1] == [(1, 0, 20)]
    assert not young.starved


def test_nobody_new_is_let_in_while_somebody_waits_for_pages() -> None:
    one = scheduler(slots=3, pages=9, share_prompts=False)
    one.submit([request(7, key="a"), request(7, key="b")])
    for _ in range(3):
        one.plan()
        finish_block(one, [0, 1])
    one.plan()
    one.submit([request(2, key="c")])
    assert not one.plan().starts and len(one.waiting) == 1


def test_kept_prefixes_go_before_anybody_loses_pages() -> None:
    one = scheduler(slots=2, pages=9)
    one.submit([request(16, new=4, key="a")])
    one.plan()
    one.finish(one.running[0])
    assert one.pool.num_free == 5 and one.prefixes.num_idle_pages == 4
    one.submit([request(24, new=4, key="b")])
    assert one.plan().spans and one.num_preemptions == 0 and len(one.prefixes) == 1


def test_a_dropped_cache_keeps_nobody_out() -> None:
    """Who waits for its leader's prompt waits for no page: others may start meanwhile."""
    one = scheduler(tokens=8)
    one.submit([request(40, sample=sample) for sample in range(3)])
    one.plan()
    one.drop_cache()
    one.submit([request(3, key="new")])
    assert [start.request.prompt_key for start in one.plan().starts] == ["new"]


def test_longest_first() -> None:
    one = scheduler(slots=1, longest_first=True)
    one.submit([request(4, new=8, key="short"), request(4, new=40, key="long"), request(4, new=16, key="middle")])
    assert [waiting.prompt_key for waiting in one.waiting] == ["long", "middle", "short"]


def test_longest_first_among_those_that_go_on_and_then_among_the_others() -> None:
    one, rng = scheduler(slots=1, longest_first=True), np.random.default_rng(0)
    partial = lambda done: dataclasses.replace(random_trace(4, done, BLOCK, rng), finish_reason="abort")
    begun = {key: dataclasses.replace(request(4, key=key), partial=partial(done)) for key, done in (("a", 8), ("b", 4))}
    one.submit([request(4, new=12, key="new"), begun["a"], request(4, new=99, key="long"), begun["b"]])
    assert [waiting.prompt_key for waiting in one.waiting] == ["b", "a", "long", "new"]


def test_vacancies_are_those_of_slots_and_of_pages() -> None:
    one = scheduler(slots=4, pages=30)
    assert one.vacancies(5) == 4 and one.vacancies(15) == 2
    one.submit([request(8, key="a"), request(8, key="b")])
    assert one.vacancies(5) == 2 and one.vacancies(15) == 0
    one.plan()  # three pages each
    assert one.vacancies(5) == 2 and one.vacancies(15) == 1 and one.vacancies(25) == 0
    one.submit([request(8, key=key) for key in "cde"])
    assert one.vacancies(5) == -1


def test_full_attention_computes_everything_then_the_window() -> None:
    one = scheduler(full_attention=True, logit_shift=1)
    sampling = SamplingParams(max_new_tokens=10, block_size=4, horizon=2)
    one.submit([Request(np.arange(5), sampling, "p", 0, 0)])
    assert spans(one.plan()) == [(0, 15, True)]
    one.stepped(one.running[0], block_done=False)
    assert spans(one.plan()) == [(4, 11, True)]  # one before the block, where its first token is read
    one.stepped(one.running[0], block_done=True)
    assert spans(one.plan()) == [(0, 15, True)]


def test_rounds_are_made_only_where_nothing_is_to_be_decided() -> None:
    one = scheduler(slots=2, pages=9)
    one.submit([request(5, key="a"), request(5, key="b")])
    assert one.for_rounds(2) is None  # they have not begun
    one.plan()
    assert [sequence.slot for sequence in one.for_rounds(2)] == [0, 1]
    assert [len(sequence.pages) for sequence in one.running.values()] == [3, 3]  # two blocks each, from position 4
    assert one.for_rounds(4) is None  # ten pages of nine
    one.submit([request(5, key="c")])
    assert one.for_rounds(2) is not None  # it waits for a slot, not for a decision
    one.finish(one.running[1])
    assert one.for_rounds(2) is None  # now it can be let in
