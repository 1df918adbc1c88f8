"""Commands on a GPU of the mind (tests/pretend_gpu): what they compute is what they compute on a CPU, no operation
is given tensors of two devices, and the host waits for the device only where it has to.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.bad_inputs.bench import SFT
from tests.bad_inputs.conftest import pristine, server  # noqa: F401 (fixtures)
from tests.command_server import Server, command_server
from tests.pretend_gpu.tensors import Devices, Graph, OnGpu, capture
from tests.test_commands import lines
from tests.test_rl_commands import RL
from tests.test_stopping import tensors

PLAIN = "--attention-backend dense --loss-head torch "  # what a CPU takes by itself


@pytest.fixture(scope="module")
def gpu() -> Iterator[Server]:
    with_gpu = Server("tests.pretend_gpu")
    yield with_gpu
    with_gpu.close()


@pytest.fixture
def folder(pristine, tmp_path) -> Path:  # noqa: F811
    shutil.copytree(pristine, tmp_path / "world")
    return tmp_path / "world"


def compare(one: Path, other: Path, tolerance: float) -> None:
    """Two checkpoints, optimizer included. Gates and shared heads are computed otherwise on a GPU: not to the bit."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys() and any("exp_avg" in name for name in left)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=tolerance * float(tensor.abs().max()), msg=name)


def run(where: Server, words: str, folder: Path, ranks: int = 1) -> list[tuple[str, list[str], int]]:
    """What the host waited for: kind, functions from the inside out, how often."""
    environment = {"PRETEND_GPU_WAITS": str(folder / "waits.json")}
    result = where.run(shlex.split(words), folder, environment=environment, ranks=ranks)
    assert result.codes == [0] * ranks, result.stdout + result.stderr
    return json.loads((folder / "waits.json").read_text()) if where is not command_server() else []


SFT_WAYS = {
    "flex, optimizer on the host": (
        "--kv-channels 16 --attention-backend flex --loss-head torch --bf16 --use-distributed-optimizer "
        "--optimizer-cpu-offload",
        1,
    ),
    "tensor parallel": (
        PLAIN + "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --overlap-param-gather "
        "--overlap-grad-reduce --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        2,
    ),
    "experts": (
        PLAIN + "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --recompute-granularity selective "
        "--recompute-modules layernorm",
        1,
    ),
}


MOVES_TO_EXPERTS = {"aten::masked_select", "copy to the CPU"}


@pytest.mark.parametrize("flags, ranks", SFT_WAYS.values(), ids=SFT_WAYS)
def test_fine_tuning(gpu: Server, folder: Path, flags: str, ranks: int) -> None:
    """The same weights and optimizer; no wait within a row."""
    run(command_server(), f"sft {SFT} {flags} --save cpu", folder, ranks)
    waits = run(gpu, f"sft {SFT} {flags} --save gpu", folder, ranks)
    compare(folder / "cpu" / "iter_0000003", folder / "gpu" / "iter_0000003", 3e-2 if "bf16" in flags else 1e-5)
    within = [(kind, asking) for kind, asking, _ in waits if any("forward_row" in one for one in asking)]
    if "dense" in flags:  # it is cut to the lengths of the row on the host
        within = [(kind, asking) for kind, asking in within if "model/attention.py:__init__" not in asking]
    kinds = {kind for kind, _ in within}
    # megatron-core looks at how many tokens each expert gets; releases before 0.19 also select their weights by a mask.
    assert kinds <= MOVES_TO_EXPERTS if "experts" in flags else not kinds


def test_reinforcement_learning(gpu: Server, folder: Path) -> None:
    """With a value model, a frozen reference, and weights that leave the device during rollouts. No wait in a loss."""
    words = (
        RL
        + PLAIN
        + (
            "--load ckpt --finetune --num-rollout 2 --use-value-model --value-lr 1e-3 --kl-reference frozen --ref-load "
            "ckpt --kl-loss-coef 0.1 --rollout-sampler torch --rollout-attention-backend sdpa --offload-train "
        )
    )
    run(command_server(), words + "--save cpu", folder)
    waits = run(gpu, words + "--save gpu", folder)
    assert waits and not [one for one in waits if "rl/update.py:loss_fn" in one[1]]
    for name in ("", "value"):
        compare(folder / "cpu" / name / "iter_0000002", folder / "gpu" / name / "iter_0000002", 1e-5)


def test_rollouts_as_graphs(gpu: Server, folder: Path) -> None:
    """Rounds are captured and replayed, with FlashAttention, the sampler's kernels and weights in FP8; what is
    generated is what passes without graphs generate, and no round waits for the device.
    """
    pytest.importorskip("triton")
    first = json.loads((folder / "prompts.jsonl").read_text().splitlines()[0])
    second = first | {"sampling": {"top_k": 5}}  # for which a graph of the same shape without filters will not do
    (folder / "prompts.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    words = (
        "generate --load ckpt --prompts prompts.jsonl --max-new-tokens 8 --bf16 --rollout-attention-backend flash "
        "--rollout-sampler triton --rollout-weights fp8 --max-running-requests 1 --kv-page-size 16 "
    )
    eager = run(gpu, words + "--output eager.jsonl", folder)
    waits = run(gpu, words + "--rollout-cuda-graphs --output graphs.jsonl", folder)
    assert lines(folder / "eager.jsonl") == lines(folder / "graphs.jsonl") != []
    captured, replayed = (
        sum(n for kind, _, n in waits if kind == f"a graph was {what}") for what in ("captured", "replayed")
    )
    assert replayed > captured > 0 and not any("graph" in kind for kind, _, _ in eager)
    within = [asking for kind, asking, _ in waits if "rollout/rounds.py:round" in asking and "graph" not in kind]
    assert all("rollout/attention/pieces.py:_constant" in asking for asking in within)  # sent once for each shape


def test_what_a_gpu_refuses_is_refused() -> None:
    with Devices():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert isinstance(there, OnGpu) and there.device.type == "cuda" and there.cpu().device.type == "cpu"
        assert isinstance(there[None] * 2.0, OnGpu) and (there.cpu() + here).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([there, here])
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_a_captured_graph_does_it_again() -> None:
    with Devices():
        numbers = torch.arange(3.0, device="cuda")
        graph = Graph()
        with capture(graph):
            total = (numbers * 2).sum()
        numbers += 1
        assert total.item() == 6
        graph.replay()
        assert total.item() == 12
        with pytest.raises(RuntimeError, match="capturing"), capture(Graph()):
            numbers.sum().item()
