"""What supervised fine-tuning reads: files and indexed data, as one stream of samples.

    samples = open_samples(["gsm8k.jsonl", "data/web"], [1.0, 3.0], tokenizer, seq_length=4096, seed=1, saved={})
    update = samples.take(128)
    place = samples.progress()          # JSON; open_samples(..., saved=place) goes on behind these 128

A path is a JSONL file, or the prefix of data that `preprocess` has indexed. Without weights all samples are one pool:
JSONL files alone in the order of a hash of their content (sampler.EpochSampler), with indexed data in the order of
numbers (order.KeyedOrder). With weights each source goes through epochs of its own (mixture.Blend).

Invariants (tests/data/test_sft_sources.py):
  - the stream is a function of (data, weights, seed): not of ranks, hosts or the sizes in which it is taken;
  - a stream that is opened, or unpickled, at a place goes on there exactly.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.data.indexed import IndexedSamples
from megatron_dlm.data.indexed_format import ENDINGS
from megatron_dlm.data.mixture import Blend, Endless
from megatron_dlm.data.order import KeyedOrder
from megatron_dlm.data.sampler import EpochSampler, Position
from megatron_dlm.data.sft_data import Sample, nothing_fits, read_samples

if TYPE_CHECKING:
    from megatron_dlm.data.tokenizer import Tokenizer

STAGE = "sft"


class FileSamples:
    """The samples of a JSONL file, in memory; the attributes are those of `IndexedSamples`."""

    def __init__(self, samples: list[Sample], left_out: int) -> None:
        self.samples, self.left_out = samples, left_out
        self.longest: dict[int, int] = {}
        for sample in samples:
            prompt, response = len(sample.prompt_ids), len(sample.response_ids) + len(sample.tail_ids)
            self.longest[prompt] = max(self.longest.get(prompt, 0), response)
        self.step_maps = sum(sample.step_map is not None for sample in samples)
        text = "\x1f".join(sample.key for sample in samples)
        self.identity = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


Source = FileSamples | IndexedSamples


class SampleSampler:
    """A stream of samples without end.

    Attributes:
        left_out: how many records were too long.
        step_maps: how many of the samples of an epoch have a step map.
        longest_items: (prompt tokens, response tokens with the tail) of the longest response to prompts of each length:
            no sample is longer than one of these.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Sequence[float],
        seq_length: int | None,
        seed: int,
        saved: Mapping[str, Any],
    ) -> None:
        self._sources, self._seed = dict(sources), seed
        self._weights = dict(zip(sources, weights, strict=True)) if weights else {}
        self._seq_length = seq_length
        self.left_out = sum(source.left_out for source in sources.values())
        self.step_maps = sum(source.step_maps for source in sources.values())
        longest: dict[int, int] = {}
        for source in sources.values():
            for prompt, response in source.longest.items():
                longest[prompt] = max(longest.get(prompt, 0), response)
        self.longest_items = sorted(longest.items())
        self.resume(saved)

    def __len__(self) -> int:
        """Samples of all sources, each once."""
        return sum(map(len, self._sources.values()))

    def resume(self, saved: Mapping[str, Any] | None) -> None:
        """Go to the place that `progress` told (other keys may stand beside), with None or no keys to the beginning.

        Raises:
            ConfigError: it is a place in other data, or under weights where there are none.
        """
        self._order = _order(self._sources, self._weights, self._seed, saved or {})

    def take(self, count: int) -> list[Sample]:
        """The next `count` samples."""
        return self._order.take(count)

    def progress(self) -> dict[str, Any]:
        """The place behind what was taken last; JSON can hold it."""
        return self._order.progress()

    def describe(self) -> str:
        """How many samples there are, and what was left out."""
        said = f"{len(self)} samples (left out: {self.left_out} longer than {self._seq_length} tokens)"
        if self._weights:
            whole = sum(self._weights.values())
            said += " from " + ", ".join(
                f"{path} ({len(source)}, {self._weights[path] / whole:.1%} of the draws)"
                for path, source in self._sources.items()
            )
        return said


def open_samples(
    paths: Sequence[str],
    weights: Sequence[float],
    tokenizer: Tokenizer,
    prompt_template: str = "{question}",
    apply_chat_template: bool = False,
    seq_length: int | None = None,
    seed: int = 0,
    saved: Mapping[str, Any] | None = None,
) -> SampleSampler:
    """The samples of a run, at the place where it was saved or at their beginning.

    Args:
        paths: JSONL files and prefixes of indexed data, mixed at will.
        weights: one for each path, above 0; empty for one pool of all samples.
        prompt_template, apply_chat_template: for JSONL files; indexed data has its own in it.
        seq_length: samples that are longer are left out, and documents without a prompt cut.
        saved: what `progress` returned; other keys may stand beside. None or an empty mapping for a new run.

    Raises:
        DataError: a source is missing, cannot be read, has samples of another tokenizer, or none that fit.
        ConfigError: the weights do not fit the paths, or the saved place is one in other data.
    """
    check_weights(weights, paths)
    sources: dict[str, Source] = {}
    for number, path in enumerate(paths):
        name = os.path.normpath(path)  # a place in it is kept under this name
        name = f"{name} ({number})" if name in sources else name  # a file that is named twice counts twice
        if is_indexed(path):
            sources[name] = IndexedSamples(path, tokenizer, seq_length)
        else:
            found = read_samples(path, tokenizer, prompt_template, apply_chat_template, seq_length)
            sources[name] = FileSamples(*found)
        if weights and not len(sources[name]):
            raise DataError(
                f"{path} has a share of --data-weights, and none of its {sources[name].left_out} samples fits "
                f"--seq-length {seq_length}. Leave it out, or give a larger length."
            )
    if not any(len(source) for source in sources.values()):
        raise nothing_fits(sum(source.left_out for source in sources.values()), seq_length)
    return SampleSampler(sources, weights, seq_length, seed, saved or {})


def is_indexed(path: str) -> bool:
    """Whether a path is a prefix of indexed data, complete or not.

    Raises:
        DataError: it names one of its files.
    """
    stem, ending = os.path.splitext(path)
    if ending in ENDINGS and all(os.path.isfile(stem + other) for other in ENDINGS[:2]):
        raise DataError(f"{path} is a part of indexed data. Give its prefix, {stem}.")
    return not os.path.exists(path) and any(os.path.isfile(path + other) for other in ENDINGS[:2])


def check_weights(weights: Sequence[float], paths: Sequence[str]) -> None:
    """Refuse weights that are not one number above 0 for each path, all different.

    Raises:
        ConfigError: they are not.
    """
    if not weights:
        return
    if len(weights) != len(paths):
        raise ConfigError(
            f"--data-weights has {len(weights)} entries, and --data-path {len(paths)}. Give one weight to each source."
        )
    for index, (weight, path) in enumerate(zip(weights, paths)):
        if weight <= 0:
            raise ConfigError(
                f"--data-weights gives {path} the weight {weight}. Use weights above 0, or leave the source out."
            )
        if path in paths[:index]:
            raise ConfigError(f"--data-path names {path} twice, each with a weight. Name it once, with their sum.")


class _Pool:
    """Several sources, one behind the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        self._ends = list(accumulate(map(len, self._sources)))
        self.identity = "+".join(source.identity for source in self._sources)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        place = bisect_right(self._ends, index)
        return self._sources[place][index - (self._ends[place - 1] if place else 0)]


def _order(
    sources: Mapping[str, Source], weights: Mapping[str, float], seed: int, saved: Mapping[str, Any]
) -> Endless[Sample]:
    place = {key: saved[key] for key in ("position", "sources") if saved.get(key) is not None}
    if place and ("sources" in place) != bool(weights):
        then, now = ("with", "without") if "sources" in place else ("without", "with")
        raise ConfigError(
            f"The saved run drew its samples {then} --data-weights, and this one does {now}, so its place in the data "
            "is unknown. Give the same settings, or begin anew with --finetune."
        )
    if not weights:
        return _one(list(sources.values()), seed, place)
    return Blend(weights, lambda name, own: _one([sources[name]], seed, own), place)


def _one(sources: list[Source], seed: int, place: Mapping[str, Any]) -> Endless[Sample]:
    """One pool."""
    if any(isinstance(source, IndexedSamples) for source in sources):
        return KeyedOrder(sources[0] if len(sources) == 1 else _Pool(sources), seed, STAGE, place)
    position = place.get("position")
    if position is not None and "key" not in position:
        raise ConfigError(
            "The saved run drew its samples from indexed data, and --data-path names JSONL files alone, so its place "
            "among them is unknown. Give the same data, or begin anew with --finetune."
        )
    samples = [sample for source in sources for sample in source.samples]
    return EpochSampler(samples, seed, Position.read(STAGE, position))
