"""One optimizer step over the rows of one update, and forward passes without one, under megatron-core's pipeline
schedules.

The caller gives a function for one row:

    forward_step(row, model) -> (output, loss_fn)      # on every stage: `output` goes to the next stage
    loss_fn(output) -> (loss, metrics)                 # on the last stage only

`loss` is the row's share of the update's loss, `metrics` a dict of 0-d tensors; both are SUMS with final weights, only
a metric whose name ends in _max is the row's largest value, and becomes the update's. The
update's loss is the plain sum over rows and data-parallel ranks; nothing is divided by microbatches, tokens or ranks.
(The auxiliary losses of mixture-of-experts routers, which megatron-core adds in the backward pass, are averaged over
the rows of the update.) A row without targets returns zeros of the same names, with a loss that still hangs on the
graph (so that its pipeline stages have a gradient to pass back): `(hidden * 0).sum()` will do.

All ranks give the same number of rows, all of the same length in one update (pipeline stages exchange buffers of one
shape); interleaved schedules want that number to be a multiple of the pipeline size.

Invariants (tests/training/test_step.py): loss, metrics, gradient norm and new weights do not depend on the layout, on
the order of the rows, or on which rank got which row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler
from torch import Tensor, nn

from megatron_dlm import platform
from megatron_dlm.config.errors import TrainingError
from megatron_dlm.parallel.exchange import broadcast_object
from megatron_dlm.training import profile
from megatron_dlm.training.sleep import wake
from megatron_dlm.training.state import TrainState

ForwardStep = Callable[[Any, nn.Module], tuple[Tensor, Callable[..., Any]]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update did, the same on every rank. `metrics` are sums over all rows of the update ("..._max": the
    largest value of them); "loss" is among them.
    """

    metrics: dict[str, float]
    grad_norm: float
    update_successful: bool


def train_step(state: TrainState, rows: Sequence[Any], forward_step: ForwardStep, seq_length: int) -> StepResult:
    """One update: forward and backward over this rank's rows, then one optimizer step and one step of the schedule.
    Collective.

    Args:
        rows: this rank's microbatches.
        seq_length: tokens in each row (the length that this rank holds, with context parallelism).

    Returns:
        The sums of the metrics, the gradient norm before clipping, and whether the weights changed (false only after a
        numerical overflow in fp16).
    """
    if state.optimizer is None:
        raise ValueError("this TrainState has no optimizer; accumulate_gradients is for models that are not updated")
    with profile.span("forward and backward"):
        metrics = accumulate_gradients(state, rows, forward_step, seq_length)
    _refuse_infinite("loss", metrics["loss"], state)
    with profile.span("optimizer"), platform.cuda_calls_on_cpu():
        successful, grad_norm, _ = state.optimizer.step()
        if successful:
            state.scheduler.step(increment=1)
    _refuse_infinite("gradient norm", float(grad_norm or 0.0), state)
    state.iteration += 1
    return StepResult(metrics, float(grad_norm or 0.0), bool(successful))


def _refuse_infinite(name: str, value: float, state: TrainState) -> None:
    """Stop before anything is saved that a number like this has touched. All ranks see the same value."""
    if not math.isfinite(value):
        raise TrainingError(
            f"The {name} of update {state.iteration + 1} is {value}; nothing was saved since. Lower --lr, or look for "
            "broken samples."
        )


def accumulate_gradients(
    state: TrainState, rows: Sequence[Any], forward_step: ForwardStep, seq_length: int
) -> dict[str, float]:
    """Forward and backward over the rows: afterwards `parameter.main_grad` holds the gradient of the update's loss.

    With the distributed optimizer each rank's `main_grad` is complete only in the shard that it owns. Also for float64
    models, which have no optimizer. A sleeping state wakes. Returns the sums of the metrics over all rows of all ranks.
    """
    wake(state)
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    if state.optimizer is not None:
        state.optimizer.zero_grad()

    def step(rows_left: Iterator[Any], model: nn.Module) -> tuple[Tensor, Callable]:
        output, loss_fn = forward_step(next(rows_left), model)
        return output, partial(_loss_for_schedule, loss_fn)

    with _router_losses_averaged(len(rows) * state.groups.data_size):
        collected = _run_schedule(state, rows, step, seq_length, forward_only=False)
    return _sum_metrics(state, collected)


def forward_only(
    state: TrainState,
    rows: Sequence[Any],
    forward_step: ForwardStep,
    seq_length: int,
    collect: Literal["last_stage", "all"] = "last_stage",
) -> list[Any]:
    """Forward passes without gradients, for example for old log-probabilities. Collective.

    Here `loss_fn(output)` may return anything; what it returns is collected, one item per row, in the order of `rows`.

    Returns:
        The items on ranks of the last pipeline stage. Elsewhere an empty list, or with collect="all" the items of the
        rank in the last stage of the same pipeline group, as objects (tensors in them should be on the CPU).
    """
    training = [chunk.training for chunk in state.chunks]
    for chunk in state.chunks:
        chunk.eval()

    def step(rows_left: Iterator[Any], model: nn.Module) -> tuple[Tensor, Callable]:
        output, loss_fn = forward_step(next(rows_left), model)
        return output, lambda result, non_loss_data=True: loss_fn(result)

    with torch.no_grad():
        items = _run_schedule(state, rows, step, seq_length, forward_only=True)
    for chunk, was_training in zip(state.chunks, training, strict=True):
        chunk.train(was_training)
    if collect == "all" and state.groups.pp_size > 1:
        items = broadcast_object(items, src=state.groups.pp_size - 1, group=state.groups.pp)
    return items


@contextlib.contextmanager
def _router_losses_averaged(count: int) -> Iterator[None]:
    """Divide the routers' auxiliary losses by the number of rows; megatron-core sets their scale anew in each forward
    pass.
    """
    original = MoEAuxLossAutoScaler.set_loss_scale
    MoEAuxLossAutoScaler.set_loss_scale = staticmethod(lambda scale: original(scale / count))
    try:
        yield
    finally:
        MoEAuxLossAutoScaler.set_loss_scale = staticmethod(original)


def _run_schedule(
    state: TrainState, rows: Sequence[Any], step: Callable, seq_length: int, forward_only: bool
) -> list[Any]:
    if not rows:
        raise ValueError("an update needs at least one row on every rank; fill up with rows of padding")
    iterators = [iter(rows) for _ in state.chunks]
    single = len(state.chunks) == 1
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators[0] if single else iterators,
        model=state.chunks[0] if single else state.chunks,
        num_microbatches=len(rows),
        # megatron-core divides by the context-parallel size; ours are one rank's tokens already.
        seq_length=seq_length * state.groups.cp_size,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _loss_for_schedule(
    loss_fn: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]], output: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The triple that megatron-core wants: loss, a token count (nobody divides by it), what is to be collected."""
    loss, metrics = loss_fn(output)
    if not loss.requires_grad:
        raise ValueError(
            "the loss of a row has no graph behind it; a row without targets must return a zero that depends on the "
            "model's output"
        )
    sums = {"loss": loss.detach().clone(), **{name: value.detach() for name, value in metrics.items()}}
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), sums


def _sum_metrics(state: TrainState, collected: list[dict[str, Tensor]]) -> dict[str, float]:
    """Sum over rows and data-parallel ranks, and tell every pipeline stage."""
    groups, sums = state.groups, {}
    if collected:
        names = list(collected[0])
        if any(list(row) != names for row in collected):
            raise ValueError(f"rows of one update report different metrics: {names} and others")
        rows = torch.stack([torch.stack([row[name].double().reshape(()) for name in names]) for row in collected])
        totals, largest = rows.sum(0), rows.amax(0)
        dist.all_reduce(totals, group=groups.dp)
        sums = dict(zip(names, totals.tolist(), strict=True))
        if any(name.endswith("_max") for name in names):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.dp)
            sums |= {name: value for name, value in zip(names, largest.tolist()) if name.endswith("_max")}
    if groups.pp_size > 1:
        sums = broadcast_object(sums, src=groups.pp_size - 1, group=groups.pp)
    return sums
