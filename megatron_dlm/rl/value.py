"""The value model's part of an RL step: values of tokens, advantages from them, and its own updates.

    old = values_of(value_state, rows, length)                       # [N] per row, before anything is updated
    pairs = token_advantages(rows, old, rewarded, settings)          # (advantages, returns), [N] per row
    update_value(value_state, [([ValueRow(row, ...), ...], length), ...], settings)

Rows are those of the policy: a token's value is read in the state in which the token was decided. Advantages run over
the whole trajectory of a response (rl/gae.py), so all its targets must be in the rows of one data rank in one update;
they may be spread over several rows of it, and over the context-parallel ranks that share these.

With value V, old value V_old, return R and weight w of each target, the loss is

    sum of w * 1/2 max( (V - R)^2, (V_old + clamp(V - V_old, -eps, eps) - R)^2 )

and the weights are those of the policy's loss: final, so that rows and ranks simply add up.

Source: the diffusion value model of TraceRL, arXiv 2509.06949; its clipping: PPO, arXiv 1707.06347, as in common use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.diffusion.rows import Row
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.rl.gae import step_gae
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import forward_only, train_step

_MOMENTS = ("error", "error_squared", "return", "return_squared")


@dataclass(frozen=True, slots=True)
class ValueSettings:
    """Attributes: eps_clip: how far from its old value the clipped value may go. gamma: discount per denoising step.
    gae_lambda: lambda of the advantages.
    """

    eps_clip: float
    gamma: float
    gae_lambda: float


@dataclass(frozen=True, slots=True)
class Rewarded:
    """What the advantages of one response are made of, each [R]: token rewards (float64), the steps that training sees
    (rl/gae.learned_steps), and which tokens are learned (bool).
    """

    rewards: np.ndarray
    steps: np.ndarray
    trainable: np.ndarray


@dataclass(frozen=True, slots=True)
class ValueRow:
    """A row with what the value loss needs of each of its N targets."""

    row: Row
    old_value: Tensor
    returns: Tensor
    weight: Tensor


def values_of(state: TrainState, rows: Sequence[Row], length: int) -> list[Tensor] | None:
    """The value of each target under the weights as they are now: per row [N] on the CPU. Collective.

    Args:
        length: T of the rows.

    Returns:
        None on ranks of any but the last pipeline stage, which alone computes losses.
    """

    def forward_step(row: Row, model):
        return model.module.forward_row(row), lambda values: values.cpu()

    values = forward_only(state, rows, forward_step, length)
    return values if state.groups.is_pipeline_last else None


def token_advantages(
    rows: Sequence[Row],
    values: Sequence[Tensor] | None,
    rewarded: Mapping[int, Rewarded],
    settings: ValueSettings,
    cp_group: dist.ProcessGroup | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Advantage and return of each target, from the old values.

    Args:
        rows: all rows of this rank in one update.
        values: [N] for each of them; None on pipeline stages that compute no loss.
        rewarded: by the id that `Targets.response` has.
        cp_group: ranks that share these rows, and so the targets of a response; collective over them.

    Returns:
        (advantages, returns) for each row, float64 [N] on the CPU; zeros where there are no values.

    Raises:
        ValueError: a learned token of a response is read in no row, or twice (the planner's fault).
    """
    if values is None:
        return [(torch.zeros(len(row.targets.slot), dtype=torch.float64),) * 2 for row in rows]
    where = [(row.targets.response.cpu().numpy(), row.targets.index.cpu().numpy()) for row in rows]
    read: dict[int, np.ndarray] = {}
    known = [(*at, value.double().numpy()) for at, value in zip(where, values, strict=True)]
    if cp_group is not None:
        known = [one for rank in gather_objects(known, cp_group) for one in rank]
    for response, index, value in known:
        for id_ in np.unique(response).tolist():
            mine = response == id_
            old = read.setdefault(id_, np.full(len(rewarded[id_].steps), np.nan))
            if not np.isnan(old[index[mine]]).all() or len(np.unique(index[mine])) < mine.sum():
                raise ValueError(f"a token of response {id_} is a target twice in one update")
            old[index[mine]] = value[mine]
    found = {id_: _of_response(id_, rewarded[id_], old, settings) for id_, old in read.items()}
    pairs = []
    for response, index in where:
        pair = np.array([[found[r][0][i], found[r][1][i]] for r, i in zip(response.tolist(), index.tolist())])
        pairs.append(tuple(torch.from_numpy(pair.reshape(-1, 2).T.copy())))
    return pairs


def _of_response(id_: int, what: Rewarded, old: np.ndarray, settings: ValueSettings) -> tuple[np.ndarray, np.ndarray]:
    if not np.array_equal(np.isnan(old), ~what.trainable):
        raise ValueError(f"the targets of response {id_} on this rank are not its learned tokens")
    return step_gae(what.steps, what.rewards, old, what.trainable, settings.gamma, settings.gae_lambda)


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, weight: Tensor, eps_clip: float) -> tuple:
    """Loss of one row and sums of its metrics.

    Args:
        value: [N], with gradient. old_value, returns, weight: [N].

    Returns:
        loss: 0-d. metrics: 0-d sums over targets; `targets` is their number. `error` is what the old value lacked of
        the return: how good a baseline it was is asked before the model learns from these tokens.
    """
    near = old_value + (value - old_value).clamp(-eps_clip, eps_clip)
    free, clipped = (value - returns).square(), (near - returns).square()
    loss = 0.5 * (weight * torch.maximum(free, clipped)).sum()
    error = returns - old_value
    metrics = {
        "targets": torch.full_like(loss, float(value.numel())),
        "value": old_value.sum(),
        "clipfrac": (clipped > free).to(value.dtype).sum(),
        **dict(zip(_MOMENTS, (error.sum(), error.square().sum(), returns.sum(), returns.square().sum()))),
    }
    return loss, {name: number.detach() for name, number in metrics.items()}


def value_forward(settings: ValueSettings):
    """forward_step of training/step.py for the value model, over `ValueRow`s."""

    def forward_step(value_row: ValueRow, model):
        def loss_fn(values: Tensor):
            cast = lambda column: column.to(values.device, values.dtype)
            old, returns, weight = cast(value_row.old_value), cast(value_row.returns), cast(value_row.weight)
            return value_loss(values, old, returns, weight, settings.eps_clip)

        return model.module.forward_row(value_row.row), loss_fn

    return forward_step


def update_value(
    state: TrainState, prepared: Sequence[tuple[Sequence[ValueRow], int]], settings: ValueSettings
) -> dict[str, float]:
    """One optimizer step per update, in order. Collective.

    Args:
        prepared: for each update this rank's rows and their length.

    Returns:
        Metrics: loss and gradient norm as means over updates; `value` and `return` means over targets; `clipfrac` the
        share of targets whose clipped error counted; `explained_variance` of the returns by the old values, 1 at best,
        0 for a constant (0 too where all returns are equal).
    """
    sums: dict[str, float] = {}
    norms, learning_rate = [], state.learning_rate()
    for rows, length in prepared:
        result = train_step(state, rows, value_forward(settings), length)
        norms.append(result.grad_norm)
        for name, number in result.metrics.items():
            sums[name] = sums.get(name, 0.0) + number
    targets = max(sums.pop("targets"), 1.0)
    loss = sums.pop("loss") / len(prepared)
    means = {name: number / targets for name, number in sums.items()}
    error, error_squared, returned, returned_squared = (means.pop(name) for name in _MOMENTS)
    spread = returned_squared - returned**2
    # Sums are those of fp32 numbers: a spread below their rounding is none.
    told = spread > 1e-6 * max(returned_squared, 1e-12)
    return {
        "loss": loss,
        "grad_norm": float(np.mean(norms)),
        "lr": learning_rate,
        **means,
        "return": returned,
        "explained_variance": 1 - (error_squared - error**2) / spread if told else 0.0,
    }
