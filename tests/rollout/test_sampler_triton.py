"""Rollout with the sampler's kernels: what is kept of a block, and whole responses; without a GPU interpreted."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dlm import platform
from megatron_dlm.config.errors import DependencyError
from megatron_dlm.diffusion.sampling import Draws
from megatron_dlm.diffusion.unmasking import Remasking, select
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.rollout.batch import RunningBatch
from megatron_dlm.rollout.denoiser import Denoiser
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.rounds import Rounds
from tests.rollout.test_engine import SAMPLING, WAYS, by_key
from tests.rollout.test_paging import groups, options
from tests.tiny import make_model, vocabulary

pytest.importorskip("triton")

LENGTH, SLOTS = 80, 24
TABLES = ("tokens", "known", "step", "logprob", "sampling_logprob", "version")


def random_batch(block: int) -> RunningBatch:
    generator = torch.Generator().manual_seed(block)
    batch = RunningBatch(SLOTS, LENGTH, 1, platform.device())
    whole = lambda low, high: torch.randint(low, high, (SLOTS + 1,), generator=generator).to(batch.device)
    batch.block_size[:], batch.denoising_steps[:] = block, whole(1, block + 1)
    batch.block_steps[:], batch.steps_taken[:] = whole(0, 3), whole(3, 30)
    batch.remasking[:] = torch.arange(SLOTS + 1) % len(Remasking)
    batch.threshold[:], batch.entropy_bound[:] = 0.5, 1.2
    return batch


@pytest.mark.parametrize("block", [1, 3, 4, 32])
@pytest.mark.parametrize("equal", [False, True])
def test_what_is_kept_is_what_select_chooses(block: int, equal: bool) -> None:
    from megatron_dlm.rollout.unmask_triton import unmask

    generator = torch.Generator().manual_seed(block)
    slot = torch.randperm(SLOTS, generator=generator)[:20]
    position = torch.randint(0, LENGTH - block, (20, 1), generator=generator) + torch.arange(block)
    masked = torch.rand(20, block, generator=generator) < 0.7
    confidence = torch.rand(20, block, generator=generator, dtype=torch.float64)
    if equal:
        confidence = (confidence * 3).round() / 3
    by_entropy = (torch.arange(SLOTS + 1) % len(Remasking) == Remasking.ENTROPY_BOUNDED)[slot]
    confidence = torch.where(by_entropy[:, None], -confidence, confidence)
    logprobs = torch.randn(2, 20 * block, generator=generator, dtype=torch.float64)
    token = torch.randint(2, 50, (20 * block,), generator=generator)
    batch, plain = random_batch(block), random_batch(block)
    columns = token, *logprobs, confidence.flatten(), slot, position, masked
    *drawn, slot, position, masked = (one.to(batch.device) for one in columns)
    unmask(batch, Draws(*drawn), slot, position, masked, torch.tensor(7, device=batch.device))
    chosen = select(plain.unmask_rules(slot), confidence.to(batch.device), masked).cpu()
    assert 0 < chosen.sum() <= masked.sum()
    for row, column in chosen.nonzero().tolist():
        where, number = (slot[row], position[row, column]), row * block + column
        plain.tokens[where], plain.known[where], plain.version[where] = token[number], True, 7
        plain.step[where] = plain.steps_taken[slot[row]] + 1
        plain.logprob[where], plain.sampling_logprob[where] = logprobs[0, number], logprobs[1, number]
    for name in TABLES:
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name


@pytest.fixture(scope="module")
def model():
    return make_model(torch.float32)


@pytest.mark.parametrize("rounds, filters", [(1, False), (3, True)])
def test_responses_are_those_of_torch(model, rounds: int, filters: bool, monkeypatch) -> None:
    """In float32 a draw at a boundary may differ; the margins of these are larger."""
    ways = [
        dataclasses.replace(SAMPLING, **{**changes, "block_size": 4, "denoising_steps": 2, "max_new_tokens": 7})
        for changes in WAYS.values()
    ]
    ways = [way for way in ways if filters or not (way.top_k or way.top_p < 1)][:: 3 if filters else 2]
    requests = [
        dataclasses.replace(request, sampling=ways[number % len(ways)])
        for number, request in enumerate(groups(5, 1, SAMPLING))
    ]
    drawn = {"_drawn_by_kernels": 0, "_drawn_by_torch": 0}

    def counted(name: str, original):
        def of_fused(self, logits, *rest):
            drawn[name] += len(logits) if self.fused else 0
            return original(self, logits, *rest)

        return of_fused

    for name in drawn:
        monkeypatch.setattr(Denoiser, name, counted(name, getattr(Denoiser, name)))
    found, wanted = (
        by_key(Engine(model, vocabulary(), options(rounds_per_sync=rounds, fused_sampler=fused)).run(requests))
        for fused in (True, False)
    )
    assert drawn["_drawn_by_kernels"] > 0 == drawn["_drawn_by_torch"]
    for key, trace in found.items():
        right = wanted[key]
        for name in ("response_ids", "tail_ids", "steps", "tail_steps"):
            assert np.array_equal(getattr(trace, name), getattr(right, name)), (key, name)
        for name in ("logprobs", "sampling_logprobs"):
            assert np.allclose(getattr(trace, name), getattr(right, name), atol=2e-6)
        assert trace.finish_reason == right.finish_reason


WAITS = {"nonzero", "_local_scalar_dense", "lift_fresh", "masked_select", "repeat_interleave", "_unique2"}


class Counted(TorchDispatchMode):
    """Names of the operations that do more than look at a tensor in another way. An index of booleans is a nonzero."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        looks = ("view", "_unsafe_view", "select", "slice", "unsqueeze", "expand", "split", "unbind", "empty", "detach")
        name = function.overloadpacket.__name__
        self.names += [] if name.startswith(looks) else [name]
        if name.startswith("index") and any(one is not None and one.dtype == torch.bool for one in args[1]):
            self.names.append("nonzero")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """Name and grid of the kernels that were launched; none runs."""
    from megatron_dlm.diffusion import filters_triton, sampling_triton
    from megatron_dlm.rollout import unmask_triton

    launched = []

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *_, **__: launched.append((self.name, grid))

    kernels = {"_pieces": sampling_triton, "keep": filters_triton, "_tokens": sampling_triton, "_unmask": unmask_triton}
    for name, module in kernels.items():
        monkeypatch.setattr(module, name, Launch(name))
    return launched


def test_a_round_is_three_kernels_and_waits_for_nobody(launched) -> None:
    batch = random_batch(4)
    denoiser = Denoiser(batch, Vocabulary(300, 1), None, fused=True)
    slot, position = torch.arange(6), torch.arange(4).expand(6, 4).contiguous()
    masked, logits = torch.ones(6, 4, dtype=torch.bool), torch.randn(24, 300)
    given = [one.to(batch.device) for one in (logits, slot, position, masked, torch.tensor(1))]
    with Counted() as counted:
        denoiser.step_blocks(*given)
    assert launched == [("_pieces", (24, 1)), ("_tokens", (24,)), ("_unmask", (6,))]
    assert set(counted.names) <= {"clone"}  # which slot each position is of


def test_a_round_is_three_kernels_with_a_vocabulary_of_any_size(launched) -> None:
    requests, block, size = 512, 4, 151936
    batch = RunningBatch(requests, 8, 1, platform.device())
    denoiser = Denoiser(batch, Vocabulary(size, 1), None, fused=True)
    slot = torch.arange(requests, device=batch.device)
    position = torch.arange(block, device=batch.device).repeat(requests, 1)
    logits = torch.zeros(1, size, dtype=torch.bfloat16, device=batch.device).expand(requests * block, size)
    denoiser.step_blocks(logits, slot, position, torch.ones_like(position, dtype=torch.bool), slot[1])
    rows = requests * block
    assert launched == [("_pieces", (rows, 38)), ("_tokens", (rows,)), ("_unmask", (requests,))]


@pytest.mark.parametrize("filtered", [0.0, 0.2, 1.0])
def test_a_whole_round_waits_for_nobody_whoever_has_filters(filtered: float, launched) -> None:
    """All of it but the forward pass. Torch's sampler waits to learn how many tokens its filters keep."""
    batch = random_batch(4)
    batch.filters, batch.top_p[: int(filtered * SLOTS)] = filtered > 0, 0.9
    batch.start[:], batch.block_end[:], batch.text_end[:] = 4, 8, LENGTH
    of_four = SimpleNamespace(sampling=SimpleNamespace(block_size=4))
    sequences = [SimpleNamespace(slot=n, cached=4 * (n % 2), start=4, request=of_four) for n in range(SLOTS)]
    page_table = torch.arange(20 * (SLOTS + 1), device=batch.device).view(SLOTS + 1, 20)
    rounds = Rounds(batch, page_table, 4, 20 * SLOTS, sequences, LENGTH, SLOTS + 3)
    logits, version = torch.randn(4 * (SLOTS + 3), 300, device=batch.device), rounds.slot[0]
    waits = []
    for fused in (True, False):
        denoiser = Denoiser(batch, Vocabulary(300, 1), None, fused)
        rules = denoiser.rules(rounds.slot.repeat_interleave(4))
        decide = partial(denoiser.step_blocks, version=version, rules=rules)
        with Counted() as counted:
            rounds.round(lambda *_: logits, decide)
        waits.append([name for name in counted.names if name in WAITS])
    assert waits[0] == [] and ("_local_scalar_dense" in waits[1]) == (filtered > 0)
    assert [name for name, _ in launched] == ["_pieces", *["keep"] * (filtered > 0), "_tokens", "_unmask"]


def test_filters_are_forgotten_with_the_sequences_that_had_them(model) -> None:
    engine = Engine(model, vocabulary(), options(rounds_per_sync=2, fused_sampler=True))
    short, long = (dataclasses.replace(SAMPLING, block_size=4, max_new_tokens=length) for length in (4, 8))
    filtering, plain = groups(2, 1, SAMPLING)
    for request, sampling in ((filtering, dataclasses.replace(short, top_p=0.9)), (plain, long)):
        engine.submit([dataclasses.replace(request, sampling=dataclasses.replace(sampling, ignore_eos=True))])
    seen = []
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.step()
        seen.append(engine.batch.filters)
    assert seen[0] and not seen[-1]


def test_logits_in_float64_are_torchs() -> None:
    batch = random_batch(4)
    logits = torch.randn(6, 12, dtype=torch.float64, device=batch.device)
    where, position = torch.arange(6, device=batch.device), torch.arange(6, device=batch.device)
    both = [Denoiser(batch, Vocabulary(12, 1), None, fused).draw(logits, where, position) for fused in (True, False)]
    for field in dataclasses.fields(Draws):
        assert torch.equal(*(getattr(draws, field.name) for draws in both))


# Tried out ----------------------------------------------------------------------------------------------------------


def test_a_sampler_that_does_not_work_is_not_used(monkeypatch, capsys) -> None:
    from megatron_dlm.parallel import self_test
    from megatron_dlm.rollout import sampler_self_test, sizing, unmask_triton

    assert sizing._fused_sampler("triton", torch.float32)  # interpreted, nothing is tried out
    monkeypatch.setattr(sizing, "by_triton", lambda flag, choice: choice != "torch")
    monkeypatch.setattr(self_test, "needed", lambda: True)
    monkeypatch.setattr(sampler_self_test, "_COLUMNS", 300)
    monkeypatch.setattr(sampler_self_test, "_SLOTS", 4)
    monkeypatch.setattr(self_test, "_found", {})
    assert not sizing._fused_sampler("torch", torch.float32) and not self_test._found
    assert sizing._fused_sampler("auto", torch.float32) and self_test._found
    monkeypatch.setattr(self_test, "_found", {})
    right = unmask_triton.unmask
    monkeypatch.setattr(unmask_triton, "unmask", lambda *given: right(*given[:4], ~given[4], given[5]))
    assert not sizing._fused_sampler("auto", torch.float32)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--rollout-sampler auto is torch here, because") and "tokens" in line
    with pytest.raises(DependencyError, match="--rollout-sampler triton does not work here: .*--rollout-sampler torch"):
        sizing._fused_sampler("triton", torch.float32)
