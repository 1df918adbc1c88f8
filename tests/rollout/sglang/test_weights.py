"""The way of the weights to SGLang: from shards of any layout to whole tensors, bit by bit those of the checkpoint that
they were imported from.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.checkpoint.hf.folders import make, read
from tests.checkpoint.hf.test_roundtrip import LAYOUTS
from tests.harness import pool

BUCKET = 30_000


class Listener:
    """An engine that keeps what it is told, as bytes by name; SGLang's part of the way is not here."""

    def __init__(self, is_leader: bool, buffer) -> None:
        self.is_leader, self.buffer, self.group = is_leader, buffer, None
        self.commands: list[str] = []
        self.tensors: dict[str, tuple[str, list[int], bytes]] = {}
        self.buckets: list[int] = []

    def command(self, name: str, **content) -> dict:
        self.commands.append(name)
        if name == "load" and self.is_leader:
            bucket = self.buffer.flat(content["buffers"]["bytes"])
            self.buckets.append(len(bucket))
            for one in content["tensors"]:
                assert one["name"] not in self.tensors and one["start"] % 16 == 0
                content_ = bytes(bucket[one["start"] : one["end"]].numpy())
                self.tensors[one["name"]] = (one["dtype"], one["shape"], content_)
        return {}


def carried(parallel: dict, hf: Path, leaders: int, twice: bool):
    """Import a checkpoint in this layout, and carry it to listeners on the first `leaders` ranks."""
    from megatron_dlm.checkpoint.hf.importer import load_into
    from megatron_dlm.checkpoint.hf.source import HFSource
    from megatron_dlm.config.model import ModelConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.shape import resolve
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.rollout.sglang.check import check_model
    from megatron_dlm.rollout.sglang.weights import SGLangRefit, SharedBuffer
    from megatron_dlm.training.setup import Session
    from tests.tiny import Words, vocabulary

    source = HFSource.open(hf)
    model = resolve(ModelConfig(**source.fields, bf16=True), None)
    settings = ParallelConfig(**parallel)
    session = Session(model, settings, Words(), initialize(settings, seed=1), vocabulary())
    state = session.train_state(None, 1)
    load_into(state, source, model)
    buffer = SharedBuffer()
    listener = Listener(session.groups.rank < leaders, buffer)
    refit = SGLangRefit(state, listener, model, check_model(model, model.block_size), buffer, BUCKET)
    report = refit.run()
    if twice:
        with torch.no_grad():
            for parameter in state.module.parameters():
                parameter.mul_(2)
        listener.tensors.clear()
        report = refit.run()
    return listener.tensors, listener.commands, listener.buckets, dataclasses.asdict(report)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("hf")
    return {kind: make(kind, top / kind) for kind in ("sdar", "sdar-moe", "llada2")}


@pytest.mark.parametrize(
    "kind, layout, leaders",
    [
        ("sdar", "1", 1),
        ("sdar", "tp2", 1),
        ("sdar", "tp4", 4),
        ("sdar", "tp2 pp2", 2),
        ("sdar-moe", "ep2", 2),
        ("llada2", "pp2", 2),
        ("llada2", "ep2", 1),
    ],
)
def test_what_arrives_is_the_checkpoint(folders, kind: str, layout: str, leaders: int) -> None:
    world, parallel = LAYOUTS[layout]
    results = pool(world).run(carried, parallel, folders[kind], leaders, False)
    expected = read(folders[kind])
    for rank, (found, commands, buckets, report) in enumerate(results):
        assert commands[0] == "begin_update" and commands[-1] == "end_update"
        assert set(commands[1:-1]) == {"load"}
        if rank >= leaders:
            assert not found and report["copied"] == 0
            continue
        assert found.keys() == expected.keys()
        for name, (dtype, shape, content) in found.items():
            value = expected[name]
            if name.endswith("expert_bias"):  # megatron-core keeps it in float32
                value = value.float()
            assert dtype == str(value.dtype).removeprefix("torch.") and shape == list(value.shape), name
            assert content == bytes(value.contiguous().view(torch.uint8).flatten().numpy()), name
        largest = max(value.nbytes for value in expected.values())
        assert len(buckets) > 2 and max(buckets) <= max(BUCKET, 2 * largest)
        assert report["copied"] == sum(buckets)
        if world == 1:
            assert report["received"] == 0


def test_an_update_carries_the_weights_of_its_time(folders) -> None:
    ((found, _, _, _),) = pool(1).run(carried, {}, folders["sdar"], 1, True)
    for name, value in read(folders["sdar"]).items():
        doubled = (value * 2).contiguous().view(torch.uint8).flatten()
        assert found[name][2] == bytes(doubled.numpy()), name


def shards(parts: int, dtype: torch.dtype = torch.float32, skip: str = ""):
    """All tensors of a small model, cut by rows for as many ranks, or whole on each where that cannot be."""
    from megatron_dlm.checkpoint.hf.stored import whole_model
    from megatron_dlm.rollout.sglang.weights import Shard
    from tests.tiny import model_config

    model = model_config()
    ranks = []
    for rank in range(parts):
        mine = []
        for stored in whole_model(model):
            rows = stored.shape[0] // parts if stored.shape[0] % parts == 0 else stored.shape[0]
            begin = rank * rows if rows != stored.shape[0] else 0
            offset = (begin, *[0] * (len(stored.shape) - 1))
            if not (skip and skip in stored.key and rank == parts - 1):
                mine.append(Shard(stored, offset, (rows, *stored.shape[1:]), dtype))
        ranks.append(mine)
    return model, ranks


@pytest.mark.parametrize("limit", [1, 5_000, 10**9])
def test_buckets_are_bounded_and_whole(limit: int) -> None:
    from megatron_dlm.checkpoint.hf.families import FAMILIES
    from megatron_dlm.rollout.sglang.weights import plan

    model, ranks = shards(2)
    buckets = plan(ranks, FAMILIES["sdar"], model, limit)
    names = [place.name for bucket in buckets for place in bucket.places]
    assert len(names) == len(set(names)) and "model.layers.1.self_attn.k_proj.weight" in names
    assert all(len(bucket.places) == 1 or bucket.nbytes <= limit for bucket in buckets)
    assert (len(buckets) == 1) == (limit == 10**9)
    for bucket in buckets:
        for place in bucket.places:
            pieces = [piece for owned in bucket.pieces.values() for piece in owned if piece.name == place.name]
            seen = sorted((piece.row, piece.row + piece.rows) for piece in pieces)
            assert seen[0][0] == 0 and seen[-1][1] == place.shape[0]
            assert all(one[1] == other[0] for one, other in zip(seen, seen[1:]))


def test_replicas_share_the_sending() -> None:
    from megatron_dlm.checkpoint.hf.families import FAMILIES
    from megatron_dlm.rollout.sglang.weights import plan

    model, (whole,) = shards(1)
    sent = {0: 0, 1: 0, 2: 0}
    for bucket in plan([whole] * 3, FAMILIES["sdar"], model, 10**9):
        for owner, pieces in bucket.pieces.items():
            sent[owner] += sum(piece.nbytes for piece in pieces)
    assert max(sent.values()) < 1.5 * min(sent.values())


def test_a_part_that_nobody_holds_is_noticed() -> None:
    from megatron_dlm.checkpoint.hf.families import FAMILIES
    from megatron_dlm.rollout.sglang.weights import plan

    model, ranks = shards(2, skip="linear_fc2")
    with pytest.raises(ValueError, match="down_proj"):
        plan(ranks, FAMILIES["sdar"], model, 10**9)
