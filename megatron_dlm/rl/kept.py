"""Groups of responses that wait for the next RL step, and how a checkpoint keeps them.

    DIR/iter_0000010/partial_rollouts.jsonl     a line for each response; those of a group follow each other

A line holds everything that its trace holds. Together they are written by rank 0 and read by all, each of which takes
up the groups that fall to its replica; so the number of processes may change in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.checkpoint.places import reading
from megatron_dlm.config.errors import DataError
from megatron_dlm.data.jsonl import read_jsonl, write_jsonl
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.parallel.exchange import exchange_objects

FILE = "partial_rollouts.jsonl"
_INTEGERS = ("prompt_ids", "response_ids", "tail_ids", "steps", "tail_steps", "weight_versions", "routed_experts")
_REALS = ("logprobs", "sampling_logprobs")


@dataclass(slots=True, eq=False)
class Kept:
    """A group that was begun.

    Attributes:
        key: of its prompt.
        step: in which it was begun.
        traces: of its responses, by sample, as far as they were begun.
    """

    key: str
    step: int
    traces: dict[int, Trace] = field(default_factory=dict)

    def is_complete(self, samples: int) -> bool:
        """Whether so many responses are finished."""
        return sum(trace.finish_reason != "abort" for trace in self.traces.values()) == samples


def file_of(mine: Sequence[Kept], is_leader: bool) -> Callable[[Path], None]:
    """What writes the groups of all replicas into the folder of a checkpoint, on rank 0. Collective over all ranks.

    Args:
        mine: groups of this replica. is_leader: whether this rank speaks for it.
    """
    records = [_record(group.step, trace) for group in mine for trace in group.traces.values()]
    everyone = exchange_objects({0: records} if is_leader else {})
    return lambda folder: write_jsonl(folder / FILE, everyone)


def read(folder: Path) -> list[Kept]:
    """The groups of all replicas, in the order in which they were written.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with reading(folder):
        try:
            return _groups(record for _, record in read_jsonl(folder / FILE))
        except (DataError, TypeError, AttributeError) as error:  # the latter over fields that are others than ours
            raise ValueError(str(error)) from error


def _groups(records: Iterable[dict[str, Any]]) -> list[Kept]:
    groups: dict[str, Kept] = {}
    for record in records:
        trace = _trace(record["trace"])
        groups.setdefault(trace.prompt_key, Kept(trace.prompt_key, record["step"])).traces[trace.sample] = trace
    return list(groups.values())


def _record(step: int, trace: Trace) -> dict[str, Any]:
    values = {entry.name: getattr(trace, entry.name) for entry in dataclasses.fields(Trace)}
    arrays = {name: values[name].tolist() for name in (*_INTEGERS, *_REALS) if values[name] is not None}
    return {"step": step, "trace": values | arrays | {"sampling": dataclasses.asdict(trace.sampling)}}


def _trace(values: dict[str, Any]) -> Trace:
    sampling = values["sampling"]
    sampling = SamplingParams(**sampling | {"stop_token_ids": tuple(sampling["stop_token_ids"])})
    arrays = {name: np.asarray(values[name], np.int64) for name in _INTEGERS if values[name] is not None}
    arrays |= {name: np.asarray(values[name], np.float64) for name in _REALS}
    return Trace(**values | arrays | {"sampling": sampling})
