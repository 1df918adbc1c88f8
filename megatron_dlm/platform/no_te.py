"""What megatron-core 0.16 needs in two places that it reaches without Transformer Engine, too, and leaves undefined."""

from __future__ import annotations


def install() -> None:
    """Define it, where Transformer Engine cannot be imported. Imports megatron-core."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    # A product that the router of experts asks for whether it is one of Transformer Engine's.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # Norms that are computed again ask Transformer Engine about FP8, unless they are told that there is none.
    if not random.HAVE_TE:
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
