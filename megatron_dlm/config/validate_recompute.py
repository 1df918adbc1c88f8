"""Which recomputation of activations cannot be, refused before anything is built; `validate.check_parallel` asks.

The settings have flags, and TransformerConfig's fields of the same names may be given as overrides instead; what is
checked is what the two come to.
"""

from __future__ import annotations

from typing import Any

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name, one_of
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.overrides import EITHER_WAY, FLAG
from megatron_dlm.config.parallel import RECOMPUTE_MODULES, ParallelConfig


def check_recompute(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Refuse recomputation that does not go with itself, with the model, or with its pipeline stages.

    Args:
        parallel: its sizes have been checked.
        model: has been checked.
    """
    found, told = _settings(parallel, model)
    granularity = found.get("recompute_granularity")
    if granularity is None:
        for name, value in found.items():
            raise ConfigError(
                f"{told[name]} {_text(value)} does nothing without --recompute-granularity. Add full or selective, or "
                "leave it out."
            )
        return
    if granularity == "full":
        _check_full(parallel, model, found, told)
    else:
        _check_selective(model, found, told)


def _settings(parallel: ParallelConfig, model: ModelConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """What is given, by name, and how the user gave it."""
    found: dict[str, Any] = {}
    told: dict[str, str] = {}
    for name in EITHER_WAY:
        flag, override = getattr(parallel, name), model.transformer_overrides.get(name)
        if flag is not None and override is not None:
            raise ConfigError(
                f"{flag_name(name)} {_text(flag)} and {FLAG} {name}={_text(override)} say the same thing twice. Leave "
                "the override out."
            )
        if flag is not None or override is not None:
            found[name] = override if flag is None else flag
            told[name] = flag_name(name) if override is None else f"{FLAG} {name}"
    return found, told


def _check_full(parallel: ParallelConfig, model: ModelConfig, found: dict[str, Any], told: dict[str, str]) -> None:
    if "recompute_modules" in found:
        raise ConfigError(
            f"{told['recompute_modules']} names parts of a layer, and --recompute-granularity full computes whole ones "
            "again. Leave it out, or use selective."
        )
    for name, hint in (("recompute_method", "uniform or block"), ("recompute_num_layers", "1 or more")):
        if name not in found:
            raise ConfigError(f"--recompute-granularity full needs {flag_name(name)}. Give {hint}.")
    layers = model.num_layers // parallel.pipeline_model_parallel_size
    where = "of this model"
    if parallel.pipeline_model_parallel_size > 1:
        where = "of a pipeline stage"
    if parallel.num_virtual_stages_per_pipeline_rank is not None:
        layers, where = layers // parallel.num_virtual_stages_per_pipeline_rank, "of a virtual pipeline stage"
    count, uniform = found["recompute_num_layers"], found["recompute_method"] == "uniform"
    if not 1 <= count <= layers:
        raise ConfigError(
            f"{told['recompute_num_layers']} is {count}, and the layers {where} are {layers}. Use 1 to {layers}."
        )
    if uniform and layers % count:
        fitting = one_of([n for n in range(1, layers + 1) if layers % n == 0][:12])
        raise ConfigError(
            f"{told['recompute_num_layers']} {count} does not cut the {layers} layers {where} into equal parts, as "
            f"--recompute-method uniform does. Use {fitting}."
        )


def _check_selective(model: ModelConfig, found: dict[str, Any], told: dict[str, str]) -> None:
    for name in ("recompute_method", "recompute_num_layers"):
        if name in found:
            raise ConfigError(
                f"{told[name]} {found[name]} is for whole layers. Leave it out, or use --recompute-granularity full."
            )
    modules = found.get("recompute_modules")
    if modules is None:
        return
    flag = told["recompute_modules"]
    if not modules or not set(modules) <= set(RECOMPUTE_MODULES):
        raise ConfigError(f"{flag} {_text(modules)} must name one or more of {one_of(RECOMPUTE_MODULES)}.")
    lacking = {
        "moe": model.num_experts is None and "has no experts",
        "shared_experts": model.moe_shared_expert_intermediate_size is None and "has no shared expert",
        "mlp": _all_with_experts(model) and "has experts in every layer",
    }
    for name in modules:
        if lacking.get(name):
            raise ConfigError(f"{flag} names {name}, and this model {lacking[name]}. Leave {name} out.")


def _all_with_experts(model: ModelConfig) -> bool:
    pattern = model.transformer_overrides.get("moe_layer_freq", 1)
    return model.num_experts is not None and not model.moe_first_k_dense and pattern in (1, [1] * model.num_layers)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
