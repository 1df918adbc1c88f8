"""From JSONL files to indexed data, by many processes, so that it can be killed at any moment.

1. Every file is read once for its hash and cut into chunks of whole lines.
2. A process takes a chunk and writes its shard (data/index_shards.py) into OUTPUT.unfinished; shards that are there
   already are left alone.
3. The shards are joined in the order of files and lines, OUTPUT.json is written last, and OUTPUT.unfinished goes.

Invariants (tests/data/test_preprocess.py):
  - the result does not depend on the number of processes, on the size of chunks, or on how often it was killed;
  - files that are not its own are never overwritten.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dlm.config.errors import ConfigError, DataError, ResourceError
from megatron_dlm.config.preprocess import PreprocessConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.data.index_shards import (
    COUNTS,
    Chunk,
    Recipe,
    Source,
    counts_of,
    join,
    look_at,
    make_shard,
    shard_of,
    write_text,
)
from megatron_dlm.data.indexed_format import ENDINGS, FORMAT, VERSION, read_description
from megatron_dlm.data.jsonl import nothing_in
from megatron_dlm.data.sft_data import nothing_fits
from megatron_dlm.data.tokenizer import KINDS, Tokenizer
from megatron_dlm.platform.parent import ends_with

_ALSO_READ = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def preprocess(settings: PreprocessConfig, words: TokenizerConfig, bar: Callable[[int, str], Any]) -> str:
    """Index the files of `settings`, or go on with it.

    Args:
        bar: (number of steps, name) -> a progress bar, as a context manager.

    Returns:
        A sentence about what there is now.

    Raises:
        DataError: a file or a line cannot be used, or nothing is left.
        ConfigError: the output belongs to something else, or another process is at work on it.
    """
    output, folder = settings.output, Path(settings.output + ".unfinished")
    tokenizer = Tokenizer(words.tokenizer_model, words.mask_token_id, words.response_prefix)
    recipe = _recipe(tokenizer, words, settings.seq_length)
    workers = settings.workers or len(os.sched_getaffinity(0))
    with _Workers(workers, recipe) as pool:
        with bar(len(settings.input), "reading") as shown:
            looks = {path: (look_at, path, settings.chunk_bytes) for path in settings.input}
            found = dict(pool.run(looks, shown))
        sources = [found[path] for path in settings.input]
        wanted = _description(recipe, words, sources)
        if _is_there(output, folder, wanted):
            shutil.rmtree(folder, ignore_errors=True)
            return f"Nothing left to do: {_told(output, read_description(output))}"
        with _alone(folder, output):
            shards = {shard_of(folder, chunk, recipe): chunk for source in sources for chunk in source.chunks}
            counts = {shard: counts_of(shard) for shard in shards}
            with bar(len(shards), "preprocess") as shown:
                shown.update(sum(one is not None for one in counts.values()))
                jobs = {name: (_shard, name, chunk) for name, chunk in shards.items() if counts[name] is None}
                counts.update(pool.run(jobs, shown))
            _finish(output, folder, recipe, sources, counts, wanted)
    return _told(output, read_description(output))


class _Workers:
    """Processes that do jobs: (function, arguments). They end with the process that has started them, however that
    ends, and soon after an error."""

    def __init__(self, count: int, recipe: Recipe) -> None:
        context = multiprocessing.get_context("fork")  # the tokenizer is there already; no device was touched
        self._stop = context.Event()
        given = (recipe, self._stop, os.getpid())
        self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=given)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: dict[str, tuple], shown: Any) -> Iterator[tuple[str, Any]]:
        """(name, result) of every job, as they end."""
        names = {self._pool.submit(*job): name for name, job in jobs.items()}
        try:
            for future in as_completed(names):
                yield names[future], future.result()
                shown.update()
        except BrokenProcessPool:
            raise ResourceError(
                "A process that tokenises was ended from outside, most likely because the memory of this host is full. "
                "Start the same command again, with fewer --workers; it goes on from what is done."
            ) from None


_own: tuple[Recipe, Any] | None = None  # of a worker


def _begin(recipe: Recipe, stop: Any, parent: int) -> None:
    global _own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent says when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ends_with(parent)()
    _own = recipe, stop


def _shard(name: str, chunk: Chunk) -> Counter[str] | None:
    recipe, stop = _own
    return make_shard(name, chunk, recipe, stop.is_set)


def _recipe(tokenizer: Tokenizer, words: TokenizerConfig, seq_length: int | None) -> Recipe:
    files = [tokenizer.folder / name for name in (*KINDS, *_ALSO_READ)]
    digests = [hashlib.blake2b(file.read_bytes()).hexdigest() if file.is_file() else None for file in files]
    settings = [words.prompt_template, words.apply_chat_template, words.response_prefix, seq_length]
    name = json.dumps([VERSION, tokenizer.fingerprint(), digests, settings])
    return Recipe(tokenizer, words.prompt_template, words.apply_chat_template, seq_length, name)


def _description(recipe: Recipe, words: TokenizerConfig, sources: list[Source]) -> dict[str, Any]:
    """What OUTPUT.json says of settings and files."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": recipe.tokenizer.fingerprint(),
        "prompt_template": words.prompt_template,
        "chat_template": words.apply_chat_template,
        "response_prefix": words.response_prefix,
        "seq_length": recipe.seq_length,
        "sources": [{"path": one.path, "bytes": one.size, "blake2b": one.blake2b} for one in sources],
    }


def _is_there(output: str, folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the result is complete.

    Raises:
        ConfigError: something else stands in its place.
    """
    held = [output + ending for ending in ENDINGS if os.path.lexists(output + ending)]
    try:
        said = read_description(output)
    except DataError:
        if held and not folder.is_dir() and not _is_ours(output):
            raise ConfigError(
                f"--output {output} would overwrite {held[0]}, which preprocess has not written. Name another output."
            ) from None
        return False
    keys = ("path", "bytes", "blake2b")
    now = {**said, "sources": [{key: source.get(key) for key in keys} for source in said["sources"]]}
    if {key: now.get(key) for key in wanted} != wanted:
        raise ConfigError(
            f"--output {output} is complete, and was made from other files or with other settings "
            f"({output}.json says which). Name another output, or delete that one."
        )
    return True


def _is_ours(output: str) -> bool:
    """Whether OUTPUT.json, whatever the state of the other files, is one of ours."""
    try:
        return json.loads(Path(output + ".json").read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _alone(folder: Path, output: str) -> Iterator[None]:
    """Make the folder of shards; no other process works in it meanwhile.

    Raises:
        ConfigError: one does, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written to ({error.strerror}). Give a place where this user may write."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another preprocess is at work on --output {output}. Name another output, or start it again later."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _finish(
    output: str,
    folder: Path,
    recipe: Recipe,
    sources: list[Source],
    counts: dict[str, Counter[str]],
    description: dict[str, Any],
) -> None:
    """Join the shards, and describe the result."""
    shards = [[shard_of(folder, chunk, recipe) for chunk in source.chunks] for source in sources]
    total: Counter[str] = Counter()
    for source, mine, said in zip(sources, shards, description["sources"], strict=True):
        held = sum((counts[shard] for shard in mine), Counter())
        if not held["samples"] + held["left_out"]:
            raise nothing_in(source.path)
        said.update({name: held[name] for name in COUNTS})
        total += held
    if not total["samples"]:
        raise nothing_fits(total["left_out"], recipe.seq_length)
    joined = str(folder / "joined")
    join([shard for mine in shards for shard in mine], joined)
    description |= {name: total[name] for name in COUNTS}
    description["bytes"] = {ending[1:]: os.path.getsize(joined + ending) for ending in ENDINGS[:2]}
    if os.path.lexists(output + ENDINGS[2]):  # of a damaged result, which is complete no longer
        os.remove(output + ENDINGS[2])
    for ending in ENDINGS[:2]:
        os.replace(joined + ending, output + ending)
    write_text(output + ENDINGS[2], json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(folder)


def _told(output: str, said: dict[str, Any]) -> str:
    tokens = said["prompt_tokens"] + said["response_tokens"]
    left_out = f"; left out: {said['left_out']:,} longer than {said['seq_length']} tokens" if said["left_out"] else ""
    return (
        f"{said['samples']:,} samples of {tokens:,} tokens ({said['documents']:,} without a prompt, "
        f"{said['step_maps']:,} with a step map{left_out}) are in {output}.bin and {output}.idx."
    )
