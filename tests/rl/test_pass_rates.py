"""Running pass rates: what they are, and their file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_dlm.config.errors import CheckpointError
from megatron_dlm.rl.pass_rates import FILE, PassRates


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.7, 0.99])
def test_a_rate_is_a_mean_at_first_and_a_running_one_then(momentum: float) -> None:
    found = np.random.default_rng(0).integers(0, 9, 40) / 8
    rates, expected = PassRates(momentum), 0.0
    for visit, accuracy in enumerate(found, start=1):
        rates.visit({"other": 1.0, "p": float(accuracy)})
        if 1 / visit > 1 - momentum:
            expected = float(np.mean(found[:visit]))
        else:
            expected = momentum * expected + (1 - momentum) * accuracy
        row = rates.rows(["p"])[0]
        assert rates.rates[row] == pytest.approx(expected, abs=1e-12) and rates.visits[row] == visit
    assert rates.rates[rates.rows(["other"])[0]] == 1.0 and len(rates) == 2


def test_rows_stay_and_what_was_not_seen_does_not_count() -> None:
    rates = PassRates(0.5)
    assert rates.rows(["a", "b"]).tolist() == [0, 1] and len(rates) == 0
    rates.visit({"c": 0.25, "a": 1.0})
    assert rates.rows(["b", "c", "a"]).tolist() == [1, 2, 0]
    assert rates.rates.tolist() == [1.0, 0.0, 0.25] and rates.visits.tolist() == [1, 0, 1] and len(rates) == 2


def test_those_of_another_run_count_as_one_visit(tmp_path) -> None:
    earlier, rates = PassRates(0.7), PassRates(0.7)
    for accuracy in (1.0, 0.5, 0.5, 0.25):
        earlier.visit({"often": accuracy})
    earlier.visit({"once": 1.0})
    earlier.write(tmp_path)
    rates.begin_with(tmp_path, "--pass-rates")
    often, once, new = rates.rows(["often", "once", "new"])
    assert rates.visits[[often, once, new]].tolist() == [1, 1, 0]
    assert rates.rates[often] == earlier.rates[earlier.rows(["often"])[0]] and rates.rates[once] == 1.0
    rates.visit({"once": 0.0})
    assert rates.rates[once] == 0.5, "what this run sees counts as much"
    with pytest.raises(CheckpointError, match="holds no pass rates"):
        rates.begin_with(tmp_path / "nowhere", "--pass-rates")


def test_a_checkpoint_keeps_them_to_the_last_bit(tmp_path) -> None:
    rng, rates = np.random.default_rng(1), PassRates(0.7)
    rates.rows(["never"])
    for _ in range(30):
        keys = rng.choice(50, 8, replace=False)
        rates.visit({f"p{key}": float(rng.random()) for key in keys})
    rates.write(tmp_path)
    other = PassRates(0.7)
    other.rows([f"p{key}" for key in range(49, -1, -1)])  # rows are others here
    other.restore(tmp_path)
    assert len(other) == len(rates) > 40
    for key in [*(f"p{key}" for key in range(50)), "never"]:
        (one,), (two,) = rates.rows([key]), other.rows([key])
        assert rates.rates[one] == other.rates[two] and rates.visits[one] == other.visits[two]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("key"),
        lambda record: record.update(rate=1.5),
        lambda record: record.update(rate=float("nan")),
        lambda record: record.update(rate="half"),
        lambda record: record.update(visits=0),
        lambda record: record.update(visits=10**30),
        lambda record: record.update(visits=True),
    ],
)
def test_a_damaged_file_is_refused_and_nothing_of_it_taken(tmp_path, change) -> None:
    rates = PassRates(0.5)
    rates.visit({"a": 0.5, "b": 1.0})
    rates.write(tmp_path)
    first, last = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    change(last)
    (tmp_path / FILE).write_text(json.dumps(first) + "\n" + json.dumps(last) + "\n")
    other = PassRates(0.5)
    with pytest.raises(CheckpointError, match="is damaged"):
        other.restore(tmp_path)
    assert len(other) == 0


def test_a_file_that_is_cut_or_missing_is_refused(tmp_path) -> None:
    rates = PassRates(0.5)
    rates.visit({"a": 0.5, "b": 1.0})
    rates.write(tmp_path)
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text()[:-5])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is damaged"):
            PassRates(0.5).restore(tmp_path)
        (tmp_path / FILE).unlink(missing_ok=True)
