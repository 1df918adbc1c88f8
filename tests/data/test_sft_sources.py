"""One stream of samples from files and indexed data: its order, its shares, its places."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.config.preprocess import PreprocessConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.data.preprocess import preprocess
from megatron_dlm.data.sampler import EpochSampler, Position
from megatron_dlm.data.sft_data import load_sft
from megatron_dlm.data.sft_sources import open_samples


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory) -> Path:
    """a.jsonl with 12 lines, b.jsonl with 5, texts.jsonl with 3 of which two are long, and all of them indexed."""
    folder = tmp_path_factory.mktemp("sources")
    lines = {
        "a": [{"question": f"{n}+{n}=", "response": str(2 * n)} for n in range(12)],
        "b": [{"prompt": f"{n}-{n}=", "response": "0" * n} for n in range(5)],
        "texts": [{"text": "12+34+56=" * n} for n in (1, 5, 9)],
    }
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = PreprocessConfig(input=[str(folder / f"{name}.jsonl")], output=str(folder / f"i{name}"), workers=1)
        bar = lambda total, name: nullcontext(SimpleNamespace(update=lambda _=1: None))
        preprocess(settings, TokenizerConfig(str(tiny_folder)), bar)
    return folder


@pytest.fixture
def stream(folder, tiny):
    def opened(*names: str, weights=(), seq_length=20, seed=1, saved=None):
        paths = [str(folder / name) for name in names]
        saved = json.loads(json.dumps(saved or {}))
        return open_samples(paths, weights, tiny, seq_length=seq_length, seed=seed, saved=saved)

    return opened


KINDS = [
    (("a.jsonl", "b.jsonl"), ()),
    (("ia",), ()),
    (("ia", "texts.jsonl", "ib"), ()),
    (("a.jsonl", "itexts", "b.jsonl"), (3.0, 1.0, 0.5)),
    (("ia", "ib"), (1.0, 1.0)),
]


def keys(samples) -> list[str]:
    return [sample.key for sample in samples]


def test_files_alone_come_in_the_order_that_they_always_had(stream, folder, tiny) -> None:
    paths = [str(folder / name) for name in ("a.jsonl", "texts.jsonl", "b.jsonl")]
    samples, left_out = load_sft(paths, tiny, seq_length=20)
    opened = stream("a.jsonl", "texts.jsonl", "b.jsonl")
    assert opened.take(70) == EpochSampler(samples, 1, Position("sft")).take(70)
    assert len(opened) == len(samples) and opened.left_out == left_out
    assert opened.describe() == f"{len(samples)} samples (left out: {left_out} longer than 20 tokens)"
    assert stream("a.jsonl", saved={"consumed_samples": 9, "position": {"stage": "sft", "epoch": 1, "key": None}})


@pytest.mark.parametrize("names", [names for names, weights in KINDS if not weights])
def test_an_epoch_of_all_sources_holds_each_sample_once(stream, folder, tiny, names) -> None:
    opened = stream(*names)
    files = [str(folder / f"{name.removesuffix('.jsonl').removeprefix('i')}.jsonl") for name in names]
    samples, _ = load_sft(files, tiny, seq_length=20)
    for _ in range(2):
        assert Counter(opened.take(len(samples))) == Counter(samples)
    assert opened.longest_items[-1][1] <= 20


@pytest.mark.parametrize(("names", "weights"), KINDS)
@pytest.mark.parametrize("taken", [0, 5, 23])
def test_a_stream_goes_on_where_it_was(stream, names, weights, taken: int) -> None:
    """In a new process from its saved place, in a worker from its pickle, and in portions of any size."""
    whole = stream(*names, weights=weights).take(taken + 40)
    first = stream(*names, weights=weights)
    for start in range(0, taken, 4):
        first.take(min(4, taken - start))
    copy, saved = pickle.loads(pickle.dumps(first)), first.progress()
    assert copy.take(40) == whole[taken:] and copy.progress() != saved
    assert stream(*names, weights=weights, saved=saved).take(40) == whole[taken:]
    assert [sample for _ in range(20) for sample in first.take(2)] == whole[taken:]
    first.resume(saved)
    assert first.take(40) == whole[taken:]
    assert stream(*names, weights=weights, seed=2).take(30) != whole[:30]


def test_weights_make_shares_whatever_the_sizes(stream) -> None:
    opened = stream("a.jsonl", "ib", weights=[1.0, 3.0])
    small = set(keys(stream("ib").take(5)))
    drawn = keys(opened.take(400))
    assert sum(key in small for key in drawn) == 300
    assert Counter(key for key in drawn if key in small) == dict.fromkeys(small, 60), "each as often as the others"
    assert "25.0% of the draws" in opened.describe() and "75.0% of the draws" in opened.describe()


def test_a_source_in_a_blend_keeps_its_place_when_others_come_and_go(stream) -> None:
    alone = keys(stream("ia").take(12))
    first = stream("ia", "ib", weights=[1.0, 1.0])
    begun = [key for key in keys(first.take(10)) if key in alone]
    more = stream("ia", "b.jsonl", "itexts", weights=[2.0, 1.0, 1.0], saved=first.progress())
    gone_on = [key for key in keys(more.take(14)) if key in alone]
    assert begun + gone_on == alone


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ((("ia",), ()), (("ia",), (1.0,)), "drew its samples without --data-weights"),
        ((("ia",), (1.0,)), (("ia",), ()), "drew its samples with --data-weights"),
        ((("ia",), ()), (("ib",), ()), "give 5 samples that are not those of the saved run .12 samples."),
        ((("a.jsonl",), ()), (("ia",), ()), "JSONL files alone"),
        ((("ia",), ()), (("a.jsonl",), ()), "drew its samples from indexed data"),
    ],
)
def test_places_in_other_data_are_refused(stream, then, now, words: str) -> None:
    saved = stream(*then[0], weights=then[1])
    saved.take(3)
    with pytest.raises(ConfigError, match=words):
        stream(*now[0], weights=now[1], saved=saved.progress())


@pytest.mark.parametrize(
    ("names", "weights", "seq_length", "words"),
    [
        (("nowhere",), (), 20, "nowhere does not exist"),
        (("ia.bin",), (), 20, "is a part of indexed data. Give its prefix"),
        (("ia",), (), 2, "all 12 are longer than --seq-length 2"),
        (("itexts", "ia"), (1.0, 1.0), 2, "has a share of --data-weights, and none of its 12 samples fits"),
        (("ia", "ib"), (1.0,), 20, "--data-weights has 1 entries, and --data-path 2"),
        (("ia", "ib"), (1.0, 0.0), 20, "the weight 0.0. Use weights above 0"),
        (("ia", "ia"), (1.0, 1.0), 20, "twice, each with a weight"),
    ],
)
def test_sentences(stream, names, weights, seq_length: int, words: str) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        stream(*names, weights=weights, seq_length=seq_length)


def test_a_source_that_is_named_twice_without_weights_counts_twice(stream) -> None:
    for name in ("a.jsonl", "ia"):
        assert set(Counter(keys(stream(name, name).take(24))).values()) == {2}
