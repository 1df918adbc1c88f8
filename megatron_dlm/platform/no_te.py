"""What megatron-core 0.16 needs in two places that it reaches without Transformer Engine, too, and leaves undefined."""

from __future__ import annotations


def install() -> None:
    """Define it where megatron-core has not. Imports megatron-core."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    # The router of experts looks whether this name is None, and it is defined only where Transformer Engine has it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # Norms that are computed again ask Transformer Engine about FP8, unless they are told that there is none.
    if not random.HAVE_TE:
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
