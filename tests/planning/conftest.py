"""Plans are made by processes that have joined no job; other tests of this process may have left it in one."""

from __future__ import annotations

import pytest

from tests.tiny import leave_job


@pytest.fixture(autouse=True)
def outside_of_any_job() -> None:
    leave_job()
