"""A child that answers like the real one: the loop and the protocol are the product's, the engine is the naive model.

python -m tests.rollout.sglang.fake_server WAY FD FOLDER     where WAY is serve, refuse, die or hang
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import sys
import time
from pathlib import Path

import torch

from megatron_dlm.rollout.sglang.denoise import BlockState, denoise
from megatron_dlm.rollout.sglang.protocol import Link
from megatron_dlm.rollout.sglang.server import run
from megatron_dlm.rollout.sglang.wire import Rules
from tests.diffusion.oracles import MASK_ID


class FakeBackend:
    """Generates with a tiny model; keeps what it is told."""

    def __init__(self, settings: dict) -> None:
        from tests.tiny import make_model

        self.settings, self.loop, self.model = settings, asyncio.new_event_loop(), make_model(torch.float64)
        self.aborted: set[str] = set()
        self.calls: list[str] = []
        self.weights: dict[str, list] = {}

    async def generate(self, name: str, prompt: list[int], sampling: dict):
        from tests.rollout.sglang.test_denoise import logits_of
        from tests.tiny import vocabulary

        if prompt == [13, 1]:
            raise ValueError("an unlucky prompt")
        while prompt[:2] == [13, 2] and name not in self.aborted:  # one whose turn does not come
            await asyncio.sleep(0.002)
        block, rules = self.settings["block_size"], Rules.from_wire(sampling["custom_params"])
        start = len(prompt) // block * block
        text = prompt + [MASK_ID] * (start + block - len(prompt))
        state = BlockState(rules, start, rules.taken, block)
        while True:
            await asyncio.sleep(0.002)
            if name in self.aborted:
                return
            ids = torch.tensor([text[-block:]])
            (done,) = denoise(ids, ids == MASK_ID, logits_of(self.model, [text], block), [state], vocabulary())
            text[-block:] = ids[0].tolist()
            if not done:
                continue
            yield state.finished(text[-block:]).to_wire()
            new = text[len(prompt) :]
            stops = set() if sampling["ignore_eos"] else set(sampling["stop_token_ids"])
            if len(new) >= sampling["max_new_tokens"] or stops & set(new[: sampling["max_new_tokens"]]):
                return
            state = BlockState(rules, len(text), state.steps_taken, block)
            text += [MASK_ID] * block

    def abort(self, names: list[str]) -> None:
        self.aborted |= set(names)

    def call(self, command: str, message: dict) -> dict:
        self.calls.append(command)
        if command == "load":
            self._load(message)
        elif command == "told":  # for tests
            environment = {name: os.environ.get(name) for name in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
            return {"calls": self.calls, "weights": self.weights, "environment": environment, "pid": os.getpid()}
        elif command == "fail":
            raise ArithmeticError("as asked")
        elif command == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def describe(self) -> dict:
        return {"cache_tokens": 640}

    def shutdown(self) -> None:
        pass

    def _load(self, message: dict) -> None:
        buffers = message["buffers"]
        with mmap.mmap(buffers["fd"], buffers["bytes"], prot=mmap.PROT_READ) as view:
            for one in message["tensors"]:
                flat = torch.frombuffer(bytearray(view[one["start"] : one["end"]]), dtype=getattr(torch, one["dtype"]))
                if not flat.dtype.is_floating_point:
                    raise TypeError(one["name"])
                self.weights[one["name"]] = flat.view(one["shape"]).double().tolist()


def main(argv: list[str]) -> None:
    way, fd, folder = argv

    def make_backend(settings: dict) -> FakeBackend:
        if way == "hang":  # as one that is still loading
            time.sleep(600)
        if way == "die":
            print("a library is missing", file=sys.stderr, flush=True)
            os._exit(1)
        if way == "refuse":
            raise RuntimeError("no room on the device")
        assert Path(settings["model_folder"], "config.json").is_file()
        return FakeBackend(settings)

    run(Link.from_fd(int(fd)), Path(folder), make_backend)


if __name__ == "__main__":
    main(sys.argv[1:])
