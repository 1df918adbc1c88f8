"""The attention backends against sdpa, which test_attention.py holds against single queries; and which one is chosen.

FlashAttention and FlashInfer need a GPU; here stand-ins with their interface check what they are given.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys

import numpy as np
import pytest
import torch

from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.rollout.attention import backends, flex, optional
from megatron_dlm.rollout.attention.backends import KINDS, backend, served
from megatron_dlm.rollout.attention.pieces import Pieces
from megatron_dlm.rollout.attention.sdpa import GatheredAttention
from megatron_dlm.rollout.attention.self_test import agrees, largest_difference, outputs, random_passes
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.kv_cache import CacheShape
from megatron_dlm.rollout.options import EngineOptions
from tests.harness import pool
from tests.rollout import fake_kernels
from tests.rollout.test_engine import SAMPLING, WAYS, by_key, requests, same
from tests.tiny import make_model, vocabulary

CPU = torch.device("cpu")
OTHERS = [kind for kind in KINDS if kind != "sdpa"]


def shape(page: int, dtype: torch.dtype = torch.float64, dim: int = 8) -> CacheShape:
    return CacheShape(1, page, 2, dim, dtype)


@pytest.fixture
def fakes(monkeypatch) -> None:
    """Every library is there, and everything is allowed."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_kernels.flash_attn_interface())
    monkeypatch.setitem(sys.modules, "flash_attn", fake_kernels.flash_attn(page_multiple=1))
    monkeypatch.setitem(sys.modules, "flashinfer", fake_kernels.flashinfer())
    for name, kind in KINDS.items():
        monkeypatch.setitem(KINDS, name, dataclasses.replace(kind, check=lambda shape, device: None))


@pytest.mark.parametrize("page", [3, 16])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_backend_computes_what_sdpa_computes(fakes, kind: str, page: int) -> None:
    for seed in range(3):
        gap = largest_difference(KINDS[kind].build(), GatheredAttention, shape(page), CPU, seed)
        assert gap < 1e-12


@pytest.mark.parametrize("page", [4, 16])
def test_flex_reads_pages_in_place_when_they_are_tiles(monkeypatch, page: int) -> None:
    monkeypatch.setattr(flex, "TILE", page)
    for seed in range(3):
        assert largest_difference(flex.FlexAttention, GatheredAttention, shape(page), CPU, seed) < 1e-12


def test_the_self_test_of_flex_compiles_what_passes_need(monkeypatch) -> None:
    """Traced as for a GPU; what is behind torch's limit of graphs is an error, and no passes write out all scores."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    counter, given, compile_ = CompileCounter(), {}, torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: given.update(how) or compile_(f, backend=counter, **how))
    with torch._dynamo.config.patch(recompile_limit=1):
        kernel = flex._kernel.__wrapped__("cuda")
        monkeypatch.setattr(flex, "_kernel", lambda device: kernel)
        assert given["fullgraph"] and torch._dynamo.config.recompile_limit >= 64
        assert kernel.keywords["kernel_options"]["FORCE_USE_FLEX_ATTENTION"]  # a lone text, one kv head: see _OPTIONS
        asked = shape(16, torch.float32, 16)
        assert agrees(flex.FlexAttention, GatheredAttention, asked, CPU)
        known = counter.frame_count
        assert known > 1
        with torch.no_grad():
            pages, passes = random_passes(asked, CPU, full=False)
            assert len(list(outputs(flex.FlexAttention, asked, pages, passes, 0.25))) == 2 * len(passes)
        assert counter.frame_count == known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_near_float64(dtype: torch.dtype) -> None:
    """The same numbers in both, so the inputs are rounded to the shorter type first."""

    class InFloat64(GatheredAttention):
        def _attend(self, layer, call, lines, scale):
            real, cache = self.cache.storage, self.cache
            cache.storage = real.double()
            try:
                out = super()._attend(layer, dataclasses.replace(call, mask=call.mask.double()), lines.double(), scale)
            finally:
                cache.storage = real
            return out.to(real.dtype)

    assert largest_difference(GatheredAttention, InFloat64, shape(16, dtype), CPU) < 3e-2


@pytest.mark.parametrize("full", [False, True])
def test_pieces_are_the_prefixes_that_tokens_see(full: bool) -> None:
    for seed in range(4):
        for one in random_passes(shape(3), CPU, full, seed)[1]:
            queries = one.queries
            pieces = Pieces.of(queries)
            keys = pieces.key_length.numpy()
            assert np.array_equal(np.repeat(keys, pieces.count), queries.last_visible.numpy())
            assert np.array_equal(np.repeat(pieces.owner, pieces.count), queries.sequence.numpy())
            neighbours = zip(zip(keys, pieces.owner), zip(keys[1:], pieces.owner[1:]))
            assert all(before != after for before, after in neighbours)  # none is cut for nothing
            assert pieces.longest == pieces.count.max() and pieces.most_keys >= keys.max()
            if full:
                assert len(pieces.count) == len(queries.count)
            bounds, pages, last = pieces.page_list()
            table = pieces.page_table()
            for number, most in enumerate(keys):
                own = pages[bounds[number] : bounds[number + 1]]
                assert (len(own) - 1) * 3 + last[number] == most and 1 <= last[number] <= 3
                assert torch.equal(own, table[number, : len(own)])
                assert torch.equal(own.long(), queries.pages[pieces.owner[number], : len(own)])


@pytest.mark.parametrize("kind", [*KINDS, "flex in place"])
def test_the_host_need_not_know_how_many_keys_are_seen(fakes, monkeypatch, kind: str) -> None:
    """As in rounds that the device makes by itself: one block per span, and a bound in place of the keys' number."""
    if kind == "flex in place":
        kind, _ = "flex", monkeypatch.setattr(flex, "TILE", 4)

    def blind(backend):
        return lambda cache, queries: backend(
            cache,
            dataclasses.replace(queries, seen=None, key_length=[queries.pages.shape[1] * queries.page_size] * 5),
        )

    pages, passes = random_passes(shape(4), CPU, full=True)
    made = [
        list(outputs(backend, shape(4), pages, passes, 0.3))
        for backend in (blind(KINDS[kind].build()), GatheredAttention)
    ]
    for mine, theirs in zip(*made, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


MODELS = {
    "blocks": {},
    "blocks, shift": dict(logit_shift=1),
    "full attention, shift": dict(full_attention=True, block_size=None, logit_shift=1),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", [*OTHERS, "flex in place"])
def test_an_engine_generates_the_same_with_every_backend(fakes, monkeypatch, kind: str, model: str) -> None:
    if kind == "flex in place":
        kind, _ = "flex", monkeypatch.setattr(flex, "TILE", 4)
    name = next(name for name, kinds in backends.BACKENDS.items() if kind in kinds and name != "auto")
    if kind == "flash 2":
        monkeypatch.setitem(backends.BACKENDS, name, ("flash 2",))
    ways = [dict(WAYS[way]) for way in ("dynamic", "static", "block 8", "greedy")]
    wanted = [
        dataclasses.replace(request, sampling=dataclasses.replace(SAMPLING, **ways[number % len(ways)]))
        for number, request in enumerate(requests(12, SAMPLING, samples=2))
    ]
    made = fake_kernels.BatchPrefillWithPagedKVCacheWrapper.made
    options = EngineOptions(8, 40, max_tokens_per_pass=24, page_size=4, full_attention=model.startswith("full"))
    chunk = make_model(torch.float64, **MODELS[model])
    found, expected = (
        by_key(Engine(chunk, vocabulary(), dataclasses.replace(options, attention_backend=which)).run(wanted))
        for which in (name, "sdpa")
    )
    assert len(found) == len(expected) == 12
    for key, trace in expected.items():
        same(found[key], trace)
    assert fake_kernels.BatchPrefillWithPagedKVCacheWrapper.made - made == (kind == "flashinfer")


@pytest.mark.parametrize(
    ("module", "function", "used"),
    [
        (
            "flash_attn_interface",
            "flash_attn_with_kvcache",
            "q k_cache v_cache cache_seqlens page_table cu_seqlens_q max_seqlen_q softmax_scale causal",
        ),
        (
            "flash_attn",
            "flash_attn_varlen_func",
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k softmax_scale causal block_table",
        ),
        (
            "flashinfer",
            "BatchPrefillWithPagedKVCacheWrapper.plan",
            "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk "
            "page_size causal sm_scale q_data_type kv_data_type",
        ),
    ],
)
def test_the_real_libraries_have_the_interface_of_the_stand_ins(module: str, function: str, used: str) -> None:
    try:
        real = importlib.import_module(module)
    except Exception as error:
        pytest.skip(f"{module} cannot be imported here: {error}")
    for name in function.split("."):
        real = getattr(real, name)
    fake = getattr(fake_kernels, module)()
    for name in function.split("."):
        fake = getattr(fake, name)
    real_order, fake_order = ([n for n in inspect.signature(f).parameters if n != "self"] for f in (real, fake))
    assert set(used.split()) <= set(real_order)
    assert fake_order == real_order[: len(fake_order)]


# Which one ----------------------------------------------------------------------------------------------------------


def test_on_a_cpu_auto_is_sdpa() -> None:
    assert served("auto", shape(16), CPU) == "sdpa"
    assert backend("auto", shape(16), CPU) is GatheredAttention


@pytest.mark.parametrize("name", ["flash", "flashinfer"])
def test_gpu_libraries_are_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match="runs on GPUs only, and this is a CPU"):
        backend(name, shape(256, torch.bfloat16, 64), CPU)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rollout attention backend quick"):
        backend("quick", shape(16), CPU)


class Gpu:
    """A device that says it is a GPU; nothing is computed on it."""

    type = "cuda"


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU of a given compute capability, with all libraries."""

    def of(capability: tuple[int, int]) -> Gpu:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return Gpu()

    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_kernels.flash_attn_interface())
    monkeypatch.setitem(sys.modules, "flash_attn", fake_kernels.flash_attn())
    monkeypatch.setitem(sys.modules, "flashinfer", fake_kernels.flashinfer())
    return of


def test_which_kind_serves_on_which_gpu(gpu) -> None:
    small, large = shape(16, torch.bfloat16, 64), shape(256, torch.bfloat16, 64)
    assert served("flash", small, gpu((9, 0))) == "flash 3"
    assert served("flash", small, gpu((8, 0))) == "flash 3"
    assert served("flash", large, gpu((10, 0))) == "flash 2"
    assert served("flashinfer", small, gpu((10, 0))) == "flashinfer"
    assert served("auto", small, gpu((9, 0))) == "flash 3"
    assert served("auto", small, gpu((10, 0))) == "flashinfer"
    assert served("auto", shape(256, torch.bfloat16, 80), gpu((10, 0))) == "flash 2"
    assert served("auto", shape(16, torch.float32, 64), gpu((9, 0))) == "sdpa"
    assert served("auto", shape(16, torch.float64, 64), gpu((9, 0))) == "sdpa"


@pytest.mark.parametrize(
    ("name", "asked", "capability", "said"),
    [
        ("flash", shape(16, torch.bfloat16, 64), (10, 0), "multiple of 256 tokens, and --kv-page-size is 16"),
        ("flash", shape(256, torch.bfloat16, 64), (7, 5), "no kernels for this GPU, of compute capability 7.5"),
        ("flash", shape(256, torch.float32, 64), (9, 0), "computes in bfloat16, and this model is kept in float32"),
        ("flash", shape(256, torch.bfloat16, 36), (9, 0), "a multiple of 8 up to 256, and those of this model are 36"),
        ("flashinfer", shape(16, torch.bfloat16, 80), (9, 0), "64, 128 or 256, and those of this model are 80 wide"),
        ("flex", shape(16, torch.float64, 64), (9, 0), "does not compute in float64 on a GPU"),
        ("flex", shape(16, torch.float32, 8), (9, 0), "no kernels for heads of 8"),
    ],
)
def test_what_a_library_cannot_do_is_refused(gpu, name: str, asked: CacheShape, capability, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        backend(name, asked, gpu(capability))


def test_a_missing_or_broken_library_is_refused(gpu, monkeypatch, tmp_path) -> None:
    asked, device = shape(16, torch.bfloat16, 64), gpu((9, 0))
    monkeypatch.setattr(optional.importlib, "import_module", _missing)
    with pytest.raises(DependencyError, match="needs FlashInfer .* which is not installed"):
        backend("flashinfer", asked, device)
    with pytest.raises(DependencyError, match="needs FlashAttention 3, or FlashAttention 2 and pages of 256"):
        backend("flash", asked, device)
    monkeypatch.setattr(optional.importlib, "import_module", _broken)
    with pytest.raises(DependencyError, match="cannot be imported here \\(undefined symbol: x\\)"):
        backend("flashinfer", asked, device)
    assert served("auto", asked, device) == "sdpa"


def _missing(name: str):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _broken(name: str):
    raise ImportError("undefined symbol: x\nand more")


def test_auto_passes_over_what_does_not_work_here(fakes, monkeypatch) -> None:
    tried = []

    def judge(one, other, shape, device) -> bool:
        tried.append(one)
        return len(tried) == 3

    monkeypatch.setattr(backends, "agrees", judge)
    assert backend("auto", shape(16), Gpu()) is tried[2]
    assert [getattr(one, "__name__", type(one).__name__) for one in tried] == ["Flash3", "FlashInfer", "Flash2"]
    tried.extend([None] * 3)
    assert backend("auto", shape(16), Gpu()) is GatheredAttention


def test_a_backend_that_raises_or_computes_otherwise_does_not_agree(fakes) -> None:
    class Wrong(GatheredAttention):
        def __call__(self, layer, q, k, v, scale):
            return super().__call__(layer, q, k, v, 1.01 * scale)

    def broken(cache, queries):
        raise RuntimeError("no kernel image is available")

    for dtype in (torch.float64, torch.float32):
        asked = shape(16, dtype)
        assert agrees(KINDS["flash 3"].build(), GatheredAttention, asked, CPU)
        assert not agrees(Wrong, GatheredAttention, asked, CPU)
        assert not agrees(broken, GatheredAttention, asked, CPU)


def chosen_where_rank_1_cannot(kind: str | None, name: str) -> tuple[str, str]:
    """The backend of each of two ranks, or why there is none, and what the rank says."""
    import contextlib
    import io
    from unittest import mock

    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    rank, said = initialize(ParallelConfig(), seed=1).rank, io.StringIO()
    refused = lambda asked, *_: DependencyError(f"no {asked} here.") if rank == 1 and asked == kind else None
    bad = mock.patch.object(backends, "_refusal", refused)
    slow = mock.patch.object(backends, "agrees", lambda *_: True)
    with bad, slow, contextlib.redirect_stdout(said):
        try:
            found = backend(name, shape(16), Gpu()).__name__
        except DependencyError as error:
            found = str(error)
    return found, said.getvalue()


def test_all_ranks_take_the_same_backend() -> None:
    assert pool(2).run(chosen_where_rank_1_cannot, None, "auto") == [("Flash3", "")] * 2
    (one, said), (other, silence) = pool(2).run(chosen_where_rank_1_cannot, "flash 3", "flash")
    assert one == other == "Flash2" and not silence
    assert said == "Rollout attention is not flash 3, because rank 1 cannot have it: no flash 3 here.\n"
    found = pool(2).run(chosen_where_rank_1_cannot, "sdpa", "sdpa")
    assert [error for error, _ in found] == ["no sdpa here."] * 2
