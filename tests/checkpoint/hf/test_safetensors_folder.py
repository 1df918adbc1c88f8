"""Safetensors: what is written is read by the package, slices are slices, and damage is found before it is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dlm.checkpoint.hf.safetensors_folder import INDEX, SafetensorsFolder, SafetensorsWriter
from megatron_dlm.config.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(4, 3),
    "b": torch.randn(5, 2, 2).to(torch.bfloat16),
    "c": torch.tensor([1.5, -2.0], dtype=torch.float64),
    "é": torch.ones(1, dtype=torch.float16),
}


def put(folder, files: int = 2):
    names = sorted(TENSORS)
    places = {name: f"part-{index % files}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: TENSORS[name] for name in names if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def test_what_the_writer_writes_the_package_reads(tmp_path) -> None:
    with SafetensorsWriter(tmp_path / "x", [(name, t.dtype, tuple(t.shape)) for name, t in TENSORS.items()]) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "x")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in found)


def test_a_view_is_written_as_it_looks(tmp_path) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()[1:]
    with SafetensorsWriter(tmp_path / "x", [("a", tensor.dtype, tuple(tensor.shape))]) as writer:
        writer.write("a", tensor)
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor)


def test_the_writer_keeps_its_word(tmp_path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", [("a", torch.float32, (2,)), ("b", torch.float32, (2,))])
    with pytest.raises(ValueError, match="announced"), writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="b was announced and not written"):
        with SafetensorsWriter(tmp_path / "y", [("a", torch.float32, (1,)), ("b", torch.float32, (1,))]) as writer:
            writer.write("a", torch.zeros(1))


def test_slices(tmp_path) -> None:
    folder = SafetensorsFolder(put(tmp_path))
    assert {name: (info.dtype, info.shape) for name, info in folder.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    assert torch.equal(folder.read("a.weight", 1, 2), TENSORS["a.weight"][1:3])
    assert torch.equal(folder.read("a.weight", 1, 3, slice(1, 2)), TENSORS["a.weight"][1:4, 1:2])
    assert torch.equal(folder.read("b", 0, 5), TENSORS["b"])


def cut_a_file(folder):
    file = folder / "part-1.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def cut_a_header(folder):
    file = folder / "part-1.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def garbage(folder):
    (folder / "part-0.safetensors").write_bytes(b"\xff" * 100)


def empty(folder):
    (folder / "part-0.safetensors").write_bytes(b"")


def remove_a_file(folder):
    (folder / "part-0.safetensors").unlink()


def remove_a_tensor(folder):
    save_file({"b": TENSORS["b"]}, folder / "part-0.safetensors")


def break_the_index(folder):
    (folder / INDEX).write_text("{not json")


def another_index(folder):
    (folder / INDEX).write_text('{"weight_map": 3}')


def nothing(folder):
    for file in folder.iterdir():
        file.unlink()


def pickled(folder):
    nothing(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def quantized(folder):
    save_file({name: TENSORS[name].to(torch.int8) for name in ("a.weight", "c")}, folder / "part-0.safetensors")


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut_a_file, "cut short or damaged"),
        (cut_a_header, "not a whole safetensors file"),
        (garbage, "not a whole safetensors file"),
        (empty, "not a whole safetensors file"),
        (remove_a_file, "part-0.safetensors is missing"),
        (remove_a_tensor, "lacks the tensor a.weight"),
        (break_the_index, "is not the index of a checkpoint"),
        (another_index, "is not the index of a checkpoint"),
        (nothing, "holds no model.safetensors"),
        (pickled, "pickled files, which can run code"),
        (quantized, "is of type I8"),
    ],
)
def test_damage(tmp_path, damage, words: str) -> None:
    damage(put(tmp_path))
    with pytest.raises(CheckpointError, match=words):
        SafetensorsFolder(tmp_path)
