"""The sampler's kernels against loops over the vocabulary and torch's sampler; without a GPU interpreted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.diffusion.keys import uniforms
from megatron_dlm.diffusion.sampling import Confidence, DrawRules, Draws, draw
from megatron_dlm.model.policy import Vocabulary, policy_scores
from tests.diffusion.test_sampling import slow_draw

pytest.importorskip("triton")

DEVICE, SLOTS = platform.device(), 16


@dataclasses.dataclass(frozen=True)
class Case:
    """Positions [N] in slots, and the rules of the slots [S]: each way of ranking with each filter, greedy and not."""

    logits: Tensor
    slot: Tensor
    position: Tensor
    rules: DrawRules
    streams: Tensor
    steps: Tensor
    vocabulary: Vocabulary

    @classmethod
    def of(cls, vocabulary: Vocabulary, columns: int, n: int, dtype: torch.dtype = torch.float32) -> Case:
        generator = torch.Generator().manual_seed(columns)
        draw_ids = lambda high, count: torch.randint(0, high, (count,), generator=generator)
        rules = DrawRules(
            greedy=torch.arange(SLOTS) % 3 == 0,
            top_k=torch.tensor([0, 5, 0, 40]).repeat_interleave(4),
            top_p=torch.tensor([1, 1, 0.8, 0.9], dtype=torch.float64).repeat_interleave(4),
            temperature=torch.linspace(0.5, 2, SLOTS, dtype=torch.float64),
            confidence=torch.arange(SLOTS) % len(Confidence),
        )
        streams = draw_ids(2**63 - 1, SLOTS) * torch.tensor([1, -1]).repeat(SLOTS // 2)
        logits = (4 * torch.randn(n, columns, generator=generator)).to(dtype)
        columns = logits, torch.arange(n) % SLOTS, draw_ids(5000, n), streams, draw_ids(90, SLOTS)
        logits, slot, position, streams, steps = (one.to(DEVICE) for one in columns)
        rules = DrawRules(*(getattr(rules, field.name).to(DEVICE) for field in dataclasses.fields(rules)))
        return cls(logits, slot, position, rules, streams, steps, vocabulary)

    def filter(self, top_k: int, top_p: float) -> None:
        self.rules.greedy[:], self.rules.top_k[:], self.rules.top_p[:] = False, top_k, top_p

    def drawn(self) -> Draws:
        from megatron_dlm.diffusion.sampling_triton import draw_logits

        how = self.rules, self.streams, self.steps, self.vocabulary.size, self.vocabulary.mask_id
        return draw_logits(self.logits, self.slot, self.position, *how)

    def expected(self) -> tuple[Tensor, Tensor, DrawRules]:
        """Scores, uniform numbers and rules of the rows."""
        rules = DrawRules(*(getattr(self.rules, field.name)[self.slot] for field in dataclasses.fields(self.rules)))
        scores = policy_scores(self.logits, rules.temperature, self.vocabulary)
        return scores, uniforms(self.streams[self.slot], self.position, self.steps[self.slot]), rules


def same(found: Draws, wanted: Draws, rows: Tensor) -> None:
    assert torch.equal(found.token[rows], wanted.token[rows])
    for name in ("logprob", "sampling_logprob", "confidence"):
        mine, right = getattr(found, name)[rows], getattr(wanted, name)[rows]
        torch.testing.assert_close(mine, right, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "vocabulary, columns, dtype",
    [
        (Vocabulary(3, 1), 3, torch.float32),
        (Vocabulary(64, 0), 64, torch.bfloat16),
        (Vocabulary(270, 100), 290, torch.float32),
        (Vocabulary(270, 100), 290, torch.bfloat16),
    ],
)
def test_against_loops_over_the_vocabulary(vocabulary: Vocabulary, columns: int, dtype: torch.dtype) -> None:
    case = Case.of(vocabulary, columns, 2 * SLOTS, dtype)
    scores, uniform, rules = (one.cpu() if isinstance(one, Tensor) else one for one in case.expected())
    rules = DrawRules(*(getattr(rules, field.name).cpu() for field in dataclasses.fields(rules)))
    slow = [slow_draw(row.double().tolist(), float(uniform[n]), rules, n) for n, row in enumerate(scores)]
    names = ("token", "logprob", "sampling_logprob", "confidence")
    wanted = Draws(*(torch.tensor([getattr(one, name) for one in slow], dtype=torch.float64) for name in names))
    wanted = dataclasses.replace(wanted, token=wanted.token.long())
    clear = torch.tensor([one.clearance > 1e-6 for one in slow])
    assert clear.sum() > 2 * SLOTS - 3 and wanted.token.unique().numel() > 1
    found = case.drawn()
    same(Draws(*(getattr(found, name).cpu() for name in names)), wanted, clear)


def test_several_pieces_of_a_vocabulary_are_as_torch_has_them() -> None:
    case = Case.of(Vocabulary(9990, 5000), 10001, SLOTS)
    case.logits[:6] += torch.linspace(-200, 200, 10001, device=DEVICE)  # pieces that have nothing to add
    case.logits[6:9, :4200] = -torch.inf  # a piece without a token
    scores, uniform, rules = case.expected()
    same(case.drawn(), draw(scores, uniform, rules), torch.arange(SLOTS))


@pytest.mark.parametrize(
    "top_k, top_p", [(1, 1.0), (4100, 1.0), (10**6, 1.0), (0, 0.0), (0, 0.3), (5000, 0.9), (0, 1 - 1e-12)]
)
@pytest.mark.parametrize("levels", [1, 3])
def test_filters_keep_equals_by_their_ids(top_k: int, top_p: float, levels: int) -> None:
    """All tokens alike, or thousands at each of three scores."""
    case = Case.of(Vocabulary(9000, 3), 9000, 2)
    case.filter(top_k, top_p)
    case.logits[:] = torch.arange(9000, device=DEVICE) * 7 % levels
    scores, uniform, rules = case.expected()
    same(case.drawn(), draw(scores, uniform, rules), torch.arange(2))


def test_who_says_that_nobody_has_filters_is_believed() -> None:
    case = Case.of(Vocabulary(30, 3), 30, 8)
    case.filter(1, 1.0)
    how = case.slot, case.position, case.rules, case.streams, case.steps, 30, 3
    from megatron_dlm.diffusion.sampling_triton import draw_logits

    plain = draw_logits(case.logits, *how, filters=False)
    assert not torch.equal(plain.token, case.drawn().token)
    case.filter(0, 1.0)
    same(plain, case.drawn(), torch.arange(8))


def test_greedy_takes_the_lowest_of_the_most_likely_of_all_pieces() -> None:
    case = Case.of(Vocabulary(9000, 3), 9000, 12)
    case.slot[:] = 0
    case.logits[:] = -1.0
    for row, places in enumerate(([8000, 5000], [4096, 4095], [7, 8999], [3, 4])):
        case.logits[row, places] = 2.0
    found = case.drawn()
    assert found.token[:4].tolist() == [5000, 4095, 7, 4] and not found.token[4:].any()
    assert not found.sampling_logprob.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_are_no_numbers_give_some_token() -> None:
    case = Case.of(Vocabulary(9, 3), 9, SLOTS)
    case.logits[:] = torch.nan
    found = case.drawn()
    assert ((found.token >= 0) & (found.token < 9)).all() and found.logprob.isnan().all()


def test_no_positions_have_no_draws() -> None:
    assert Case.of(Vocabulary(9, 3), 9, 0).drawn().token.shape == (0,)
