"""Transformer Engine as megatron-core sees it, in plain torch: the modules, and what is known of FP8 while they run.

Products are not rounded to FP8; weights are, where they are kept so. Each product notes whether it ran in an FP8
context and under which recipe (`ran` of the module), and refuses the shapes that FP8 products refuse. In such a context
it reads a copy of its weight, which is as old as its caller lets it be.
"""

from . import common, pytorch

__version__ = "2.6.0"
__all__ = ["common", "pytorch"]
