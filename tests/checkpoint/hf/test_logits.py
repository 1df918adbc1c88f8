"""An imported checkpoint computes what its own implementation does: transformers for Qwen3, formulas for the rest."""

from __future__ import annotations

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from tests.checkpoint.hf.folders import make, qwen3, read, write
from tests.model import family_oracles as oracles
from tests.model.test_families import as_row
from tests.tiny import Words, one_process, vocabulary

LENGTH = 33
IN_PLACE = {"logit_shift": 0}  # all logits of a text, as transformers returns them


def imported(folder, **changes: object):
    """The model of a checkpoint on this process, in fp32."""
    groups = one_process()
    from megatron_dlm.checkpoint.hf.importer import load_into
    from megatron_dlm.checkpoint.hf.source import HFSource
    from megatron_dlm.model.shape import resolve
    from megatron_dlm.training.setup import Session

    source = HFSource.open(folder)
    model = resolve(ModelConfig(**source.fields | changes), None)
    state = Session(model, ParallelConfig(), Words(), groups, vocabulary()).train_state(None, 1)
    load_into(state, source, model)
    return state.module, model


def logits(folder, tokens: torch.Tensor, **changes: object) -> torch.Tensor:
    module, model = imported(folder, **changes)
    block = None if model.full_attention else model.block_size
    with torch.no_grad():
        return module.forward_row(as_row(tokens, block).to(platform.device())).cpu()[:, : model.vocab_size]


def tokens_below(size: int) -> torch.Tensor:
    return torch.randint(0, size, (LENGTH,), generator=torch.Generator().manual_seed(1))


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1 and found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [True, False])
def test_qwen3(tmp_path, tied: bool, experts: bool) -> None:
    """Block size 1 is autoregressive; the width of a head is not hidden size / heads."""
    theirs = qwen3(tied, experts)
    theirs.save_pretrained(tmp_path / "hf")
    tokens = tokens_below(300)
    with torch.no_grad():
        expected = theirs(input_ids=tokens[None]).logits[0]
    check_close(logits(tmp_path / "hf", tokens, **IN_PLACE), expected)


def test_qwen3_under_larger_blocks(tmp_path) -> None:
    """The start of the way to block diffusion: another block size is a flag."""
    theirs = qwen3(tied=False)
    theirs.save_pretrained(tmp_path / "hf")
    tokens = tokens_below(300)
    block = torch.arange(LENGTH) // 4
    mask = torch.where(block[None] <= block[:, None], 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        expected = theirs(input_ids=tokens[None], attention_mask=mask).logits[0]
    check_close(logits(tmp_path / "hf", tokens, block_size=4, **IN_PLACE), expected)


def test_qwen3_predicts_the_next_token(tmp_path) -> None:
    """As it is imported, the logits of a token are those at the position before it."""
    theirs = qwen3(tied=False)
    theirs.save_pretrained(tmp_path / "hf")
    tokens = tokens_below(300)
    with torch.no_grad():
        expected = theirs(input_ids=tokens[None]).logits[0]
    check_close(logits(tmp_path / "hf", tokens)[1:], expected[:-1])


@pytest.mark.parametrize("kind", ["llada", "dream", "llada2"])
def test_other_families(tmp_path, kind: str) -> None:
    folder = make(kind, tmp_path / "hf")
    config = getattr(oracles, kind.upper())
    weights = {name: value.float() for name, value in read(folder).items()}
    tokens = tokens_below(weights["lm_head.weight"].shape[0] if kind != "llada" else config["embedding_size"])
    options = {} if kind != "llada2" else {"block_size": 4}
    expected = getattr(oracles, f"{kind}_logits")(weights, config, tokens, **options)
    check_close(logits(folder, tokens, **options), expected)


def test_sdar_is_qwen3_with_blocks(tmp_path) -> None:
    """The same weights under both names give the same logits, where the blocks are the same."""
    folder = make("sdar", tmp_path / "sdar")
    theirs = qwen3(tied=False).to(torch.bfloat16)
    config = theirs.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    plain = write(tmp_path / "qwen3", config, read(folder))
    tokens = tokens_below(300)
    assert torch.equal(logits(folder, tokens), logits(plain, tokens, block_size=4, **IN_PLACE))
