"""Every mistake of the table: one sentence, exit code 2, nothing trained, nothing lost."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import pytest

from tests.bad_inputs import (
    bench,
    checkpoint,
    config,
    curricula,
    data,
    environment,
    generation,
    indexed,
    models,
    optimizer,
    outputs,
    rewards,
    runs,
    sizes,
    tokenizer,
    traces,
    yaml_files,
)
from tests.bad_inputs.bench import BASES, Bad

TABLE = [
    pytest.param(entry, id=f"{module.__name__.rpartition('.')[2]}: {entry.id}")
    for module in (
        config,
        yaml_files,
        sizes,
        data,
        indexed,
        tokenizer,
        checkpoint,
        outputs,
        environment,
        generation,
        models,
        optimizer,
        rewards,
        runs,
        traces,
        curricula,
    )
    for entry in module.ENTRIES
]


@pytest.mark.parametrize("entry", TABLE)
def test_a_mistake_is_told_in_one_sentence_and_nothing_is_lost(entry: Bad, world: Path, server) -> None:
    if entry.write is not None:
        entry.write(world)
    before = bench.tree(world)
    result = server.run(entry.argv(), world, entry.absent, entry.environment, entry.ranks)
    said = result.stderr.splitlines()
    assert result.codes[0] == 2 and all(result.codes), result.stdout + result.stderr
    assert len(said) == 1, result.stderr
    kind, _, message = said[0].partition(": ")
    assert kind == entry.kind, said
    for words in entry.words:
        assert words in message
    assert bench.tells_what_to_do(message), message
    assert len(message) < 500, message
    if not entry.late:
        assert "iteration" not in result.stdout, "training had begun"
    assert bench.lost(before, bench.tree(world), entry.late) == []


@pytest.mark.parametrize("name", BASES)
def test_the_command_lines_that_are_spoiled_are_valid(name: str, world: Path, server) -> None:
    result = server.run(shlex.split(BASES[name]), world)
    assert result.codes == [0] and not result.stderr, result.stdout + result.stderr


def test_the_table_is_in_order() -> None:
    entries = [parameter.values[0] for parameter in TABLE]
    twice = [id for id, count in Counter(parameter.id for parameter in TABLE).items() if count > 1]
    assert not twice and len(entries) >= 80
    assert all(entry.words for entry in entries), "an entry must say which words its message contains"
