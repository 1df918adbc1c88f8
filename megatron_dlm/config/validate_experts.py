"""What a mixture of experts cannot be, refused before anything is built; `validate.check_model` asks."""

from __future__ import annotations

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.model import ModelConfig

GROUP_SCORE = 2  # a group counts as much as its best so many experts together

_OF_EXPERTS = (
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_first_k_dense",
    "moe_shared_expert_intermediate_size",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
)


def check_experts(model: ModelConfig) -> None:
    """Refuse experts, or a router, that cannot be. Sizes below their lowest value have been refused."""
    experts, best = model.num_experts, model.moe_router_topk
    if experts is None:
        _refuse_without_experts(model)
        return
    if best is None:
        raise ConfigError(
            f"--num-experts {experts} needs --moe-router-topk, how many experts each token goes to. Give both or "
            "neither."
        )
    if best > experts:
        raise ConfigError(
            f"--moe-router-topk {best} is more than the {experts} experts of this model. Use at most {experts}."
        )
    if model.moe_first_k_dense is not None and model.moe_first_k_dense >= model.num_layers:
        raise ConfigError(
            f"--moe-first-k-dense {model.moe_first_k_dense} leaves none of the {model.num_layers} layers with experts. "
            f"Use at most {model.num_layers - 1}, or leave the experts out."
        )
    if model.moe_router_enable_expert_bias and model.moe_router_score_function != "sigmoid":
        raise ConfigError(
            "--moe-router-enable-expert-bias works with --moe-router-score-function sigmoid only, not "
            f"{model.moe_router_score_function or 'softmax'}. Give sigmoid, or leave the bias out."
        )
    _check_groups(model)
    _check_pattern(model)


def _refuse_without_experts(model: ModelConfig) -> None:
    for name in _OF_EXPERTS:
        value = getattr(model, name)
        if value is None or (name == "moe_ffn_hidden_size" and value == model.ffn_hidden_size):
            continue  # a resolved dense model may repeat its width
        raise ConfigError(
            f"{flag_name(name)} {value} is for a model with experts. Give --num-experts too, or leave it out."
        )


def _check_groups(model: ModelConfig) -> None:
    """megatron-core scores a group by its best topk // group_topk experts; the models that have groups, by two."""
    groups, chosen, best = model.moe_router_num_groups, model.moe_router_group_topk, model.moe_router_topk
    if (groups is None) != (chosen is None):
        given, missing = ("num_groups", "group_topk") if chosen is None else ("group_topk", "num_groups")
        raise ConfigError(
            f"{flag_name(f'moe_router_{given}')} needs {flag_name(f'moe_router_{missing}')}. Give both or neither."
        )
    if groups is None:
        return
    if model.num_experts % groups:
        raise ConfigError(
            f"--moe-router-num-groups {groups} does not divide the {model.num_experts} experts of this model. Use a "
            "number that does."
        )
    if chosen > groups:
        raise ConfigError(
            f"--moe-router-group-topk {chosen} is more than the {groups} groups of experts. Use at most {groups}."
        )
    size = model.num_experts // groups
    if size < GROUP_SCORE or best > chosen * size:
        raise ConfigError(
            f"--moe-router-topk {best} experts are chosen from {chosen} groups, and {model.num_experts} experts in "
            f"{groups} groups are {size} in each, which is too few. Use fewer groups."
        )
    if best // chosen != GROUP_SCORE:
        raise ConfigError(
            f"--moe-router-topk {best} and --moe-router-group-topk {chosen} do not go together, because groups are "
            f"compared by their best {GROUP_SCORE} experts. Choose {GROUP_SCORE} experts per group: "
            f"--moe-router-topk {GROUP_SCORE * chosen}."
        )


def _check_pattern(model: ModelConfig) -> None:
    flag, pattern = "--transformer-override moe_layer_freq", model.transformer_overrides.get("moe_layer_freq")
    if pattern is None:
        return
    if model.moe_first_k_dense:
        raise ConfigError(
            f"{flag} and --moe-first-k-dense both say which layers have experts. Leave one of the two out."
        )
    if isinstance(pattern, list) and (len(pattern) != model.num_layers or not set(pattern) <= {0, 1}):
        raise ConfigError(
            f"{flag} {pattern} does not say 0 or 1 for each of the {model.num_layers} layers. Give a list with an "
            "entry per layer."
        )
    if isinstance(pattern, int) and pattern < 1:
        raise ConfigError(f"{flag} is {pattern}. Use 1 or more.")
