"""SGLang's engine behind the commands of `server` (child)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from megatron_dlm.rollout.sglang.algorithm import NAME
from megatron_dlm.rollout.sglang.plugin import check_targets
from megatron_dlm.rollout.sglang.tensors import payloads
from megatron_dlm.rollout.sglang.wire import KEY

_KV = ["kv_cache"]  # SGLang's name for what a sleeping engine gives back


class SGLangBackend:
    """
    Args:
        settings: of the child (process.ChildSettings.to_wire).

    Raises:
        RuntimeError: this SGLang does not fit.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.plugins import load_plugins

        load_plugins()
        check_targets()
        self.tensor_parallel_size = int(settings["tensor_parallel_size"])
        self.on_cuda = bool(settings["cuda"])
        self.asleep = False
        options = dict(
            model_path=settings["model_folder"],
            load_format="dummy",  # the weights come from the trainer
            skip_tokenizer_init=True,
            dllm_algorithm=NAME,
            dllm_algorithm_config=settings["algorithm_file"],
            dtype=settings["dtype"],
            tp_size=self.tensor_parallel_size,
            context_length=int(settings["context_length"]),
            max_running_requests=int(settings["max_running_requests"]),
            mem_fraction_static=float(settings["mem_fraction_static"]),
            incremental_streaming_output=True,
            log_level="error",
        )
        if self.on_cuda:
            options |= dict(enable_memory_saver=True)
        else:
            options |= dict(
                device="cpu",
                attention_backend="torch_native",
                disable_cuda_graph=True,
                max_total_tokens=int(settings["context_length"]) * int(settings["max_running_requests"]),
            )
        self.engine = Engine(**options)
        self.loop: asyncio.AbstractEventLoop = self.engine.loop

    def describe(self) -> dict[str, Any]:
        """What the trainer wants to know: the tokens that the KV cache has room for."""
        return {"cache_tokens": int(self.engine._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"])}

    async def generate(self, name: str, prompt: list[int], sampling: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        stream = await self.engine.async_generate(input_ids=prompt, sampling_params=sampling, rid=name, stream=True)
        async for part in stream:
            meta = part["meta_info"]
            reason = meta["finish_reason"] or {}
            if reason.get("type") == "abort" and reason.get("status_code"):
                raise RuntimeError(reason.get("message") or "SGLang ended the request")
            for block in meta.get(KEY, ()):
                if block is not None:
                    yield block

    def abort(self, names: list[str]) -> None:
        for name in names:
            self.engine.tokenizer_manager.abort_request(name)

    def call(self, command: str, message: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, f"_{command}")(message) or {}

    def shutdown(self) -> None:
        self.engine.shutdown()

    def _begin_update(self, _: dict[str, Any]) -> None:
        self._must(self.engine.begin_weight_update())

    def _load(self, message: dict[str, Any]) -> None:
        for_ranks = payloads(message["tensors"], message["buffers"], self.tensor_parallel_size)
        answer = self.engine.update_weights_from_tensor(for_ranks, load_format="flattened_bucket", flush_cache=False)
        self._must(answer)

    def _end_update(self, _: dict[str, Any]) -> None:
        self._must(self.engine.end_weight_update())

    def _flush_cache(self, _: dict[str, Any]) -> None:
        self._must(self.engine.flush_cache())

    def _sleep(self, _: dict[str, Any]) -> None:
        self.engine.flush_cache()
        if self.on_cuda and not self.asleep:
            self.engine.release_memory_occupation(_KV)
        self.asleep = True

    def _wake(self, _: dict[str, Any]) -> None:
        if self.on_cuda and self.asleep:
            self.engine.resume_memory_occupation(_KV)
        self.asleep = False

    @staticmethod
    def _must(answer: Any) -> None:
        """SGLang tells of failures in its answers.

        Raises:
            RuntimeError: it does.
        """
        if isinstance(answer, tuple):
            success, text = answer[0], answer[1] if len(answer) > 1 else ""
        else:
            success, text = getattr(answer, "success", True), getattr(answer, "message", "")
        if success is False:
            raise RuntimeError(f"SGLang refused: {text}")
