"""Plans are made by processes that have joined no job; other tests of this process may have left it in one."""

from __future__ import annotations

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def outside_of_any_job() -> None:
    if dist.is_initialized():
        from megatron_dlm.parallel.groups import destroy
        from tests.tiny import one_process

        destroy()
        one_process.cache_clear()
