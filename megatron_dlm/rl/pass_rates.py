"""How often each prompt was solved, as far as the run knows, and how a checkpoint keeps it.

    DIR/iter_0000010/pass_rates.jsonl     {"key": ..., "rate": ..., "visits": ...}, a line for each prompt that was seen

A visit is a group of responses that was judged, learned from or not. The rate is the plain mean of the first visits,
then a running one, in which the past keeps a share of `momentum` at each visit. All ranks hold the same rates, for they
see the same records; rank 0 writes them. Rates of prompts that are no longer in the data are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from megatron_dlm.checkpoint.places import reading
from megatron_dlm.config.errors import CheckpointError, DataError
from megatron_dlm.data.jsonl import read_jsonl, write_jsonl

FILE = "pass_rates.jsonl"


class PassRates:
    """One per run.

    Attributes:
        rates: float64, of each row; 0 where there was no visit.
        visits: int64, of each row.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._row: dict[str, int] = {}
        self.rates, self.visits = np.zeros(0), np.zeros(0, np.int64)

    def __len__(self) -> int:
        """How many prompts were seen."""
        return int((self.visits > 0).sum())

    def rows(self, keys: Iterable[str]) -> np.ndarray:
        """The rows of these prompts in `rates` and `visits`; they stay the same for the whole run."""
        rows = np.array([self._row.setdefault(key, len(self._row)) for key in keys], np.int64)
        more = len(self._row) - len(self.rates)
        if more:
            self.rates = np.concatenate([self.rates, np.zeros(more)])
            self.visits = np.concatenate([self.visits, np.zeros(more, np.int64)])
        return rows

    def visit(self, accuracies: Mapping[str, float]) -> None:
        """Each of these prompts was answered anew. `accuracies`: share of right responses by prompt."""
        rows = self.rows(accuracies)
        share = np.maximum(1 - self.momentum, 1 / (self.visits[rows] + 1))
        found = np.fromiter(accuracies.values(), np.float64, len(rows))
        self.rates[rows] = np.clip(self.rates[rows] + share * (found - self.rates[rows]), 0.0, 1.0)
        self.visits[rows] += 1

    def write(self, folder: Path) -> None:
        """Into the folder of a checkpoint."""
        seen = sorted((key, row) for key, row in self._row.items() if self.visits[row])
        write_jsonl(
            folder / FILE,
            ({"key": key, "rate": float(self.rates[row]), "visits": int(self.visits[row])} for key, row in seen),
        )

    def begin_with(self, folder: Path, flag: str) -> None:
        """Take over what another run found out, as if each of its prompts had been visited once.

        Args:
            folder: of a checkpoint of that run. flag: that named it.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        if not (folder / FILE).exists():
            raise CheckpointError(
                f"{flag}: the checkpoint {folder} holds no pass rates. Give a run with --prompt-sampling difficulty."
            )
        self.restore(folder)
        self.visits = np.minimum(self.visits, 1)

    def restore(self, folder: Path) -> None:
        """Take over what an earlier run wrote there.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        with reading(folder):
            try:
                records = [record for _, record in read_jsonl(folder / FILE)]
            except DataError as error:
                raise ValueError(str(error)) from error
            for record in records:
                if not _is_sound(record):
                    raise ValueError(f"{FILE} holds {str(record)[:60]}")
        rows = self.rows(record["key"] for record in records)
        self.rates[rows] = [record["rate"] for record in records]
        self.visits[rows] = [record["visits"] for record in records]


def _is_sound(record: dict) -> bool:
    key, rate, visits = (record.get(name) for name in ("key", "rate", "visits"))
    return (
        isinstance(key, str)
        and type(rate) in (int, float)
        and 0 <= rate <= 1  # refuses NaN, too
        and type(visits) is int
        and 0 < visits < 2**63
    )
