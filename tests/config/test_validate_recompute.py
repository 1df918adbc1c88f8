"""Recomputation that can be, by flag or by override, and what is refused."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.validate_recompute import check_recompute
from tests.config.test_validate import DENSE, MOE

FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
SELECTIVE = dict(recompute_granularity="selective")
PP2 = dict(pipeline_model_parallel_size=2)
VPP = PP2 | dict(num_virtual_stages_per_pipeline_rank=2)
EIGHT = dict(DENSE, num_layers=8)
MODULES = "recompute_modules"


def told(parallel: dict, model: dict, overrides: dict) -> str | None:
    try:
        check_recompute(ParallelConfig(**parallel), ModelConfig(**model, transformer_overrides=overrides))
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("parallel", "model"),
    [
        ({}, EIGHT),
        (FULL, EIGHT),
        (FULL | dict(recompute_num_layers=4), EIGHT),
        (FULL | PP2 | dict(recompute_num_layers=4), EIGHT),
        (FULL | VPP | dict(recompute_num_layers=2), EIGHT),
        (FULL | dict(recompute_method="block", recompute_num_layers=3), EIGHT),
        (SELECTIVE, EIGHT),
        (SELECTIVE | {MODULES: ["core_attn", "layernorm", "mlp"]}, EIGHT),
        (SELECTIVE | {MODULES: ["moe"]}, MOE),
        (SELECTIVE | {MODULES: ["mlp", "moe"]}, dict(MOE, moe_first_k_dense=1)),
        (SELECTIVE | {MODULES: ["shared_experts"]}, dict(MOE, moe_shared_expert_intermediate_size=16)),
    ],
)
@pytest.mark.parametrize("by_override", [False, True])
def test_what_can_be(parallel: dict, model: dict, by_override: bool) -> None:
    overrides = {name: value for name, value in parallel.items() if by_override and name.startswith("recompute_")}
    flags = {name: value for name, value in parallel.items() if name not in overrides}
    assert told(flags, model, overrides) is None


@pytest.mark.parametrize(
    ("parallel", "model", "overrides", "words"),
    [
        (dict(recompute_method="block"), EIGHT, {}, ["--recompute-method block", "without --recompute-granularity"]),
        ({MODULES: ["mlp"]}, EIGHT, {}, ["--recompute-modules mlp", "without --recompute-granularity"]),
        ({}, EIGHT, {MODULES: ["mlp"]}, ["--transformer-override recompute_modules mlp", "does nothing"]),
        (FULL, EIGHT, SELECTIVE, ["--recompute-granularity full", "recompute_granularity=selective", "twice"]),
        (dict(recompute_granularity="full"), EIGHT, {}, ["needs --recompute-method", "uniform or block"]),
        (dict(recompute_granularity="full", recompute_method="block"), EIGHT, {}, ["needs --recompute-num-layers"]),
        (FULL | {MODULES: ["mlp"]}, EIGHT, {}, ["--recompute-modules", "whole ones"]),
        (FULL | dict(recompute_num_layers=0), EIGHT, {}, ["--recompute-num-layers is 0", "of this model are 8"]),
        (FULL | dict(recompute_num_layers=9), EIGHT, {}, ["is 9", "Use 1 to 8."]),
        (FULL | dict(recompute_num_layers=3), EIGHT, {}, ["--recompute-num-layers 3", "8 layers", "1, 2, 4 or 8"]),
        (FULL | PP2 | dict(recompute_num_layers=8), EIGHT, {}, ["of a pipeline stage are 4", "Use 1 to 4."]),
        (FULL | VPP | dict(recompute_num_layers=4), EIGHT, {}, ["of a virtual pipeline stage are 2"]),
        ({}, EIGHT, FULL | dict(recompute_num_layers=3), ["--transformer-override recompute_num_layers 3", "1, 2, 4"]),
        (SELECTIVE | dict(recompute_num_layers=1), EIGHT, {}, ["--recompute-num-layers 1", "whole layers"]),
        (SELECTIVE | dict(recompute_method="block"), EIGHT, {}, ["--recompute-method block", "whole layers"]),
        (SELECTIVE | {MODULES: []}, EIGHT, {}, ["--recompute-modules", "one or more of core_attn"]),
        (SELECTIVE, EIGHT, {MODULES: ["moe_act"]}, ["moe_act", "one or more of"]),
        (SELECTIVE | {MODULES: ["moe"]}, EIGHT, {}, ["names moe", "no experts"]),
        (SELECTIVE | {MODULES: ["mlp"]}, MOE, {}, ["names mlp", "experts in every layer"]),
        (SELECTIVE | {MODULES: ["shared_experts"]}, MOE, {}, ["names shared_experts", "no shared expert"]),
    ],
)  # fmt: skip
def test_what_is_refused(parallel: dict, model: dict, overrides: dict, words: list[str]) -> None:
    message = told(parallel, model, overrides)
    assert message is not None and all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".")
