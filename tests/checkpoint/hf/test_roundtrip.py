"""HuggingFace -> any layout -> a distributed checkpoint -> HuggingFace, bit by bit; and straight through `convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint.hf.folders import KINDS, make, read
from tests.harness import pool

LAYOUTS = {
    "1": (1, dict()),
    "tp2": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "tp4": (4, dict(tensor_model_parallel_size=4, sequence_parallel=True)),  # more than there are key-value heads
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "ep2": (2, dict(expert_model_parallel_size=2)),
    "tp2 pp2": (
        4,
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    ),
}
EXPERTS = ("sdar-moe", "qwen3-moe", "llada2")


def through(parallel: dict, hf: Path, saved: Path) -> None:
    """Import into a live model of this layout, and save it."""
    import dataclasses

    from megatron_dlm.checkpoint import distributed
    from megatron_dlm.checkpoint.hf.importer import load_into
    from megatron_dlm.checkpoint.hf.origin import Origin
    from megatron_dlm.checkpoint.hf.source import HFSource
    from megatron_dlm.config.model import ModelConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.shape import resolve
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session
    from tests.tiny import Words, vocabulary

    source = HFSource.open(hf)
    # In the type of the checkpoint: with another, bits would change
    wide = source.config.get("dtype", source.config.get("torch_dtype")) == "float32"
    model = resolve(ModelConfig(**source.fields, bf16=not wide), None)
    settings = ParallelConfig(**parallel)
    session = Session(model, settings, Words(), initialize(settings, seed=1), vocabulary())
    state = session.train_state(None, 1)
    load_into(state, source, model)
    origin = Origin.of_source(source)
    extra = {"stage": None, "model": dataclasses.asdict(model), "hf": origin.info}
    distributed.save(state, saved, 3, extra, add_files=origin.write)


def resharded(parallel: dict, saved: Path, again: Path) -> None:
    """Load in another layout, and save it."""
    import shutil

    from megatron_dlm.checkpoint import distributed, places
    from megatron_dlm.config.model import ModelConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session
    from tests.tiny import Words, vocabulary

    folder = places.find(saved)
    extra = distributed.read_extra(folder)
    settings = ParallelConfig(**parallel)
    session = Session(ModelConfig(**extra["model"]), settings, Words(), initialize(settings, seed=1), vocabulary())
    state = session.train_state(None, 1)
    distributed.load(state, saved)
    distributed.save(state, again, 4, extra, add_files=lambda new: shutil.copytree(folder / "hf", new / "hf"))


def export(load: Path, save: Path, limit: float) -> None:
    from megatron_dlm.commands.convert import export_hf
    from megatron_dlm.config.convert import ExportConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=0)
    export_hf(ExportConfig(load=str(load), save=str(save), max_shard_gb=limit))


def convert(hf: Path, saved: Path, back: Path) -> None:
    from megatron_dlm.commands.convert import export_hf, import_hf, verify
    from megatron_dlm.config.convert import ExportConfig, ImportConfig, VerifyConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=0)
    import_hf(ImportConfig(hf_checkpoint=str(hf), save=str(saved)))
    verify(VerifyConfig(hf_checkpoint=str(hf), load=str(saved)))
    export_hf(ExportConfig(load=str(saved), save=str(back), max_shard_gb=2e-4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("hf")
    return {kind: make(kind, top / kind) for kind in KINDS}


def check_equal(one: Path, other: Path) -> None:
    expected, found = read(one), read(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def all_cases() -> list[tuple[str, str, int]]:
    """Every family through one process, through both ways to divide it together and one of them alone, with experts
    also over ranks of experts; and out again on some number of processes.
    """
    alone = ("tp4", "pp2", "tp2")
    return [
        (kind, layout, 1 + (index + number) % 4)
        for number, kind in enumerate(KINDS)
        for index, layout in enumerate(("1", "tp2 pp2", alone[number % 3], *(["ep2"] if kind in EXPERTS else [])))
    ]


@pytest.mark.parametrize("kind, layout, processes", all_cases())
def test_in_and_out_again(folders, tmp_path, kind: str, layout: str, processes: int) -> None:
    world, parallel = LAYOUTS[layout]
    pool(world).run(through, parallel, folders[kind], tmp_path / "saved")
    pool(processes).run(export, tmp_path / "saved", tmp_path / "back", 1e-4)
    check_equal(folders[kind], tmp_path / "back")


@pytest.mark.parametrize(
    "kind, layout, other", [("sdar", "tp4", "pp2"), ("llada2", "ep2", "tp2 pp2"), ("dream", "pp2", "tp2")]
)
def test_resharded_on_the_way(folders, tmp_path, kind: str, layout: str, other: str) -> None:
    world, parallel = LAYOUTS[layout]
    pool(world).run(through, parallel, folders[kind], tmp_path / "saved")
    world, parallel = LAYOUTS[other]
    pool(world).run(resharded, parallel, tmp_path / "saved", tmp_path / "again")
    pool(1).run(export, tmp_path / "again", tmp_path / "back", 1e-4)
    check_equal(folders[kind], tmp_path / "back")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [3])
def test_convert(folders, tmp_path, kind: str, processes: int) -> None:
    """Without a model in between; the settings and the code of the checkpoint come along."""
    pool(processes).run(convert, folders[kind], tmp_path / "saved", tmp_path / "back")
    check_equal(folders[kind], tmp_path / "back")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (folders[kind], tmp_path / "back"))
    for name, value in before.items():
        assert after[name] == value or name in ("dtype", "torch_dtype"), name
    assert (tmp_path / "back" / "modeling_sdar.py").exists() == (folders[kind] / "modeling_sdar.py").exists()
    assert not list(tmp_path.glob(".*partial"))


def broken_off(hf: Path, saved: Path, back: Path) -> bool:
    """Whether anything stands under the name of an export that died at its sixth tensor."""
    from megatron_dlm.checkpoint.hf import exporter

    through({}, hf, saved)
    original, count = exporter.read, iter(range(6))

    def read_some(target, reader):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return original(target, reader)

    exporter.read = read_some
    try:
        from megatron_dlm.commands.convert import export_hf
        from megatron_dlm.config.convert import ExportConfig

        with pytest.raises(KeyboardInterrupt):
            export_hf(ExportConfig(load=str(saved), save=str(back)))
    finally:
        exporter.read = original
    return back.exists()


def test_an_export_that_is_broken_off_leaves_nothing_that_looks_complete(folders, tmp_path) -> None:
    back = tmp_path / "back"
    assert pool(1).run(broken_off, folders["sdar"], tmp_path / "saved", back) == [False]
    assert (tmp_path / ".back.partial").is_dir()  # it had begun
    pool(1).run(export, tmp_path / "saved", back, 5.0)
    check_equal(folders["sdar"], back)
    assert not (tmp_path / ".back.partial").exists()
