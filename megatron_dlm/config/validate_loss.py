"""What the loss head cannot do."""

from __future__ import annotations

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig


def check_loss_head(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Refuse kernels for logits that they have no part in."""
    if parallel.loss_head == "triton" and (model.fp64 or not parallel.loss_chunk_size):
        other = "--fp64" if model.fp64 else "--loss-chunk-size 0"
        raise ConfigError(
            f"--loss-head triton does not work with {other}: its kernels take parts of the logits, in float32 at most. "
            "Leave one of the two out."
        )
