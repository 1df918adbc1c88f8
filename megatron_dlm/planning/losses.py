"""The losses of a run, for rows whose numbers nobody reads: the step functions of the trainers themselves."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch

from megatron_dlm.diffusion.rows import Row
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.planning.job import Job
from megatron_dlm.training.step import ForwardStep


def policy_loss(job: Job, vocabulary: Vocabulary) -> ForwardStep:
    """Of block SFT, or of RL. A divergence from a teacher is left out; the table of logits that it needs is not."""
    if job.rl is None:
        from megatron_dlm.sft.objective import sft_forward

        return sft_forward(vocabulary, 1, job.parallel.loss_chunk_size)
    from megatron_dlm.rl.rows import RLRow
    from megatron_dlm.rl.update import policy_forward, update_settings

    chunk = 0 if job.rl.distill_coef else job.parallel.loss_chunk_size
    settings = update_settings(job.rl, None, job.rollout.rollout_temperature)
    settings = dataclasses.replace(settings, loss_chunk_size=chunk, distill_coef=0.0)
    step = policy_forward(vocabulary, settings)

    def forward_step(row: Row, model):
        each = torch.zeros(len(row.targets.slot), dtype=torch.float64, device=row.tokens.device)
        known = dict.fromkeys(("advantage", "weight", "share", "rollout_logprob", "sampling_logprob"), each)
        reference = each if job.has_reference else None
        return step(
            RLRow(
                row, kl_weight=None, unit=None, coefficient=None, old_logprob=each, reference_logprob=reference, **known
            ),
            model,
        )

    return forward_step


def loss_of_values(row: Row, model) -> tuple:
    """Of the value model."""
    from megatron_dlm.rl.value import value_forward

    each = torch.zeros(len(row.targets.slot), dtype=torch.float64, device=row.tokens.device)
    planned = SimpleNamespace(row=row, old_value=each, returns=each, weight=each)
    return value_forward(SimpleNamespace(eps_clip=0.2))(planned, model)
