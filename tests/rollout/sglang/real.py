"""Run in an interpreter that can import SGLang: its real classes with what this package hangs on them.

python real.py CASE
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

MASK, SIZE, BLOCK = 9, 16, 4


def loaded():
    """As SGLang's processes begin."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


def registered() -> None:
    """The entry point is found, the algorithm is in the table and the hooks are where they belong."""
    loaded()
    from sglang.srt.dllm.algorithm import algo_name_to_cls
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm
    from sglang.srt.dllm.config import DllmConfig
    from sglang.srt.dllm.mixin.scheduler import SchedulerDllmMixin
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.plugins.hook_registry import HookRegistry

    from megatron_dlm.rollout.sglang.plugin import check_targets

    check_targets()
    assert issubclass(algo_name_to_cls["MegatronDLM"], DllmAlgorithm)
    assert len([target for target in HookRegistry._patched if "dllm" in target]) == 3
    for function in (
        DllmConfig.from_server_args,
        TpModelWorker._forward_batch_generation_dllm,
        SchedulerDllmMixin.process_batch_result_dllm,
    ):
        assert hasattr(function, "__wrapped__"), function


def config():
    from sglang.srt.dllm.config import DllmConfig

    settings = {"vocabulary_size": MASK + 1, "mask_id": MASK, "block_size": BLOCK}
    return DllmConfig("MegatronDLM", settings, BLOCK, MASK, 8, first_done_first_out_mode=True)


def request(prompt: list[int], stream: int, **sampling: object):
    from megatron_dlm.diffusion.trace import SamplingParams
    from megatron_dlm.rollout.sglang.wire import Rules

    rules = Rules.of(SamplingParams(**sampling), stream)
    return SimpleNamespace(
        dllm_incomplete_ids=[],
        dllm_algo_state=None,
        dllm_block_offset=len(prompt) // BLOCK * BLOCK,
        sampling_params=SimpleNamespace(custom_params=rules.to_wire()),
        origin_input_ids=prompt,
        extend_end=len(prompt) // BLOCK * BLOCK + BLOCK,
        customized_info=None,
    )


def runs() -> None:
    """The class under the base class's own loop, with a model of random logits: two requests of different kinds, from
    masks to the payload, with the records that `denoise` gives alone.
    """
    loaded()
    from sglang.srt.dllm.algorithm import get_algorithm

    from megatron_dlm.model.policy import Vocabulary
    from megatron_dlm.rollout.sglang import plugin
    from megatron_dlm.rollout.sglang.denoise import denoise

    generator = torch.Generator().manual_seed(1)
    fixed = torch.randn(2 * BLOCK, SIZE, generator=generator)
    forward = lambda batch, pp_proxy_tensors=None: SimpleNamespace(
        logits_output=SimpleNamespace(full_logits=fixed), can_run_graph=False
    )
    algorithm = get_algorithm(config())
    wanted = [request([1, 2, 3, 4, 5, 6], 11, temperature=0.7), request([1, 2], 12, remasking="sequential", top_p=0.8)]
    ids = torch.tensor([5, 6, MASK, MASK, 1, 2, MASK, MASK])
    batch = SimpleNamespace(input_ids=ids.clone(), batch_size=2, dllm_prompt_mask=None)
    worker, reqs = SimpleNamespace(dllm_algorithm=algorithm), SimpleNamespace(reqs=wanted)
    alone, plain = [plugin.state_of(one, BLOCK) for one in wanted], ids.view(2, BLOCK).clone()
    for _ in range(6):
        plugin.give_states(worker, batch, reqs)
        states = [one.dllm_algo_state for one in wanted]
        _, next_ids, lengths, out, _ = algorithm.run(SimpleNamespace(forward=forward), batch, states)
        expected = denoise(plain, plain == MASK, fixed, alone, Vocabulary(MASK + 1, MASK))
        assert next_ids == plain.tolist() and [bool(length) for length in lengths] == expected
        result = SimpleNamespace(accept_length_per_req_cpu=lengths, dllm_algo_state=out, next_token_ids=next_ids)
        for one in wanted:
            one.customized_info = None
        plugin.take_blocks(None, reqs, result)
        for one, state, tokens in zip(wanted, out, next_ids):
            one.dllm_algo_state, one.dllm_incomplete_ids = state, tokens  # as the scheduler does while unfinished
        if all(lengths):
            break
    assert all(lengths)
    for one, state, tokens in zip(wanted, alone, plain.tolist()):
        (first, *rest) = one.customized_info["megatron_dlm"]
        assert first == state.finished(tokens).to_wire() and MASK not in first["ids"]
        assert rest == [None] * (one.extend_end - len(one.origin_input_ids) - 1)
        assert one.megatron_dlm_taken == state.in_block > 0


def own_mask() -> None:
    """The mask token of SGLang's table gives way to that of the settings; other algorithms keep theirs."""
    from megatron_dlm.rollout.sglang.plugin import use_own_mask

    made = config()
    made.mask_id = 151669
    assert use_own_mask(made).mask_id == MASK
    made.algorithm, made.mask_id = "LowConfidence", 151669
    assert use_own_mask(made).mask_id == 151669 and use_own_mask(None) is None


def buckets() -> None:
    """A bucket in a file in memory, through our payload and SGLang's own reading, is the tensors again."""
    import os

    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    from megatron_dlm.rollout.sglang.tensors import payloads

    made = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 2).double(),
        "d": torch.arange(4.0),
    }
    fd, described, end = os.memfd_create("test"), [], 0
    for name, value in made.items():
        start = -(-end // 16) * 16
        end = start + value.nbytes
        os.pwrite(fd, bytes(value.view(torch.uint8).flatten().numpy()), start)
        dtype = str(value.dtype).removeprefix("torch.")
        described.append({"name": name, "dtype": dtype, "shape": list(value.shape), "start": start, "end": end})
    for text in payloads(described, {"fd": fd, "bytes": end}, 2):
        found = MultiprocessingSerializer.deserialize(text)
        bucket = FlattenedTensorBucket(flattened_tensor=found["flattened_tensor"], metadata=found["metadata"])
        got = dict(bucket.reconstruct_tensors())
        assert got.keys() == made.keys() and all(torch.equal(got[name], made[name]) for name in made)


def handles() -> None:
    """A handle of another process goes on unopened, in the form that SGLang's safe reader admits."""
    import base64

    from sglang.srt.utils import common, patch_torch

    from megatron_dlm.rollout.sglang.tensors import payloads

    opened = []
    patch_torch._rebuild_cuda_tensor_modified = lambda *arguments: opened.append(arguments) or torch.zeros(8)
    patch_torch._rebuild_cuda_tensor_modified.__module__ = "sglang.srt.utils.patch_torch"
    patch_torch._rebuild_cuda_tensor_modified.__qualname__ = "_rebuild_cuda_tensor_modified"
    code = lambda one: {"bytes": base64.b64encode(one).decode()}
    handle = [[8], [1], 0, "GPU-1", code(b"memory"), 8, 0, code(b"counter"), 3, code(b"event"), True]
    described = [{"name": "a", "dtype": "float32", "shape": [2], "start": 0, "end": 8}]
    (text,) = payloads(described, {"handles": [handle]}, 1)
    assert not opened
    found = common.MultiprocessingSerializer.deserialize(text)
    assert torch.equal(found["flattened_tensor"], torch.zeros(8))
    kind, size, stride, offset, storage, dtype, device, memory, *rest = opened[0]
    assert (kind, size, stride, offset, dtype) == (torch.Tensor, torch.Size([8]), (1,), 0, torch.uint8)
    assert (storage, device, memory) == (torch.storage.TypedStorage, "GPU-1", b"memory")
    assert rest == [8, 0, False, b"counter", 3, b"event", True]


if __name__ == "__main__":
    {one.__name__: one for one in (registered, runs, own_mask, buckets, handles)}[sys.argv[1]]()
    print("passed")
