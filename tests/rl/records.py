"""Records of responses as a trainer makes them."""

from __future__ import annotations

from megatron_dlm.diffusion.planner import Load
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rl.normalise import Counts


def record_of(trace: Trace, index: int, item: Item, counts: Counts, owner: int = 0, **changes: object) -> Graded:
    """The record of a right response that lies at `index` on its owner."""
    values = dict(
        group=trace.prompt_key,
        sample=trace.sample,
        owner=owner,
        index=index,
        correct=1.0,
        reward=1.0,
        length=len(trace.response_ids),
        steps=1,
        forwards=1,
        truncated=False,
        overlong=False,
        judge_failed=False,
        load=Load(item.group, item.shared_length, item.own_length),
        counts=counts,
    )
    return Graded(**values | changes)
