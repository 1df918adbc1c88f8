"""A child that does not outlive the process that started it. Linux only, as the package is."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_PDEATHSIG = 1  # prctl's


def ends_with(parent: int) -> Callable[[], None]:
    """What a child of process `parent` calls first, to be killed when its parent ends, however that ends.

    Made before a fork and called after it, it loads nothing there. The kernel watches the thread that forked, so fork
    where the parent's life is decided: in its main thread.
    """
    library = ctypes.CDLL(None)

    def arrange() -> None:
        library.prctl(_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:  # it ended before that
            os._exit(1)

    return arrange
