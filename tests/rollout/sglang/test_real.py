"""With SGLang's own classes, where there is an SGLang to import.

    MEGATRON_DLM_TEST_SGLANG=/path/to/site-packages      folders (with : between) that a child's path is given
    MEGATRON_DLM_TEST_SGLANG_PYTHON=/path/to/python      an interpreter whose SGLang can start an engine on this host's
                                                         CPU, which a plain installation cannot

The first is for the cases of real.py; the second for a whole engine against the naive one.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.rollout.sglang.process import link_package
from tests.rollout.naive import generate
from tests.rollout.sglang.test_denoise import SAMPLING, requests
from tests.tiny import disturb, make_session, make_state

FOLDERS = os.environ.get("MEGATRON_DLM_TEST_SGLANG")
PYTHON = os.environ.get("MEGATRON_DLM_TEST_SGLANG_PYTHON")


@pytest.mark.skipif(FOLDERS is None, reason="MEGATRON_DLM_TEST_SGLANG names no SGLang")
@pytest.mark.parametrize("case", ["registered", "runs", "own_mask", "buckets", "handles"])
def test_with_the_real_classes(case: str, tmp_path) -> None:
    link_package(tmp_path / "path")
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("real.py")), case],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), FOLDERS])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and ran.stdout.endswith("passed\n"), ran.stdout + ran.stderr


WAYS = {
    "greedy": dict(temperature=0.0),
    "sampled": {},
    "top-p": dict(temperature=0.8, top_p=0.7),
    "static": dict(remasking="static", denoising_steps=2),
    "sequential, top-k": dict(remasking="sequential", top_k=5),
    "never stops": dict(ignore_eos=True, max_new_tokens=20),
}


@pytest.mark.skipif(PYTHON is None or platform.is_cuda(), reason="MEGATRON_DLM_TEST_SGLANG_PYTHON names no SGLang")
@pytest.mark.parametrize("experts", [False, True])
def test_a_whole_engine_gives_the_tokens_of_the_naive_one(experts: bool) -> None:
    """In float32, so a draw within rounding of a boundary could differ; with these keys none is."""
    from megatron_dlm.rollout.sglang.opening import open_sglang

    shape = dict(kv_channels=16, rotary_base=3e5)
    if experts:
        shape |= dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32)
    session, state = make_session(**shape), make_state(torch.float32, **shape)
    rollout = RolloutConfig(rollout_backend="sglang", sglang_python=PYTHON, max_running_requests=8)
    engine, refit = open_sglang(session, state, session.groups, rollout, 40)
    try:
        for seed in (0, 7):
            with torch.no_grad():
                disturb(state.module, seed)
            refit.run()
            engine.drop_cache()
            engine.weight_version += 1
            for changes in WAYS.values():
                wanted = requests(dataclasses.replace(SAMPLING, **changes))
                traces = {trace.prompt_key: trace for trace in engine.run(wanted)}
                for request in wanted:
                    trace, naive = traces[request.prompt_key], generate(state.module, request)
                    assert trace.response_ids.tolist() == naive.response
                    assert (trace.tail_ids.tolist(), trace.steps.tolist()) == (naive.tail, naive.steps)
                    assert trace.finish_reason == naive.reason
                    np.testing.assert_allclose(trace.logprobs, naive.logprobs, rtol=0, atol=1e-4)
    finally:
        engine.close()
