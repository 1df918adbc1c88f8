"""What the loss head takes by Triton's kernels and by torch's operations: the head itself (model/head.py), run over
tensors without data.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dlm.model.attention_backends import dtype_of
from megatron_dlm.model.head import label_policy
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.planning.fused import standing_in
from megatron_dlm.planning.job import Job
from megatron_dlm.planning.live import LiveBytes
from megatron_dlm.planning.work import padded_vocabulary


def head_bytes(job: Job, kernels: bool) -> int:
    """The most that the head takes for a row at a time, forward and backward, beside hidden states and weight: tiles of
    logits, and the two gradients; with adapters the weight is frozen and has none.
    """
    model, parallel, dtype = job.model, job.parallel, dtype_of(job.model)
    width = padded_vocabulary(model) // parallel.tensor_model_parallel_size
    vocabulary, entropy = Vocabulary(model.vocab_size, 0), job.rl is not None
    with FakeTensorMode(), standing_in(kernels):
        draw = lambda *size: torch.empty(*size, dtype=dtype, requires_grad=True)
        hidden, weight = draw(job.row.targets, model.hidden_size), draw(width, model.hidden_size)
        weight.requires_grad_(job.lora is None)
        labels = torch.empty(job.row.targets, dtype=torch.int64)
        with LiveBytes((hidden, weight, labels)) as live:
            policy = label_policy(hidden, weight, labels, 1.0, vocabulary, None, parallel.loss_chunk_size, entropy)
            sum(values.sum() for values in policy if values is not None).backward()
    return live.peak
