"""What a real training step of several processes sends, counted where torch hands collectives to its backends."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = dict(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2)
SIZES |= dict(kv_channels=16, max_position_embeddings=256, rotary_base=1e4, vocab_size=64, block_size=4)
SIZES |= dict(make_vocab_size_divisible_by=64)
EXPERTS = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=48)
PROMPT, RESPONSE, SAMPLES = 16, 28, 2


@dataclass
class Traffic:
    """Bytes that this rank sends if each collective runs as a ring, by operation; and their number."""

    sent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Counting(TorchDispatchMode):
    """Sees every collective. Messages of fewer bytes than `least` are not counted: losses, norms, router counts."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.traffic, self.least = Traffic(), least

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.split("::")[1].strip("_")
            sent = self._sent(name, args)
            if sent >= self.least:
                self.traffic.sent[name] += sent
                self.traffic.calls[name] += 1
        return function(*args, **(kwargs or {}))

    def _sent(self, name: str, args) -> float:
        size = _group_size(args)
        part = (size - 1) / size
        if name == "allgather_base":
            return part * _bytes(args[0])
        if name in ("reduce_scatter_base", "alltoall_base"):
            return part * _bytes(args[1])
        if name in ("allreduce", "allreduce_coalesced"):
            return 2 * part * _bytes(args[0])
        if name in ("allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"):
            return part * max(_bytes(args[0]), _bytes(args[1]))
        if name in ("allgather", "reduce_scatter", "alltoall"):
            return part * max(_bytes(args[0]), _bytes(args[1]))
        return float(_bytes(args[0])) if name == "send" else 0.0


def _group_size(args) -> int:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return torch.distributed.ProcessGroup.unbox(arg).size()
    return 1


def _bytes(x) -> int:
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    return sum(_bytes(one) for one in x) if isinstance(x, (list, tuple)) else 0


def step(parallel: dict, model: dict, rows: int, least: int) -> tuple[dict[str, float], dict[str, int], int]:
    """One training step on this rank. Returns bytes and calls by operation, and the parameters of this rank.

    Args:
        parallel, model: fields of the settings. rows: of each rank. least: bytes of a message that counts.
    """
    from benchmarks.common import build_state, open_session
    from megatron_dlm.config.model import ModelConfig
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.diffusion.context import Sharing
    from megatron_dlm.training.step import train_step
    from tests.diffusion.oracles import PAD_ID

    session = open_session(ModelConfig(**SIZES | model), ParallelConfig(**parallel))
    state = build_state(session, OptimizerConfig(lr=1e-5), 10, 1.0)

    def forward_step(row, chunk):
        return chunk.module.forward_row(row), lambda logits: (logits.square().sum(), {})

    groups, whole = session.groups, one_row()
    sharing = Sharing(groups.cp_size, groups.cp_rank, SIZES["block_size"], 64, PAD_ID)
    parts, length = [sharing.part(whole)[0]] * rows, sharing.length(len(whole.tokens))
    train_step(state, parts, forward_step, length)  # what is gathered at the beginning of a step was updated before
    with Counting(least) as counting:
        train_step(state, parts, forward_step, length)
    parameters = sum(parameter.numel() for _, parameter in state.named_parameters())
    return dict(counting.traffic.sent), dict(counting.traffic.calls), parameters


def one_row():
    """Two responses to one prompt, every block in two copies."""
    import numpy as np

    from megatron_dlm.diffusion.rows import build_row
    from tests.diffusion.oracles import MASK_ID, PAD_ID
    from tests.planning.test_work import regular_item

    ids = np.arange(PROMPT)
    items = [regular_item(PROMPT, RESPONSE, 4, 2, sample, ids) for sample in range(SAMPLES)]
    length = items[0].shared_length + sum(item.own_length for item in items)
    return build_row(list(enumerate(items)), -(-length // 64) * 64, MASK_ID, PAD_ID)
