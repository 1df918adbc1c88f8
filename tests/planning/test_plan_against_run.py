"""The plan's bytes against those of a model that really runs in the same layout.

The run counts for itself: storages under parameters, gradients and the optimizer after an update, and the distinct
storages that autograd keeps of one row.
"""

from __future__ import annotations

from itertools import chain
from unittest import mock

import pytest
import torch

from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.model.shape import resolve
from megatron_dlm.planning.job import Job, Texts
from megatron_dlm.planning.measure import RowShape
from tests.harness import pool

PROMPT, RESPONSE, COPIES, TEXTS = 21, 44, 2, 3
TOKENS, WITHIN = 512, 0.05
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def a_job(
    processes: int,
    bf16: bool = True,
    dense: bool = False,
    model: dict | None = None,
    lora: LoraConfig | None = None,
    **layout,
) -> Job:
    resolved = resolve(
        ModelConfig(
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=384,
            num_attention_heads=8,
            num_query_groups=4,
            kv_channels=16,
            vocab_size=1000,
            block_size=4,
            bf16=bf16,
            **(model or {}),
        ),
        None,
    )
    return Job(
        world_size=processes,
        model=resolved,
        parallel=ParallelConfig(**layout),
        optimizer=OptimizerConfig(),
        texts=Texts(PROMPT, RESPONSE, PROMPT, RESPONSE, COPIES),
        row_budget=TOKENS,
        responses=8,
        updates=1,
        samples=1,
        dense_attention=dense,
        lora=lora,
    )


class Kept(torch.autograd.Function):
    """Attention without a mask that keeps what a fused kernel does: queries, keys, values, output, normaliser."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        tokens, _, heads, dim = q.shape
        wide = lambda x: x.repeat_interleave(heads // x.shape[2], 2)[:, 0].transpose(0, 1).float()
        scores = wide(q) @ wide(k).transpose(1, 2) * scale
        normaliser = scores.logsumexp(-1)
        out = ((scores - normaliser[..., None]).exp() @ wide(v)).transpose(0, 1).reshape(tokens, 1, heads * dim)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, normaliser)
        return out

    @staticmethod
    def backward(ctx, grad):  # of the right shapes; nobody looks at the numbers
        q, k, v, _, _ = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None


def a_row(model):
    """A packed row of TOKENS tokens of texts in COPIES noisy copies."""
    import numpy as np

    from megatron_dlm.diffusion.rows import build_row
    from megatron_dlm.diffusion.views import Item, Views

    grid, items = Grid(model.block_size), []
    length = -(-(PROMPT + RESPONSE) // model.block_size) * model.block_size
    first = PROMPT // model.block_size
    blocks = np.repeat(np.arange(first, length // model.block_size), COPIES)
    position = blocks[:, None] * model.block_size + np.arange(model.block_size)
    hidden = position >= PROMPT
    target = hidden & (np.arange(len(blocks)) % COPIES == 0)[:, None]
    for number in range(TEXTS):
        tokens = np.arange(length, dtype=np.int64) + number
        views = Views(blocks, position, hidden, target, np.ones(target.shape))
        items.append((number, Item(str(number), tokens, PROMPT, views, grid)))
    return build_row(items, TOKENS, model.vocab_size - 1, 0)


def storages(tensors, seen: set[int]) -> int:
    found = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found += storage.nbytes()
    return found


def run_it(job: Job, fused: bool):
    """In each process: an update, and what is there; a row, and what autograd keeps of it."""
    from megatron_dlm.model import block_diffusion
    from megatron_dlm.parallel import groups as process_groups
    from megatron_dlm.sft.objective import sft_forward
    from megatron_dlm.training.setup import Session
    from megatron_dlm.training.step import train_step

    groups = process_groups.initialize(job.parallel, 1)
    vocabulary = Vocabulary(job.model.vocab_size, job.model.vocab_size - 1)
    session = Session(job.model, job.parallel, None, groups, vocabulary)
    state = session.train_state(job.optimizer, 2, job.lora)
    row = a_row(job.model)
    forward = sft_forward(vocabulary, 1, job.parallel.loss_chunk_size)
    fake = lambda *_: lambda layer, q, k, v, scale: Kept.apply(q, k, v, scale)
    with mock.patch.object(block_diffusion, "attention_of", fake if fused else block_diffusion.attention_of):
        train_step(state, [row] * groups.pp_size, forward, TOKENS)
        seen: set[int] = set()
        parameters = storages(chain.from_iterable(c.module.parameters() for c in state.chunks), seen)
        buffers = chain.from_iterable(c.buffers + c.expert_parallel_buffers for c in state.chunks)
        gradients = storages((buffer.grad_data for buffer in buffers), seen)
        held = []
        for one in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
            if one.optimizer is None:
                continue
            for group in one.optimizer.param_groups:
                held += group["params"]
            for moments in one.optimizer.state.values():
                held += [value for value in moments.values() if torch.is_tensor(value) and value.numel() > 1]
        optimizer = storages(held, seen)
        return parameters, gradients, optimizer, kept_of(state, row, forward, job)


def kept_of(state, row, forward, job) -> int:
    total = 0
    for wrapped in state.chunks:
        chunk = wrapped.module
        besides: set[int] = set()
        layout, targets = row.layout, row.targets
        shared = [row.tokens, layout.position, layout.group, layout.view, layout.block, layout.response]
        storages([*chunk.parameters(), *shared, targets.slot, targets.label, targets.weight], besides)
        if not chunk.pre_process:
            tokens = TOKENS // (state.groups.tp_size if job.parallel.sequence_parallel else 1)
            received = torch.randn(tokens, 1, job.model.hidden_size).to(state.config.params_dtype).requires_grad_()
            chunk.set_input_tensor([received])
            storages([received], besides)
        kept = []
        keep = lambda tensor, kept=kept: kept.append(tensor) or tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output, loss_fn = forward(row, wrapped)
            end = loss_fn(output)[0] if chunk.post_process else output
        assert end.requires_grad  # the graph is there until here
        total += storages(kept, besides)
    return total


LAYOUTS = {
    "one": (1, {}),
    "one, fp32": (1, dict(bf16=False)),
    "one, logits kept": (1, dict(loss_chunk_size=0)),
    "one, recomputed": (1, FULL),
    "TP 2, SP": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "TP 2": (2, dict(tensor_model_parallel_size=2)),
    "one, adapters": (1, dict(lora=LoraConfig(8))),
    "TP 2, SP, adapters, recomputed": (
        2,
        dict(lora=LoraConfig(8), tensor_model_parallel_size=2, sequence_parallel=True, **FULL),
    ),
    "PP 2": (2, dict(pipeline_model_parallel_size=2)),
    "PP 2, VPP 2": (2, dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)),
    "DP 2, distributed optimizer": (2, dict(use_distributed_optimizer=True)),
    "EP 2": (
        2,
        dict(
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
            use_distributed_optimizer=True,
            model=dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=96),
        ),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_those_of_a_run(name):
    from megatron_dlm.planning.memory import build
    from megatron_dlm.planning.world import place_of

    processes, settings = LAYOUTS[name]
    job = a_job(processes, **settings)
    found, measured, built = pool(processes).run(run_it, job, True), {}, []
    with mock.patch.object(Job, "row", RowShape(TOKENS, len(a_row(job.model).targets.slot))):
        for rank in range(processes):
            built.append(build(job, place_of(rank, processes, job.parallel), measured))
    for one, (parameters, gradients, optimizer, _) in zip(built, found, strict=True):
        policy = one.models["policy"]
        assert policy.parameters == pytest.approx(parameters, rel=WITHIN)
        assert policy.gradients == pytest.approx(gradients, rel=WITHIN)
        assert policy.optimizer == pytest.approx(optimizer, rel=WITHIN)
        assert job.lora is None or policy.training < policy.parameters  # 9 times as much if everything learned
    planned = [sum(one.activations["policy"].saved) for one in built]
    kept = [kept for *_, kept in found]
    if job.model.num_experts:  # of which some get more tokens than others, which a plan cannot know
        planned, kept = [sum(planned)], [sum(kept)]
    assert planned == pytest.approx(kept, rel=WITHIN)


@pytest.mark.parametrize("bf16", [True, False])
def test_dense_attention_keeps_masks_and_padded_copies(bf16):
    from megatron_dlm.planning.attention import Kept as Keeps
    from megatron_dlm.planning.memory import build
    from megatron_dlm.planning.world import place_of

    job = a_job(1, bf16=bf16, dense=True)
    row = a_row(job.model)
    group, lengths = torch.unique_consecutive(row.layout.group, return_counts=True)
    keeps = Keeps(tuple(lengths[group >= 0].tolist()), repeats=False)  # on a CPU heads share keys and values
    shape = RowShape(TOKENS, len(row.targets.slot))
    with mock.patch.object(Job, "row", shape), mock.patch.object(Job, "kept", keeps):
        built = build(job, place_of(0, 1, job.parallel), {})
    [(*_, kept)] = pool(1).run(run_it, job, False)
    assert sum(built.activations["policy"].saved) == pytest.approx(kept, rel=WITHIN)
