"""Layers of Transformer Engine, in bfloat16 and in FP8, against the plain ones: loss and gradients of an SFT update.

    python -m benchmarks.fused_layers [--ways te tensorwise delayed blockwise mxfp8] [--json FILE]

One process, one GPU. All start from the same weights and rows, dense and with experts; the plain layers compute in
bfloat16, and once more in float32, which shows how far bfloat16 is from there. What this machine lacks is left out and
told. Exit code 1 if a difference is above its bound. Those of FP8 are twice and more of what was found where its
numbers are rounded on a CPU (docs/fp8.md); no GPU has been asked yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Words, build_state, open_session, table
from megatron_dlm import platform
from megatron_dlm.config.errors import UserError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig

_TE = dict(transformer_impl="transformer_engine")
WAYS: dict[str, dict[str, object]] = {
    "te": _TE,
    "tensorwise": dict(**_TE, fp8_format="hybrid"),
    "delayed": dict(**_TE, fp8_format="hybrid", fp8_recipe="delayed"),
    "blockwise": dict(**_TE, fp8_format="e4m3", fp8_recipe="blockwise"),
    "mxfp8": dict(**_TE, fp8_format="e4m3", fp8_recipe="mxfp8"),
}
"""Fields of ParallelConfig, by name."""
BOUNDS = {"loss": (1e-2, 2e-2), "gradients": (1e-1, 2e-1)}
"""Largest relative difference from the plain layers: in bfloat16, in FP8. Of the gradients, all together, in norm."""
TOKENS = 128  # what all recipes take a multiple of


def model_of(experts: bool, wide: bool = False) -> ModelConfig:
    """A model of four layers; `wide`: in float32."""
    sizes = dict(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=64,
        vocab_size=512,
        block_size=4,
        bf16=not wide,
    )
    if experts:
        sizes |= dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=256, moe_first_k_dense=1)
    return ModelConfig(**sizes)


def learned(
    model: ModelConfig, settings: dict[str, object], weights: dict[str, Tensor] | None
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and weights, by names that all layers share; from `weights` where they are given.

    Raises:
        UserError: this machine lacks what the settings ask for.
    """
    from megatron_dlm.parallel import groups
    from megatron_dlm.platform import te
    from megatron_dlm.rollout.reshard_plan import canonical
    from megatron_dlm.training.step import accumulate_gradients

    parallel = ParallelConfig(**settings)
    te.require(parallel)
    session = open_session(model, parallel)
    try:
        state = build_state(session, None, 1, 2.0)
        parameters = {canonical(name, 0): parameter for name, parameter in state.named_parameters()}
        if weights is not None:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name])
        rows, forward, length = _rows(session)
        loss = accumulate_gradients(state, rows, forward, length)["loss"]
        gradients = {name: parameter.main_grad.double().cpu() for name, parameter in parameters.items()}
        return loss, gradients, {name: parameter.detach().clone() for name, parameter in parameters.items()}
    finally:
        groups.destroy(keep_world=True)
        gc.collect()


def differences(ways: Sequence[str] = tuple(WAYS)) -> dict[str, float | str]:
    """By what was compared ("te, experts: gradients"): the relative difference from the plain layers in bfloat16, or
    why there is none. "float32" is that of the plain layers.
    """
    found: dict[str, float | str] = {}
    for experts, kind in ((False, "dense"), (True, "experts")):
        loss, gradients, weights = learned(model_of(experts), {}, None)
        for way in ("float32", *ways):
            try:
                wide = way == "float32"
                other, others, _ = learned(model_of(experts, wide), {} if wide else WAYS[way], weights)
            except UserError as error:
                found[f"{way}, {kind}"] = str(error)
                continue
            found[f"{way}, {kind}: loss"] = abs(other - loss) / abs(loss)
            found[f"{way}, {kind}: gradients"] = _distance(others, gradients)
    return found


def bound_of(compared: str) -> float:
    """The largest difference that a comparison may show."""
    way, what = compared.partition(",")[0], compared.rpartition(": ")[2]
    return BOUNDS[what][0 if way in ("te", "float32") else 1]


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    if found.keys() != expected.keys():
        raise ValueError(f"tensors of different names: {sorted(found.keys() ^ expected.keys())[:4]}")
    squares = lambda tensors: torch.stack([tensor.square().sum() for tensor in tensors]).sum()
    apart = squares([found[name] - tensor for name, tensor in expected.items()])
    return (apart / squares(expected.values())).sqrt().item()


def _rows(session):
    from megatron_dlm.config.sft import SFTConfig
    from megatron_dlm.data.sft_data import Sample
    from megatron_dlm.diffusion.planner import Load, pack
    from megatron_dlm.diffusion.rows import build_row
    from megatron_dlm.sft.objective import sft_forward
    from megatron_dlm.sft.updates import sft_items

    words: Words = session.tokenizer
    rng = np.random.default_rng(0)
    draw = lambda length: tuple(rng.integers(0, words.vocab_size - 3, length).tolist())
    samples = [Sample(f"s{n}", draw(5 + n), draw(30 + 10 * n)) for n in range(4)]
    drawn = sft_items(samples, 1, 0, session.grid, SFTConfig(), words.pad_id)
    loads = [Load(item.group, item.shared_length, item.own_length) for item in drawn.items]
    plan = pack(loads, 4 * TOKENS, 1, TOKENS)
    rows = [
        build_row([(n, drawn.items[n]) for n in members], plan.length, words.mask_id, words.pad_id).to(
            platform.device()
        )
        for members in plan.ranks[0]
    ]
    return rows, sft_forward(session.vocabulary, drawn.num_predicted), plan.length


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", metavar="FILE", help="write all differences there")
    options = parser.parse_args(argv)
    platform.install()
    found = differences(options.ways)
    figures = {name: value for name, value in found.items() if isinstance(value, float)}
    lines = [(name, f"{value:.2e}", f"{bound_of(name):.0e}") for name, value in figures.items()]
    print(table(("against plain layers in bfloat16", "difference", "bound"), lines))
    for name, why in found.items():
        if isinstance(why, str):
            print(f"{name}: not compared. {why}")
    if options.json:
        Path(options.json).write_text(json.dumps(found) + "\n")
    return int(any(not value <= bound_of(name) for name, value in figures.items()))


if __name__ == "__main__":
    sys.exit(main())
