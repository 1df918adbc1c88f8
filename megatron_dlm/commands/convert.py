"""`megatron-dlm convert hf-to-megatron | megatron-to-hf | verify | merge-lora`: HuggingFace checkpoints in and out, and
adapters into the weights that they stand beside.

Alone or under torchrun; more processes share the work. No process layout is chosen: what is written can be loaded in
any.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dlm.commands.common import prepare_process, running, together
from megatron_dlm.commands.shared_folder import check_shared
from megatron_dlm.commands.weights import TOKENIZER, add_files
from megatron_dlm.config.convert import ExportConfig, ImportConfig, MergeConfig, VerifyConfig
from megatron_dlm.config.errors import CheckpointError, ConfigError, DataError
from megatron_dlm.config.fields import suggest
from megatron_dlm.config.flags import parse
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.validate import check_model

USAGE = "usage: megatron-dlm convert {hf-to-megatron,megatron-to-hf,verify,merge-lora} [flags]; each has a --help"


def main(argv: list[str]) -> None:
    actions: dict[str, tuple[type, Callable[[Any], None]]] = {
        "hf-to-megatron": (ImportConfig, import_hf),
        "megatron-to-hf": (ExportConfig, export_hf),
        "verify": (VerifyConfig, verify),
        "merge-lora": (MergeConfig, merge_lora),
    }
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if not argv or argv[0] not in actions:
        given = argv[0] if argv else "nothing"
        raise ConfigError(
            f"convert does not know {given}. {suggest(given, actions, 'Use one of: ' + ', '.join(actions) + '.')}"
        )
    kind, action = actions[argv[0]]
    settings = parse(f"convert {argv[0]}", {"convert": kind}, argv[1:])["convert"]
    for name in ("hf_checkpoint", "load", "save"):
        if getattr(settings, name, "") is None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is not set. Give the folder; see convert {argv[0]} --help.")
    prepare_process()
    with running():
        _join()
        action(settings)


def _join() -> None:
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=0)


def import_hf(settings: ImportConfig) -> None:
    from megatron_dlm.checkpoint import distributed
    from megatron_dlm.checkpoint.hf.importer import content_of
    from megatron_dlm.checkpoint.hf.origin import Origin
    from megatron_dlm.checkpoint.hf.source import HFSource
    from megatron_dlm.data.tokenizer import Tokenizer
    from megatron_dlm.model.shape import resolve

    began = time.perf_counter()
    source = together(lambda: HFSource.open(settings.hf_checkpoint))
    model = resolve(ModelConfig(**source.fields), None)
    check_model(model)
    tokenizer = together(lambda: _tokenizer(source, Tokenizer))
    if tokenizer and tokenizer.mask_id == model.vocab_size:  # a row for a mask that the tokenizer was given
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    together(lambda: _writable(Path(settings.save)) if _is_main() else None)
    check_shared("--save", settings.save, _is_main())
    content = content_of(source, model)
    origin = Origin.of_source(source)
    extra = {"stage": None, "model": dataclasses.asdict(model), "hf": origin.info}
    files = (lambda folder: add_files(folder, tokenizer, origin)) if tokenizer else origin.write
    nbytes = sum(shard.data.nbytes for shard in content.values())
    distributed.write(content, settings.save, 0, extra, files)
    words = "" if tokenizer else "; no tokenizer was found beside it, so give --tokenizer-model to what loads it"
    _say(f"Imported {source.family.name} from {source.folder} to {settings.save}: {_speed(nbytes, began)}{words}")


def _tokenizer(source, kind):
    """The tokenizer of a HuggingFace folder; None where it has none that can be read without running its code."""
    try:
        return kind(source.folder, source.mask_id)
    except DataError:
        if (source.folder / "tokenizer.json").exists() or (source.folder / "tokenizer.model").exists():
            raise  # it has one, and it is broken
        return None


def export_hf(settings: ExportConfig) -> None:
    from megatron_dlm.checkpoint import distributed, fit, places
    from megatron_dlm.checkpoint.adapters import reader_of
    from megatron_dlm.checkpoint.hf import exporter
    from megatron_dlm.checkpoint.hf.origin import FOLDER, Origin
    from megatron_dlm.checkpoint.hf.safetensors_folder import DTYPES
    from megatron_dlm.checkpoint.hf.source import CONFIG, read_companions
    from megatron_dlm.data.tokenizer import Tokenizer

    began = time.perf_counter()
    folder = places.find(settings.load, settings.ckpt_step)
    extra = distributed.read_extra(folder)
    fit.check_kind(extra, False, f"--load {settings.load}")
    model = _model_of(extra, settings.load)
    origin = Origin.of_checkpoint(folder, extra)
    info = {} if origin is None else origin.info
    family = exporter.family_for(model, settings.hf_family, info.get("family"))
    same = family.name == info.get("family")
    dtype = _dtype(settings.export_dtype)
    if dtype is None and "dtype" in info:
        dtype = DTYPES[info["dtype"]]
    if settings.max_shard_gb <= 0:
        raise ConfigError(f"--max-shard-gb is {settings.max_shard_gb}. Use a number above 0.")
    files = {} if origin is None else dict(origin.files)
    config = json.loads(files.pop(CONFIG, b"{}"))
    if not same:  # settings and code of another family would contradict what is written
        config = {}
        files = {name: text for name, text in files.items() if not name.endswith(".py")}
    if (folder / TOKENIZER).is_dir():
        words = Tokenizer(folder / TOKENIZER)
        config |= {"mask_token_id": words.mask_id}
        if not _is_that_of(words, folder / FOLDER, Tokenizer):
            files = {name: text for name, text in files.items() if not _of_a_tokenizer(name)}
            files |= read_companions(folder / TOKENIZER)
            config |= {"eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    target = Path(os.path.abspath(settings.save))
    together(lambda: _free(target, settings.save) if _is_main() else None)
    odd = info.get("odd_dtypes", {}) if same and settings.export_dtype is None else {}
    reader = reader_of(folder, model, extra)
    nbytes = exporter.export(reader, model, family, target, files, config, dtype, odd, int(settings.max_shard_gb * 1e9))
    _say(f"Exported {folder} to {settings.save} as {family.name}: {_speed(nbytes, began)}")


_PROBE = "The sum of 12 and 345.6 is \\boxed{357.6}.\n\tdéjà vu, 数学 <|endoftext|>"


def _is_that_of(words, folder: Path, kind) -> bool:
    """Whether the tokenizer of a run is the one that lies in a folder: the files there are then the better ones."""
    try:
        other = kind(folder, words.mask_id)
    except DataError:
        return False
    same = ("vocab_size", "mask_id", "eos_id", "pad_id")
    return all(getattr(words, name) == getattr(other, name) for name in same) and (
        words.encode(_PROBE) == other.encode(_PROBE)
    )


def _of_a_tokenizer(name: str) -> bool:
    """Whether a file beside a checkpoint belongs to its tokenizer."""
    known = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
    return name.startswith("token") or name in known


def verify(settings: VerifyConfig) -> None:
    from megatron_dlm.checkpoint import distributed, fit, places
    from megatron_dlm.checkpoint.adapters import reader_of
    from megatron_dlm.checkpoint.hf.exporter import compare
    from megatron_dlm.checkpoint.hf.source import HFSource

    source = HFSource.open(settings.hf_checkpoint)
    folder = places.find(settings.load, settings.ckpt_step)
    extra = distributed.read_extra(folder)
    fit.check_kind(extra, False, f"--load {settings.load}")
    model = _model_of(extra, settings.load)
    found = compare(source, reader_of(folder, model, extra), model)
    if found.different:
        raise CheckpointError(
            f"{found.different} of {found.tensors} tensors in {settings.hf_checkpoint} differ from {folder}, most of "
            f"all {found.name}, by {found.largest:.3e}. One of the two was trained further; convert it again."
        )
    _say(f"All {found.tensors} tensors of {settings.hf_checkpoint} and {folder} are equal, bit by bit.")


def merge_lora(settings: MergeConfig) -> None:
    from megatron_dlm.checkpoint import distributed, fit, places
    from megatron_dlm.checkpoint.adapters import LORA, reader_of
    from megatron_dlm.checkpoint.hf.importer import share_of_rank
    from megatron_dlm.checkpoint.hf.origin import Origin
    from megatron_dlm.checkpoint.hf.stored import shard_of, whole_model
    from megatron_dlm.data.tokenizer import Tokenizer

    began = time.perf_counter()
    folder = places.find(settings.load, settings.ckpt_step)
    extra = distributed.read_extra(folder)
    fit.check_kind(extra, False, f"--load {settings.load}")
    if LORA not in extra:
        raise CheckpointError(f"--load {settings.load} has no adapters to merge. Use it as it is.")
    model = _model_of(extra, settings.load)
    if os.path.realpath(settings.save) == os.path.realpath(settings.load):
        raise ConfigError(
            f"--save {settings.save} is the folder of --load, whose adapters would be lost. Give another."
        )
    together(lambda: _writable(Path(settings.save)) if _is_main() else None)
    check_shared("--save", settings.save, _is_main())
    reader, content = reader_of(folder, model, extra), {}
    for index, stored in enumerate(share_of_rank(whole_model(model))):
        content[str(index)] = shard_of(stored, reader.read(stored, 0, stored.shape[0]), model)
    origin, words = Origin.of_checkpoint(folder, extra), folder / TOKENIZER
    tokenizer = together(lambda: Tokenizer(words)) if words.is_dir() else None
    kept = {"stage": None, "model": extra["model"], **({} if origin is None else {"hf": origin.info})}

    def add(target: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(target / TOKENIZER)
        if origin is not None:
            origin.write(target)

    nbytes = sum(shard.data.nbytes for shard in content.values())
    distributed.write(content, settings.save, 0, kept, add)
    _say(f"Merged the adapters of {folder} into weights in {settings.save}: {_speed(nbytes, began)}")


def _model_of(extra: dict[str, Any], load: str) -> ModelConfig:
    if "model" not in extra:
        raise CheckpointError(f"The checkpoint in {load} does not say which model it holds. Write it again.")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in extra["model"].items() if name in known})


def _dtype(name: str | None):
    import torch

    if name is None:
        return None
    allowed = ("bfloat16", "float16", "float32")
    if name not in allowed:
        raise ConfigError(f"--export-dtype {name} is not known. Use one of {', '.join(allowed)}.")
    return getattr(torch, name)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--save {folder} cannot be written to ({error.strerror}). Give a place where this user may write."
        ) from None


def _free(target: Path, given: str) -> None:
    """Make sure that an export may take this name."""
    _writable(target.parent)
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        raise ConfigError(f"--save {given} exists already. Give a folder that does not, or delete it.")
    shutil.rmtree(target.with_name(f".{target.name}.partial"), ignore_errors=True)


def _is_main() -> bool:
    import torch.distributed as dist

    return dist.get_rank() == 0


def _say(text: str) -> None:
    if _is_main():
        print(text, flush=True)


def _speed(nbytes: int, began: float) -> str:
    seconds = time.perf_counter() - began
    return f"{nbytes / 1e9:.2f} GB on this process in {seconds:.1f} s"
