"""A judge that does to its worker what the response says. Imported by worker processes."""

from __future__ import annotations

import os
import sys
import time

from megatron_dlm.rewards.base import Verdict


def judge(response: str, ground_truth: str, metadata: dict) -> Verdict:
    if response == "hang":
        while True:
            pass
    if response == "exit":
        os._exit(3)
    if response == "raise":
        raise ValueError("no")
    if response == "quit":
        sys.exit(0)
    if response == "eat":
        return Verdict(float(len(bytearray(1 << 40))), "memory")
    if response.startswith("sleep"):
        time.sleep(float(response.split()[1]))
    if response == "modules":
        return Verdict(0.0, " ".join(name for name in ("torch", "transformers", "pytest") if name in sys.modules))
    if response == "pid":
        return Verdict(0.0, str(os.getpid()))
    return Verdict(float(response == ground_truth), response)
