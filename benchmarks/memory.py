"""Peak memory of a piece of work.

On CUDA that is what torch's allocator handed out at most. On the CPU it is the process's anonymous memory, read from
the kernel every few milliseconds: files that are mapped (libraries, safetensors) are left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
from pathlib import Path

import torch

from megatron_dlm import platform

_INTERVAL = 0.003  # seconds


class Peak:
    """A context manager around the work; afterwards `bytes` is the peak above what was in use at its start."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if platform.is_cuda():
            platform.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        _trim()
        self._start = self._highest = anonymous_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._highest = max(self._highest, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        if platform.is_cuda():
            platform.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._start
            return
        self._done.set()
        self._watcher.join()
        self.bytes = max(self._highest, anonymous_bytes()) - self._start


class HighWater(Peak):
    """A `Peak` for work that maps no files: on the CPU the kernel itself says what was in use at most, so that nothing
    of it is missed where others keep the machine busy (Linux, where a process may reset that mark).
    """

    def __enter__(self) -> HighWater:
        if platform.is_cuda():
            super().__enter__()
            return self
        gc.collect()
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is in use now
        self._start = _status("VmHWM")
        return self

    def __exit__(self, *failure: object) -> None:
        if platform.is_cuda():
            super().__exit__(*failure)
            return
        self.bytes = _status("VmHWM") - self._start


def anonymous_bytes() -> int:
    """Anonymous memory of this process that is in RAM (Linux)."""
    return _status("RssAnon")


def _status(field: str) -> int:
    """Bytes that the kernel reports of this process under a name."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _trim() -> None:
    """Give freed memory back to the system, so that earlier work does not hide in the starting level."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
