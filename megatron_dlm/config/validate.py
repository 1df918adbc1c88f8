"""What cannot work together, refused before anything is built.

Pure functions: settings in, nothing out, or one `ConfigError` sentence that names the flags, their values, and what to
do. They look at values only: no file, no device, no process group. The model's settings must be resolved (preset
merged) first. The checks of training and generation are in `validate_training`, those
of the engine's layout in `validate_rollout`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name, one_of
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.overrides import check_overrides
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.validate_experts import check_experts
from megatron_dlm.config.validate_fp8 import check_fp8
from megatron_dlm.config.validate_loss import check_loss_head
from megatron_dlm.config.validate_recompute import check_recompute

READ = (
    ("sft", "data_path"),
    ("rl", "prompt_data"),
    ("eval", "eval_prompt_data"),
    ("generate", "prompts"),
    ("score", "input"),
    ("preprocess", "input"),
    ("trace", "input"),
)
WRITTEN = (
    ("logging", "metrics_jsonl"),
    ("eval", "save_eval_samples"),
    ("generate", "output"),
    ("score", "output"),
    ("preprocess", "output"),
    ("trace", "output"),
)
LOWEST_TEMPERATURE = 1e-4
LONGEST_TIMEOUT = 10**6  # minutes, about two years


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse what a launcher says about this job if it cannot be so; torch would wait in vain, or stumble.

    Args:
        environment: of the process. Without RANK and WORLD_SIZE it is a job of one process.
    """
    if "LOCAL_RANK" in environment:
        _number_of(environment, "LOCAL_RANK")
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ConfigError(
                f"{name} is not set, and other variables of a launcher are. Start the job with torchrun, or unset RANK "
                "and WORLD_SIZE to run one process."
            )
    rank, world, _ = (_number_of(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if world < 1:
        raise ConfigError(f"WORLD_SIZE is {world}. Start the job with torchrun, which counts its processes.")
    if not 0 <= rank < world:
        raise ConfigError(
            f"RANK is {rank}, and WORLD_SIZE {world}. Give each of the {world} processes a rank from 0 to {world - 1}, "
            "as torchrun does."
        )
    port = environment["MASTER_PORT"]
    if not 0 < int(port) < 2**16:
        raise ConfigError(f"MASTER_PORT is {port}. Use a free port from 1 to {2**16 - 1}.")


def _number_of(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(
            f"{name} is {environment[name]!r}, not a whole number. Start the job with torchrun, which sets it."
        ) from None


def check_model(model: ModelConfig) -> None:
    """Refuse a shape that no transformer can have, and overrides that would contradict a flag."""
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(model, name) is None:
            raise ConfigError(f"The model has no {flag_name(name)}. Give it, or name a --model-preset.")
    at_least(
        model,
        1,
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "max_position_embeddings",
        "vocab_size",
        "make_vocab_size_divisible_by",
        "num_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "block_size",
    )
    above(model, 0, "rotary_base", "norm_epsilon", "moe_router_topk_scaling_factor")
    at_least(model, 0, "init_method_std", "moe_first_k_dense")
    within(model, 0, 1, "rotary_percent", low_open=True)
    within(model, 0, 1, "logit_shift")
    heads, groups = model.num_attention_heads, model.num_query_groups
    if groups is not None and heads % groups:
        raise ConfigError(
            f"--num-query-groups {groups} does not divide the {heads} attention heads of this model. "
            f"Use {_divisors(heads)}."
        )
    if model.kv_channels is None and model.hidden_size % heads:
        raise ConfigError(
            f"--num-attention-heads {heads} does not divide --hidden-size {model.hidden_size}. "
            "Give the width of a head with --kv-channels."
        )
    if model.kv_channels is not None and model.kv_channels % 2:
        raise ConfigError(
            f"A head of {model.kv_channels} channels is odd, and rotary positions turn channels in pairs. Give an even "
            "number with --kv-channels."
        )
    if model.kv_channels is not None and model.rotary_percent is not None:
        turned = int(model.kv_channels * model.rotary_percent)
        if turned % 2 or not turned:
            raise ConfigError(
                f"--rotary-percent {model.rotary_percent} of the {model.kv_channels} channels of a head are {turned}, "
                "and rotary positions turn channels in pairs. Use a part that gives an even number."
            )
    if model.full_attention and model.block_size is not None:
        raise ConfigError(
            f"--block-size {model.block_size} does not go with full attention, where the whole text is one block. "
            "Leave it out, or add --no-full-attention."
        )
    if model.bf16 and model.fp64:
        raise ConfigError("--bf16 and --fp64 are two precisions. Leave one of the two out.")
    check_experts(model)
    check_overrides(model)


def check_parallel(parallel: ParallelConfig, model: ModelConfig, world_size: int) -> None:
    """Refuse a split of the model that does not come out even on `world_size` processes. `model` has been checked."""
    at_least(
        parallel,
        1,
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "context_parallel_size",
    )
    at_least(parallel, 2, "num_virtual_stages_per_pipeline_rank")
    at_least(parallel, 0, "loss_chunk_size")
    check_loss_head(parallel, model)
    within(parallel, 1, LONGEST_TIMEOUT, "distributed_timeout_minutes")
    within(parallel, 0, 60 * LONGEST_TIMEOUT, "host_timeout_seconds")
    _check_tensor_parallel(parallel, model)
    stages, layers = parallel.pipeline_model_parallel_size, model.num_layers
    if layers % stages:
        raise ConfigError(
            f"--pipeline-model-parallel-size {stages} does not divide the {layers} layers of this model. "
            f"Use {_divisors(layers)}."
        )
    _check_virtual_stages(parallel, layers)
    _check_context_parallel(parallel, model)
    _check_expert_parallel(parallel, model)
    _check_world(parallel, world_size)
    check_recompute(parallel, model)
    check_fp8(parallel, model)
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and not getattr(parallel, name):
            raise ConfigError(
                f"--overlap-param-gather needs {flag_name(name)}. Add it, or leave --overlap-param-gather out."
            )


def check_tensor_size(size: int, model: ModelConfig, flag: str) -> None:
    """Refuse a tensor-parallel size, named by `flag`, that does not divide what is split."""
    heads = model.num_attention_heads
    if heads % size:
        raise ConfigError(
            f"{flag} {size} does not divide the {heads} attention heads of this model. Use {_divisors(heads)}."
        )
    groups = heads if model.num_query_groups is None else model.num_query_groups
    if groups % size and size % groups:  # more processes than groups works: each group is then kept by several of them
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
        raise ConfigError(
            f"{flag} {size} neither divides the {groups} query groups of this model nor is a multiple of them. "
            f"Use {one_of(fitting)}."
        )
    if model.ffn_hidden_size is not None and model.ffn_hidden_size % size:
        raise ConfigError(
            f"{flag} {size} does not divide --ffn-hidden-size {model.ffn_hidden_size}. "
            f"Use {_divisors(math.gcd(heads, model.ffn_hidden_size))}."
        )
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None and shared % size:
        raise ConfigError(
            f"{flag} {size} does not divide --moe-shared-expert-intermediate-size {shared}. Use "
            f"{_divisors(math.gcd(heads, shared))}."
        )
    multiple = model.make_vocab_size_divisible_by
    padded = multiple if model.vocab_size is None else math.ceil(model.vocab_size / multiple) * multiple
    if padded % size:
        raise ConfigError(
            f"{flag} {size} does not divide the vocabulary, which is padded to a multiple of {multiple}. "
            f"Use --make-vocab-size-divisible-by {math.lcm(multiple, size)}."
        )


def _check_tensor_parallel(parallel: ParallelConfig, model: ModelConfig) -> None:
    size = parallel.tensor_model_parallel_size
    check_tensor_size(size, model, "--tensor-model-parallel-size")
    if parallel.sequence_parallel and size == 1:
        raise ConfigError(
            "--sequence-parallel needs --tensor-model-parallel-size 2 or more, not 1. "
            "Raise it, or leave --sequence-parallel out."
        )
    if model.num_experts is not None and size > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"A model with experts on --tensor-model-parallel-size {size} needs --sequence-parallel. Add it."
        )


def _check_virtual_stages(parallel: ParallelConfig, layers: int) -> None:
    stages, parts = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if parts is None:
        return
    if stages == 1:
        raise ConfigError(
            f"--num-virtual-stages-per-pipeline-rank {parts} needs --pipeline-model-parallel-size 2 or more, not 1. "
            "Raise it, or leave the virtual stages out."
        )
    if layers // stages % parts:
        raise ConfigError(
            f"--num-virtual-stages-per-pipeline-rank {parts} does not divide the {layers // stages} layers of a "
            f"pipeline stage. Use {_divisors(layers // stages)}."
        )


def _check_context_parallel(parallel: ParallelConfig, model: ModelConfig) -> None:
    size = parallel.context_parallel_size
    if size > 1 and model.full_attention:
        raise ConfigError(
            f"--context-parallel-size {size} shares rows out by their noisy copies of single blocks, and a model with "
            "full attention has copies of the whole text only. Use 1: more data-parallel processes share them out, too."
        )


def _check_expert_parallel(parallel: ParallelConfig, model: ModelConfig) -> None:
    size, shard, tensor = (
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
        parallel.tensor_model_parallel_size,
    )
    if model.num_experts is None:
        if size > 1:
            raise ConfigError(
                f"--expert-model-parallel-size {size} needs a model with experts. Use 1, or give --num-experts."
            )
        if shard is not None:
            raise ConfigError(
                f"--expert-tensor-parallel-size {shard} needs a model with experts. "
                "Leave it out, or give --num-experts."
            )
        return
    if model.num_experts % size:
        raise ConfigError(
            f"--expert-model-parallel-size {size} does not divide the {model.num_experts} experts of "
            f"this model. Use {_divisors(model.num_experts)}."
        )
    if size == 1 and shard not in (None, tensor):  # megatron-core would never reduce the experts' gradients
        raise ConfigError(
            f"--expert-tensor-parallel-size {shard} differs from --tensor-model-parallel-size {tensor} "
            f"without expert parallelism. Use {tensor}, or --expert-model-parallel-size 2 or more."
        )
    shard = tensor if shard is None else shard
    if model.moe_ffn_hidden_size is not None and model.moe_ffn_hidden_size % shard:
        raise ConfigError(
            f"Experts of width {model.moe_ffn_hidden_size} (--moe-ffn-hidden-size) do not split over "
            f"{shard} processes. Give an --expert-tensor-parallel-size that divides the width."
        )


def _check_world(parallel: ParallelConfig, world_size: int) -> None:
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    if world_size % (tensor * context * stages):
        shared = f"--context-parallel-size {context} x " if context > 1 else ""
        raise ConfigError(
            f"{world_size} processes cannot be split into --tensor-model-parallel-size {tensor} x {shared}"
            f"--pipeline-model-parallel-size {stages}. Start a multiple of {tensor * context * stages}."
        )
    experts = parallel.expert_model_parallel_size
    shard = tensor if parallel.expert_tensor_parallel_size is None else parallel.expert_tensor_parallel_size
    if world_size % (experts * shard * stages):
        raise ConfigError(
            f"{world_size} processes cannot be split into --expert-model-parallel-size {experts} x "
            f"{shard} processes per expert x {stages} pipeline stages. "
            f"Start a multiple of {math.lcm(tensor * context * stages, experts * shard * stages)}."
        )


def check_files(config: Mapping[str, Any]) -> None:
    """Refuse a file to write that is also read, or written twice: it would be spoiled.

    Args:
        config: section name -> its settings.
    """
    taken: dict[str, str] = {}
    for section, name in READ:
        given = getattr(config.get(section), name, None) or []
        taken.update(
            (os.path.realpath(path), flag_name(name)) for path in ([given] if isinstance(given, str) else given)
        )
    for section, name in WRITTEN:
        given = getattr(config.get(section), name, None)
        if given is not None:
            other = taken.setdefault(os.path.realpath(given), flag_name(name))
            if other != flag_name(name):
                raise ConfigError(f"{flag_name(name)} {given} is the file that {other} names. Give another name.")


def check_temperature(config: Any, name: str) -> None:
    """Refuse temperatures below 0, and those so near to it that dividing by them leaves no number."""
    at_least(config, 0, name)
    value = getattr(config, name)
    if value is not None and 0 < value < LOWEST_TEMPERATURE:
        raise ConfigError(
            f"{flag_name(name)} is {value}. Use 0 for the likeliest token, or at least {LOWEST_TEMPERATURE}."
        )


def at_least(config: Any, lowest: float, *names: str) -> None:
    """Refuse fields below `lowest`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise ConfigError(f"{flag_name(name)} is {value}. Use {lowest} or more.")


def above(config: Any, bound: float, *names: str) -> None:
    """Refuse fields that are not greater than `bound`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= bound:
            raise ConfigError(f"{flag_name(name)} is {value}. Use a value above {bound}.")


def within(config: Any, low: float, high: float, *names: str, low_open: bool = False, high_open: bool = False) -> None:
    """Refuse fields outside the interval; an open end is itself refused; None passes."""
    interval = f"{'above' if low_open else 'from'} {low} {'to below' if high_open else 'to'} {high}"
    for name in names:
        value = getattr(config, name)
        at_end = (value == low and not low_open) or (value == high and not high_open)
        inside = value is None or at_end or low < value < high
        if not inside:
            raise ConfigError(f"{flag_name(name)} is {value}. Use a value {interval}.")


def needs_data(sources: list[str], flag: str, noun: str) -> None:
    """Refuse a list of sources that is empty."""
    if not sources:
        raise ConfigError(f"{flag} names no {noun}. Give at least one.")


def needs(config: Any, name: str, other: str, why: str) -> None:
    """Refuse `name` being given (not None, not False) while `other` is not."""
    given, missing = getattr(config, name), getattr(config, other)
    if not (given is None or given is False) and (missing is None or missing is False):  # 0 is given
        raise ConfigError(f"{flag_name(name)} needs {flag_name(other)}, {why}. Give both or neither.")


def only_with(config: Any, name: str, other: str) -> None:
    """Refuse a field that is not what it is by default, because without `other`, a flag, nothing reads it."""
    value = getattr(config, name)
    if value != getattr(type(config)(), name):
        raise ConfigError(f"{flag_name(name)} {value} does nothing without {other}. Leave it out, or add {other}.")


def fits_positions(tokens: int, what: str, model: ModelConfig) -> None:
    """Refuse more positions than the model has. `what`: asks for them."""
    longest = model.max_position_embeddings
    if longest is not None and tokens > longest:
        raise ConfigError(
            f"{what}: {tokens} positions are needed, and this model has {longest} (--max-position-embeddings). "
            f"Use at most {longest}."
        )


def _divisors(number: int) -> str:
    """The divisors of a number as words; only the smallest twelve, for a sentence should not list fifty."""
    return one_of([n for n in range(1, number + 1) if number % n == 0][:12])
