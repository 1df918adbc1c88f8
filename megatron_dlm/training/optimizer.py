"""The optimizer of a model and the schedule of its learning rate and weight decay: megatron-core's, from our settings.

Two groups of parameters: those whose weights decay and those whose do not. Norms and biases do not, which is
megatron-core's own rule; with --no-weight-decay-embeddings neither does the embedding table. Low-rank adapters are
matrices like others, and frozen parameters are in no group.

Invariant (tests/training/test_optimizer.py): rate and decay of each step are those of a formula written by hand, also
in a run that is resumed, whatever the checkpoint says about them.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from torch import nn

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.optimizer import OptimizerConfig, warmup_steps
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.validate_schedule import check_length
from megatron_dlm.parallel.groups import Groups
from megatron_dlm.training.host_optimizer import keep_on_host

_MAKERS = {"torch": "torch", "transformer_engine": "Transformer Engine", "apex": "Apex", "megatron": "megatron-core"}


def build_optimizer(
    chunks: list[DistributedDataParallel],
    config: TransformerConfig,
    wanted: OptimizerConfig,
    parallel: ParallelConfig,
    groups: Groups,
) -> MegatronOptimizer:
    """The optimizer of all chunks of a model. Collective.

    Raises:
        ConfigError: a distributed optimizer other than Adam.
    """
    if parallel.use_distributed_optimizer and wanted.optimizer != "adam":
        raise ConfigError(
            f"--use-distributed-optimizer works with --optimizer adam only, not {wanted.optimizer}. Drop one of the "
            "two."
        )
    known = {field.name for field in dataclasses.fields(MegatronOptimizerConfig)}
    ours = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(wanted) if field.name in known}
    # The norm is computed only for clipping; a limit that is never reached yields it and clips nothing.
    ours["clip_grad"] = wanted.clip_grad or float("inf")
    megatron = MegatronOptimizerConfig(
        **ours,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=config.fp8_recipe if config.fp8 is not None else None,
    )
    if wanted.optimizer_cpu_offload:
        keep_on_host(megatron)
    return get_megatron_optimizer(
        megatron,
        chunks,
        **(_embeddings_do_not_decay() if wanted.no_weight_decay_embeddings else {}),
        use_gloo_process_groups=False,
        pg_collection=groups.pg_collection,
    )


def build_scheduler(optimizer: MegatronOptimizer, wanted: OptimizerConfig, train_iters: int) -> OptimizerParamScheduler:
    """Learning rate and weight decay of each step, set in the optimizer's groups at once.

    Args:
        train_iters: steps of the run, over which weight decay increases; the length of the learning-rate schedule
            unless `lr_decay_iters` says otherwise.

    Raises:
        ConfigError: the warm-up, or a WSD schedule's end, does not fit into the schedule.
    """
    check_length(wanted, train_iters, "the learning-rate schedule")
    steps = wanted.lr_decay_iters or max(1, train_iters)
    increases = wanted.weight_decay_incr_style != "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=wanted.lr_warmup_init,
        max_lr=wanted.lr,
        min_lr=wanted.min_lr,
        lr_warmup_steps=warmup_steps(wanted, steps),
        lr_decay_steps=steps,
        lr_decay_style=wanted.lr_decay_style,
        start_wd=wanted.start_weight_decay if increases else wanted.weight_decay,
        end_wd=wanted.end_weight_decay if increases else wanted.weight_decay,
        wd_incr_steps=max(1, train_iters),
        wd_incr_style=wanted.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        # A resumed run keeps its place in the schedule, and follows the flags of today.
        override_opt_param_scheduler=True,
        wsd_decay_steps=wanted.lr_wsd_decay_iters,
        lr_wsd_decay_style=wanted.lr_wsd_decay_style,
    )


def whose(optimizer: MegatronOptimizer) -> str:
    """Whose code updates the weights: megatron-core takes the fused one of Transformer Engine if that can be imported,
    else that of Apex, else torch's. (Of an optimizer in host memory it is megatron-core's own, over these.)
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:  # a rank may have no parameter for one of them
            kind = type(part.optimizer)
            return f"{kind.__name__} of {_MAKERS.get(kind.__module__.partition('.')[0], kind.__module__)}"
    return "nothing"


def forget_stored_rates(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
    """After groups came from a checkpoint: the bounds of their learning rates are again those of this run."""
    for group in optimizer.param_groups:
        for name in ("max_lr", "min_lr"):
            if name in group:
                group[name] = getattr(scheduler, name)


def _is_embedding(parameter: nn.Parameter, name: str) -> bool:
    """Whether it is the embedding table, or the last pipeline stage's copy of a tied one."""
    return name.endswith("word_embeddings.weight") or getattr(parameter, "shared_embedding", False)


def _embeddings_do_not_decay() -> dict[str, Any]:
    """The argument of megatron-core by which more than its own choice does not decay. Releases before 0.16 ask a
    function; later ones take overrides by key, which replace their own.
    """
    if "no_weight_decay_cond" in inspect.signature(get_megatron_optimizer).parameters:
        return {
            "no_weight_decay_cond": lambda name, parameter: (
                name.endswith(".bias") or parameter.dim() == 1 or _is_embedding(parameter, name)
            )
        }
    from megatron.core.optimizer import get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    table = ParamKey(with_name_predicate=ParamWithNamePredicate(name="embedding", fn=_is_embedding))
    return {"config_overrides": {**get_standard_config_overrides(MegatronOptimizerConfig()), table: {"wd_mult": 0.0}}}
