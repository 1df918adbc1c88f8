"""Indexing: the samples of JSON lines come back field by field, from files that nothing but the data can change."""

from __future__ import annotations

import fcntl
import gzip
import json
import multiprocessing
import os
import pickle
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.config.preprocess import PreprocessConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.data import index_shards
from megatron_dlm.data.indexed import IndexedSamples
from megatron_dlm.data.indexed_format import sequences_of
from megatron_dlm.data.preprocess import preprocess
from megatron_dlm.data.sft_data import load_sft

ENDINGS = (".bin", ".idx", ".json")


def bar(total: int, name: str):
    """A progress bar that nobody sees."""
    return nullcontext(SimpleNamespace(update=lambda _=1: None))


def records(count: int) -> list[dict]:
    """Lines of all kinds, of different lengths."""
    rng = np.random.default_rng(0)
    made: list[dict] = []
    for n in range(count):
        response = rng.integers(9, 200, 1 + n % 7).tolist()
        steps = rng.integers(1, 9, len(response)).tolist()
        trace = {"prompt_token_ids": [11, 12, 9 + n], "token_ids": response, "step_map": steps, "text": "for people"}
        tail = {"tail_token_ids": [13, 14], "tail_step_map": [9, 1]} if n % 2 else {}
        made += [
            {"question": f"{n}+1=", "response": f"\\boxed{{{n + 1}}}"},
            {"prompt": f"{n}\u2028", "response": ""},
            {"text": "how many apples " * (n % 5)},
            trace | tail,
        ]
    return made


def write(path: Path, lines: list[dict], end: str = "\n") -> str:
    text = end.join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode("utf-8-sig"))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("lines")
    lines = records(15)
    named = write(folder / "a.jsonl", lines[:30], "\n\n"), write(folder / "b.jsonl", lines[30:50])
    return [*named, write(folder / "c.jsonl.gz", lines[50:])]


def run(files: list[str], output: Path, folder: Path, **changes) -> dict[str, bytes]:
    """Index; returns the three files."""
    settings = PreprocessConfig(**{"input": files, "output": str(output), "workers": 1, "chunk_bytes": 500} | changes)
    preprocess(settings, TokenizerConfig(str(folder), prompt_template="Q: {question}"), bar)
    assert not Path(f"{output}.unfinished").exists()
    return {ending: Path(f"{output}{ending}").read_bytes() for ending in ENDINGS}


@pytest.fixture(scope="module")
def made(files, tiny_folder, tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    prefix = tmp_path_factory.mktemp("made") / "all"
    return str(prefix), run(files, prefix, tiny_folder)


def test_samples_come_back_as_they_are_read(made, files, tiny) -> None:
    samples, _ = load_sft(files, tiny, "Q: {question}")
    indexed = IndexedSamples(made[0], tiny)
    assert len(indexed) == len(samples) == 60
    assert [indexed[n] for n in range(60)] == samples
    assert indexed.step_maps == 15 == sum(sample.step_map is not None for sample in samples)
    with pytest.raises(IndexError):
        indexed[60]


@pytest.mark.parametrize("seq_length", [5, 7, 11, 16, 64])
def test_what_is_too_long_is_cut_or_left_out_as_in_files(made, files, tiny, seq_length: int, monkeypatch) -> None:
    monkeypatch.setattr("megatron_dlm.data.indexed._DOCUMENTS_AT_ONCE", 7)
    samples, left_out = load_sft(files, tiny, "Q: {question}", seq_length=seq_length)
    indexed = IndexedSamples(made[0], tiny, seq_length)
    assert [indexed[n] for n in range(len(indexed))] == samples and indexed.left_out == left_out
    longest: dict[int, int] = {}
    for sample in samples:
        prompt = len(sample.prompt_ids)
        longest[prompt] = max(longest.get(prompt, 0), len(sample.response_ids) + len(sample.tail_ids))
    assert indexed.longest == longest
    assert pickle.loads(pickle.dumps(indexed))[3] == samples[3]


def test_the_files_are_those_of_megatrons_builder(made, files, tiny, tmp_path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), np.int32, multimodal=True)
    for sample in load_sft(files, tiny, "Q: {question}")[0]:
        parts = sequences_of(sample)
        builder.add_document(np.concatenate(parts), [len(part) for part in parts], list(range(len(parts))))
    builder.finalize(str(tmp_path / "x.idx"))
    assert (tmp_path / "x.bin").read_bytes() == made[1][".bin"]
    assert (tmp_path / "x.idx").read_bytes() == made[1][".idx"]


@pytest.mark.parametrize("changes", [{"workers": 3}, {"chunk_bytes": 1}, {"chunk_bytes": 2**20, "workers": 2}], ids=str)
def test_neither_processes_nor_chunks_matter(made, files, tiny_folder, tmp_path, changes: dict) -> None:
    assert run(files, tmp_path / "again", tiny_folder, **changes) == made[1]


def test_a_description_counts(made, files) -> None:
    said = json.loads(made[1][".json"])
    assert [said[name] for name in ("samples", "documents", "step_maps", "left_out")] == [60, 15, 15, 0]
    assert [source["bytes"] for source in said["sources"]] == [os.path.getsize(file) for file in files]
    assert sum(source["response_tokens"] for source in said["sources"]) == said["response_tokens"] > 0


def test_samples_can_be_left_out_for_good(files, tiny, tiny_folder, tmp_path) -> None:
    run(files, tmp_path / "short", tiny_folder, seq_length=7)
    said = json.loads((tmp_path / "short.json").read_text())
    assert said["documents"] == 15, "texts are cut when they are read"
    indexed = IndexedSamples(str(tmp_path / "short"), tiny, 7)
    assert [indexed[n] for n in range(len(indexed))] == load_sft(files, tiny, "Q: {question}", seq_length=7)[0]
    assert indexed.left_out == 0 and said["left_out"] == load_sft(files, tiny, "Q: {question}", seq_length=7)[1] > 0


def test_a_run_that_is_killed_goes_on_with_what_is_done(files, made, tiny_folder, tmp_path, monkeypatch) -> None:
    """Killed with SIGKILL when some shards are there: the workers end too, and those shards are not made again."""
    output, deadline = tmp_path / "out", time.monotonic() + 60
    monkeypatch.setattr(index_shards, "sync", lambda path: time.sleep(0.02))  # time to be killed in
    start = multiprocessing.get_context("fork").Process
    process = start(target=run, args=(files, output, tiny_folder), kwargs={"workers": 2, "chunk_bytes": 1})
    process.start()
    while len(list(tmp_path.glob("out.unfinished/*.json"))) < 3:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.join()
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "a worker outlives its run"
        time.sleep(0.001)
    done = {path.name for path in tmp_path.glob("out.unfinished/*.json")}
    assert len(workers) == 2 and len(done) >= 3 and not Path(f"{output}.json").exists()
    monkeypatch.setattr(index_shards, "sync", lambda path: None)
    monkeypatch.setattr("megatron_dlm.data.preprocess._Workers", lambda count, recipe: Here(recipe))
    assert run(files, output, tiny_folder, chunk_bytes=1) == made[1]
    assert not {Path(name).name + ".json" for name in Here.made} & done
    chunks = {chunk.digest for file in files for chunk in index_shards.look_at(file, 1).chunks}
    assert len(Here.made) + len(done) == len(chunks)


class Here:
    """Does the jobs in this process, and remembers which."""

    made: list[str] = []

    def __init__(self, recipe) -> None:
        self.recipe = recipe
        Here.made.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    def run(self, jobs, shown):
        for name, (what, *arguments) in jobs.items():
            if what is index_shards.look_at:
                yield name, what(*arguments)
            else:
                Here.made.append(name)
                yield name, index_shards.make_shard(*arguments, self.recipe, lambda: False)


def is_alive(pid: str) -> bool:
    """Whether a process runs (what nobody waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_complete_result_is_left_alone_and_a_damaged_one_made_again(files, tiny_folder, tmp_path) -> None:
    first = run(files, tmp_path / "x", tiny_folder)
    settings = PreprocessConfig(input=files, output=str(tmp_path / "x"), workers=1)
    words = TokenizerConfig(str(tiny_folder), prompt_template="Q: {question}")
    assert preprocess(settings, words, bar).startswith("Nothing left to do: 60 samples of ")
    (tmp_path / "x.bin").write_bytes(first[".bin"][:-1])
    assert run(files, tmp_path / "x", tiny_folder) == first
    with pytest.raises(ConfigError, match="complete, and was made from other files or with other settings"):
        run(files[:1], tmp_path / "x", tiny_folder)
    with pytest.raises(ConfigError, match="complete, and was made from other files or with other settings"):
        preprocess(settings, TokenizerConfig(str(tiny_folder)), bar)


def test_files_of_others_are_not_overwritten(files, tiny_folder, tmp_path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="would overwrite .*x.json"):
        run(files, tmp_path / "x", tiny_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_one_at_a_time(files, tiny_folder, tmp_path) -> None:
    (tmp_path / "x.unfinished").mkdir()
    with open(tmp_path / "x.unfinished" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="Another preprocess is at work"):
            run(files, tmp_path / "x", tiny_folder)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"text": "a"}\n\n{"text": 1, "prompt": "x"}\n', "line 3: the field 'response' is missing"),
        ('{"text": "a"}\n{"text": \n', "line 2: this is not JSON"),
        ('{"text": "a"}\n{"text": "\xe9"}\n', "line 2: byte 24 is not UTF-8"),
        ("\n \n", "holds no samples"),
        ("", "holds no samples"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 1000])
def test_bad_lines_are_told_by_file_and_line(tiny_folder, tmp_path, lines: str, words: str, chunk_bytes: int) -> None:
    (tmp_path / "bad.jsonl").write_bytes(lines.encode("latin-1"))
    with pytest.raises(DataError, match=words):
        run([str(tmp_path / "bad.jsonl")], tmp_path / "x", tiny_folder, chunk_bytes=chunk_bytes)
    assert not (tmp_path / "x.json").exists()


def test_other_data_and_tokenizers_are_refused_in_a_sentence(made, tiny, pieces, tmp_path) -> None:
    for ending, content in made[1].items():
        (tmp_path / f"x{ending}").write_bytes(content)
    prefix, said = str(tmp_path / "x"), json.loads(made[1][".json"])
    with pytest.raises(DataError, match="another tokenizer than this run's"):
        IndexedSamples(prefix, pieces)
    same_size = SimpleNamespace(fingerprint=lambda: {**tiny.fingerprint(), "hash": "0"})
    with pytest.raises(DataError, match="but not for the same tokens"):
        IndexedSamples(prefix, same_size)
    (tmp_path / "x.json").write_text(json.dumps({**said, "version": 2}))
    with pytest.raises(DataError, match="has version 2, and this program reads 1"):
        IndexedSamples(prefix, tiny)
    (tmp_path / "x.json").write_text(json.dumps({**said, "bytes": {**said["bytes"], "idx": 30}}))
    (tmp_path / "x.idx").write_bytes(made[1][".idx"][:30])
    with pytest.raises(DataError, match="is not an index"):
        IndexedSamples(prefix, tiny)
    for ending, words in ((".idx", "30 bytes"), (".bin", "cannot be read"), (".json", "has no x.json")):
        (tmp_path / "x.json").write_text(json.dumps(said))
        if ending != ".idx":
            (tmp_path / f"x{ending}").unlink()
        with pytest.raises(DataError, match=words):
            IndexedSamples(prefix, tiny)
        (tmp_path / "x.idx").write_bytes(made[1][".idx"])
