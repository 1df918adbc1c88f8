"""Read by Python when it starts, in processes that `python -m tests.pretend_gpu.run` has begun."""

import os
import sys

_HELPERS = ["multiprocessing.resource_tracker", "torch._inductor.compile_worker"]
if os.environ.get("PRETEND_GPU") != "in workers too":
    _HELPERS.append("multiprocessing.spawn")  # readers of data, writers of checkpoints
_wanted = os.environ.get("PRETEND_GPU") and os.environ.get("CUDA_VISIBLE_DEVICES") != ""  # "" shows a process no GPU

if _wanted and not any(name in word for word in sys.orig_argv for name in _HELPERS):
    from tests.pretend_gpu.install import install

    install()
