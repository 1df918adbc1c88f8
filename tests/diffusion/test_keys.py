from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.keys import permutation, shuffled, stream, uniforms

WORD = (1 << 64) - 1


def mix(z: int) -> int:
    """SplitMix64's output function, with Python's integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def unmix(z: int) -> int:
    """Its inverse."""

    def unshift(value: int, bits: int) -> int:
        result = value
        for _ in range(64 // bits + 1):
            result = value ^ (result >> bits)
        return result

    z = (unshift(z, 31) * pow(0x94D049BB133111EB, -1, 1 << 64)) & WORD
    z = (unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & WORD
    return unshift(z, 30)


def signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def naive_uniform(stream_: int, *counters: int) -> float:
    x = mix(stream_ & WORD)
    for counter in counters:
        x = mix((x + (counter + 1) * 0x9E3779B97F4A7C15) & WORD)
    return (x >> 11) / 2**53


def test_the_same_key_gives_the_same_draw() -> None:
    key = stream(1, "test", 2, "three")
    assert key == stream(1, "test", 2, "three")
    assert uniforms(key, torch.arange(5)).equal(uniforms(key, torch.arange(5)))


def test_published_outputs_of_splitmix64() -> None:
    """The published generator, seeded with 1234567: its state is our mixed stream, its calls are our counter."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    key = signed(unmix(1234567))
    assert uniforms(key, torch.arange(5)).tolist() == [(value >> 11) / 2**53 for value in published]


def test_pinned_answers() -> None:
    """A change of the algorithm changes every run that is resumed: it must not happen unnoticed."""
    assert stream(0, "rollout", 1, 2, 3) == -2855791119183057681
    assert permutation(stream(0, "order"), 8).tolist() == [0, 5, 2, 3, 6, 7, 4, 1]


@pytest.mark.parametrize("seed", range(5))
def test_uniforms_against_python_integers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    streams = rng.integers(-(1 << 63), 1 << 63, 40, dtype=np.int64)
    first, second = rng.integers(0, 1 << 40, 40), rng.integers(0, 5, 40)
    drawn = uniforms(torch.from_numpy(streams), torch.from_numpy(first), torch.from_numpy(second)).tolist()
    assert drawn == [naive_uniform(*map(int, key)) for key in zip(streams, first, second)]


def test_a_draw_does_not_depend_on_the_batch_around_it() -> None:
    streams = torch.tensor([stream(0, "rollout", item) for item in range(6)])
    position, step = torch.arange(10), torch.arange(4)
    everything = uniforms(streams[:, None, None], position[None, :, None], step[None, None, :])
    assert everything.shape == (6, 10, 4) and everything.dtype == torch.float64
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert uniforms(streams[:, None, None], position[order][None, :, None], step).equal(everything[:, order])
    for item in range(6):
        for p in range(10):
            one = uniforms(int(streams[item]), torch.tensor(p), torch.tensor(2, dtype=torch.int32))
            assert one == everything[item, p, 2]


def test_no_two_draws_of_a_run_are_equal() -> None:
    streams = torch.tensor([stream(seed, purpose, item) for seed in range(3) for purpose in "ab" for item in range(20)])
    drawn = uniforms(streams[:, None, None], torch.arange(50)[:, None], torch.arange(8))
    assert drawn.unique().numel() == drawn.numel()


@pytest.mark.parametrize("seed", range(4))
def test_the_draws_are_uniform_along_every_counter(seed: int) -> None:
    n = 20000
    counter, fixed = torch.arange(n), torch.full((n,), 7)
    key = stream(seed, "test")
    many_streams = torch.tensor([stream(seed, "test", item) for item in range(n // 10)])
    for drawn in (
        uniforms(key, counter),
        uniforms(key, counter, fixed),
        uniforms(key, fixed, counter),
        uniforms(many_streams, fixed[: n // 10]),
    ):
        u = np.sort(drawn.numpy())
        m = len(u)
        assert 0 <= u[0] and u[-1] < 1
        assert abs(u.mean() - 0.5) < 4.5 / math.sqrt(12 * m)
        gap = max(np.abs(u - np.arange(m) / m).max(), np.abs(u - np.arange(1, m + 1) / m).max())
        assert gap < 2.2 / math.sqrt(m)  # Kolmogorov-Smirnov; exceeded with probability 1e-4
        neighbours = np.corrcoef(drawn[:-1].numpy(), drawn[1:].numpy())[0, 1]
        assert abs(neighbours) < 4.5 / math.sqrt(m)


def test_every_part_of_a_stream_matters() -> None:
    names = [
        stream(0, "a"),
        stream(1, "a"),
        stream(0, "b"),
        stream(0, "a", 1),
        stream(0, "a", "1"),
        stream(0, "a", 1, 2),
        stream(0, "a", 2, 1),
        stream(0, "a", 12),
        stream(0, "a", "1", "2"),
        stream(0, "a", "12"),
        stream(0, "a", ""),
        stream(0, "a", -1),
    ]
    assert len(set(names)) == len(names)
    assert all(-(1 << 63) <= name < 1 << 63 for name in names)


def test_an_integer_names_the_same_stream_whatever_its_type() -> None:
    """An item counted by numpy is the same item."""
    for kind in (np.int64, np.int32, np.uint8):
        assert stream(0, "rollout", kind(3)) == stream(0, "rollout", 3)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 1000])
def test_a_permutation_is_one(n: int) -> None:
    order = permutation(stream(0, "order", n), n)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))


def test_permutations_depend_on_the_stream_and_n() -> None:
    keys = [stream(0, "order", epoch) for epoch in range(20)]
    assert len({tuple(permutation(key, 30).tolist()) for key in keys}) == 20
    assert permutation(keys[0], 30).equal(permutation(keys[0], 30))
    assert permutation(keys[0], 31).tolist()[:30] != permutation(keys[0], 30).tolist()


def test_every_item_comes_first_equally_often() -> None:
    first = [int(permutation(stream(0, "order", epoch), 5)[0]) for epoch in range(2000)]
    counts = np.bincount(first, minlength=5)
    assert (abs(counts - 400) < 4.5 * math.sqrt(2000 * 0.2 * 0.8)).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 4097])
def test_shuffled_places_are_those_of_one_permutation(n: int) -> None:
    whole = shuffled(stream(3, "order"), n, torch.arange(n))
    assert sorted(whole.tolist()) == list(range(n))
    some = torch.randint(n, (20,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled(stream(3, "order"), n, some), whole[some])


def test_shuffled_numbers_come_to_every_place_equally_often() -> None:
    n, times = 13, 3000
    seen = torch.zeros(n, n)
    for seed in range(times):
        seen[torch.arange(n), shuffled(stream(seed, "order"), n, torch.arange(n))] += 1
    squares = ((seen - times / n) ** 2 / (times / n)).sum().item()
    freedom = (n - 1) ** 2
    assert abs(squares - freedom) < 4 * (2 * freedom) ** 0.5


def test_neighbours_and_epochs_are_strangers_when_shuffled() -> None:
    n = 10_000
    first, second = (shuffled(stream(1, "order", epoch), n, torch.arange(n)).double() for epoch in range(2))
    pairs = (first[:-1], first[1:]), (first, second), (first, torch.arange(n).double())
    assert all(abs(torch.corrcoef(torch.stack(pair))[0, 1].item()) < 4 / n**0.5 for pair in pairs)
