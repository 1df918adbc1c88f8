"""Models of every family against their formulas, with weights of their checkpoints' names mapped onto ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.diffusion.layout import CLEAN, Layout
from megatron_dlm.diffusion.rows import Row, Targets
from tests.harness import pool
from tests.model import family_oracles as oracles
from tests.tiny import make_model, model_config

LENGTH, BLOCK = 22, 4


@dataclass(frozen=True)
class Family:
    """A family: its small config.json, its oracle, its weights, our fields for it, and how names map onto ours."""

    config: dict
    logits: Callable[..., Tensor]
    weights: Callable[..., dict[str, Tensor]]
    names: dict[str, str]
    fields: dict[str, object] = field(default_factory=dict)


LLADA_NAMES = dict(
    layer="model.transformer.blocks.{}.", embedding="model.transformer.wte", norm="model.transformer.ln_f",
    head="model.transformer.ff_out", norm1="attn_norm", norm2="ff_norm", out="attn_out", q="q_proj", k="k_proj",
    v="v_proj", gate="ff_proj", up="up_proj", down="ff_out",
)  # fmt: skip
DREAM_NAMES = dict(
    layer="model.layers.{}.", embedding="model.embed_tokens", norm="model.norm", head="lm_head",
    norm1="input_layernorm", norm2="post_attention_layernorm", out="self_attn.o_proj", q="self_attn.q_proj",
    k="self_attn.k_proj", v="self_attn.v_proj", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
)  # fmt: skip
LLADA2_NAMES = dict(
    DREAM_NAMES, embedding="model.word_embeddings", out="attention.dense", qkv="attention.query_key_value"
)
FAMILIES = {
    "llada": Family(
        oracles.LLADA, oracles.llada_logits, oracles.random_llada_weights, LLADA_NAMES,
        dict(num_query_groups=4, rotary_base=5e4, norm_epsilon=1e-5, qk_layernorm=False, full_attention=True),
    ),
    "dream": Family(
        oracles.DREAM, oracles.dream_logits, oracles.random_dream_weights, DREAM_NAMES,
        dict(qk_layernorm=False, full_attention=True, add_qkv_bias=True, logit_shift=1),
    ),
    "llada2": Family(
        oracles.LLADA2, oracles.llada2_logits, oracles.random_llada2_weights, LLADA2_NAMES,
        dict(
            num_layers=4, kv_channels=16, rotary_base=6e3, rotary_percent=0.5, num_experts=16, moe_router_topk=4,
            moe_ffn_hidden_size=24, moe_first_k_dense=1, moe_shared_expert_intermediate_size=24,
            moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_num_groups=4,
            moe_router_group_topk=2, moe_router_topk_scaling_factor=2.5,
        ),
    ),
}  # fmt: skip


def fields_of(family: Family) -> dict[str, object]:
    block = None if family.fields.get("full_attention") else BLOCK
    return dict(family.fields, block_size=block, vocab_size=family.config["vocab_size"])


def ours(family: Family, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole model's parameters and expert biases, by our names."""
    model, n = model_config(**fields_of(family)), family.names
    groups, width = model.num_query_groups, model.kv_channels
    heads, found = model.num_attention_heads, {}

    def by_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[queries of group 0 | its key | its value | queries of group 1 | ...]"""
        parts = [part.view(groups, -1, *part.shape[1:]) for part in (q, k, v)]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def feed_forward(theirs: str, mine: str, gate: str, up: str, down: str) -> None:
        found[f"{mine}.linear_fc1.weight"] = torch.cat([weights[f"{theirs}{name}.weight"] for name in (gate, up)])
        found[f"{mine}.linear_fc2.weight"] = weights[f"{theirs}{down}.weight"]

    found["embedding.word_embeddings.weight"] = weights[f"{n['embedding']}.weight"]
    found["decoder.final_layernorm.weight"] = weights[f"{n['norm']}.weight"]
    found["output_layer.weight"] = weights[f"{n['head']}.weight"]
    for layer in range(model.num_layers):
        theirs, mine = n["layer"].format(layer), f"decoder.layers.{layer}."
        found[mine + "input_layernorm.weight"] = weights[f"{theirs}{n['norm1']}.weight"]
        found[mine + "pre_mlp_layernorm.weight"] = weights[f"{theirs}{n['norm2']}.weight"]
        found[mine + "self_attention.linear_proj.weight"] = weights[f"{theirs}{n['out']}.weight"]
        for kind in ("weight", "bias") if model.add_qkv_bias else ("weight",):
            if "qkv" in n:
                fused = weights[f"{theirs}{n['qkv']}.{kind}"]
                qkv = fused.split([heads * width, groups * width, groups * width])
            else:
                qkv = [weights[f"{theirs}{n[name]}.{kind}"] for name in "qkv"]
            found[f"{mine}self_attention.linear_qkv.{kind}"] = by_group(*qkv)
        if model.qk_layernorm:
            for name in ("query", "key"):
                place = f"{mine}self_attention.{name[0]}_layernorm.weight"
                found[place] = weights[f"{theirs}attention.{name}_layernorm.weight"]
        if model.num_experts is None or layer < model.moe_first_k_dense:
            feed_forward(theirs, mine + "mlp", n["gate"], n["up"], n["down"])
            continue
        plain = ("gate_proj", "up_proj", "down_proj")
        feed_forward(theirs + "mlp.shared_experts.", mine + "mlp.shared_experts", *plain)
        for expert in range(model.num_experts):
            feed_forward(f"{theirs}mlp.experts.{expert}.", f"{mine}mlp.experts.local_experts.{expert}", *plain)
        found[mine + "mlp.router.weight"] = weights[theirs + "mlp.gate.weight"]
        found[mine + "mlp.router.expert_bias"] = weights[theirs + "mlp.gate.expert_bias"]
    return found


def put(chunk: torch.nn.Module, whole: dict[str, Tensor], rank: int = 0) -> set[str]:
    """Give a chunk its part of the whole model's tensors; returns the names of those."""
    from megatron_dlm.training.state import global_names

    rename, used = global_names(chunk), set()
    tensors = {**dict(chunk.named_parameters()), **dict(chunk.named_buffers())}
    tensors = {rename(name): tensor for name, tensor in tensors.items() if "local_tokens_per_expert" not in name}
    with torch.no_grad():
        for name, tensor in tensors.items():
            value = whole[name]
            if value.shape != tensor.shape:
                dimension = tensor.partition_dim
                size, length = value.shape[dimension] // tensor.shape[dimension], tensor.shape[dimension]
                if "linear_fc1" in name:  # gate and up are cut one by one
                    value = torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
                else:
                    value = value.narrow(dimension, rank * length, length)
            tensor.copy_(value)
            used.add(name)
    return used


def text(seed: int = 3) -> Tensor:
    return torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(seed))


def as_row(tokens: Tensor, block: int | None) -> Row:
    """A clean text of one group, every token a target."""
    position, zero = torch.arange(len(tokens), dtype=torch.int32), torch.zeros(len(tokens), dtype=torch.int32)
    blocks = zero if block is None else position // block
    targets = Targets(position.long(), tokens, torch.ones(len(tokens)), zero.long(), position.long())
    return Row(tokens, Layout(zero, zero, zero + CLEAN, blocks, position), targets).to(platform.device())


def built(family: Family, dtype: torch.dtype, seed: int = 0) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    weights = family.weights(family.config, seed, dtype)
    model, whole = make_model(dtype, **fields_of(family)), ours(family, weights)
    assert put(model, whole) == whole.keys()
    assert sum(value.numel() for value in whole.values()) == sum(value.numel() for value in weights.values())
    return model, weights


def worst(found: Tensor, expected: Tensor) -> float:
    assert expected.std() > 0.5
    return ((found.cpu() - expected).abs().max() / expected.abs().max()).item()


# megatron-core's router takes the sigmoid in float32 whatever the model's precision
@pytest.mark.parametrize(("name", "dtype", "limit"), [
    ("llada", torch.float32, 1e-5), ("dream", torch.float32, 1e-5), ("llada2", torch.float32, 1e-4),
    ("llada", torch.float64, 1e-12), ("dream", torch.float64, 1e-12), ("llada2", torch.float64, 1e-6),
])  # fmt: skip
def test_logits_are_those_of_the_formulas(name: str, dtype: torch.dtype, limit: float) -> None:
    family = FAMILIES[name]
    model, weights = built(family, dtype)
    for seed in (3, 4):
        tokens = text(seed)
        with torch.no_grad():
            found = model.forward_row(as_row(tokens, fields_of(family)["block_size"]))
            assert worst(found, family.logits(weights, family.config, tokens)) < limit


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_of_the_formula_counts(name: str) -> None:
    """An oracle that left a tensor out would agree with a model that does."""
    family = FAMILIES[name]
    weights = family.weights(family.config, 0, torch.float64)
    expected = family.logits(weights, family.config, text())
    for tensor in weights:
        moved = {**weights, tensor: weights[tensor] * -3}
        # one of many experts may not be chosen by any token
        assert (
            "mlp.experts." in tensor or (family.logits(moved, family.config, text()) - expected).abs().max() > 1e-6
        ), tensor


@pytest.mark.parametrize(("name", "limit"), [("llada", 1e-10), ("dream", 1e-10), ("llada2", 1e-5)])
def test_gradients_are_those_of_the_formulas(name: str, limit: float) -> None:
    family = FAMILIES[name]
    model, weights = built(family, torch.float64)
    row = as_row(text(), fields_of(family)["block_size"])
    torch.nn.functional.cross_entropy(model.forward_row(row), row.tokens).backward()
    leaves = {name: value.requires_grad_() for name, value in weights.items()}
    torch.nn.functional.cross_entropy(family.logits(leaves, family.config, text()), text()).backward()
    expected = ours(
        family, {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    )
    for name, parameter in model.named_parameters():
        wanted = expected[name]
        assert wanted.norm() > 0 or "local_experts" in name, name  # an expert that no token goes to
        found = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad.cpu()
        assert (found - wanted).norm() <= limit * wanted.norm(), name


def state_of(name: str, tp: int, pp: int, optimizer: bool = False, bf16: bool = False):
    """The TrainState of a family in a layout, with the weights of seed 0; and the names that this stage has."""
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.state import TrainState

    family = FAMILIES[name]
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=tp > 1)
    groups, model = initialize(parallel, seed=1), model_config(bf16=bf16, **fields_of(family))
    config = transformer_config(model, parallel)
    whole, used = ours(family, family.weights(family.config, 0, torch.float32)), set()

    def build(pre_process: bool, post_process: bool, vp_stage: int | None):
        chunk = BlockDiffusionModel(
            config, model_shape(model), groups.pg_collection, pre_process, post_process, vp_stage
        )
        used.update(put(chunk, whole, groups.tp_rank))
        return chunk

    settings = OptimizerConfig(lr=1e-2) if optimizer else None
    return TrainState.build(build, config, settings, parallel, groups, 10), used, whole


def forward_step(row: Row, model):
    """forward_step of training/step.py: whole logits when nothing is trained, else their cross entropy."""

    def loss_fn(logits: Tensor):
        from megatron_dlm.parallel.exchange import gather_objects

        if not torch.is_grad_enabled():
            return torch.cat(gather_objects(logits.detach().cpu(), model.module.pg_collection.tp), dim=-1)
        return torch.nn.functional.cross_entropy(logits, row.targets.label), {}

    return model.module.forward_row(row), loss_fn


def parallel_logits(name: str, tp: int, pp: int):
    from megatron_dlm.training.step import forward_only

    state, used, whole = state_of(name, tp, pp)
    rows = [as_row(text(seed), fields_of(FAMILIES[name])["block_size"]) for seed in (3, 4)]
    results = forward_only(state, rows, forward_step, LENGTH)
    return used, set(whole), results if state.groups.is_pipeline_last else []


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layout_does_not_change_the_logits(name: str, tp: int, pp: int) -> None:
    family = FAMILIES[name]
    weights = family.weights(family.config, 0, torch.float32)
    answers = pool(2).run(parallel_logits, name, tp, pp)
    assert set().union(*(used for used, _, _ in answers)) == answers[0][1]
    assert any(results for _, _, results in answers)
    for _, _, results in answers:
        for seed, found in zip((3, 4), results):
            assert worst(found, family.logits(weights, family.config, text(seed))) < 1e-4


BIAS = "decoder.layers.{}.mlp.router.expert_bias"


def bias_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Expert biases by their names in the whole model."""
    from megatron_dlm.training.state import global_names

    rename = global_names(model)
    return {rename(name): value.clone() for name, value in model.named_buffers() if name.endswith("expert_bias")}


def trained_bias(pp: int, bf16: bool, folder: str) -> tuple[dict, dict, dict, dict]:
    """The expert biases before and after two updates, after they were stored and read into a model of zeros, and those
    of a rollout model."""
    from megatron_dlm.checkpoint import distributed
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import rollout_groups
    from megatron_dlm.rollout.refit import Refit
    from megatron_dlm.training.step import train_step

    state, _, _ = state_of("llada2", 1, pp, optimizer=True, bf16=bf16)
    before = bias_of(state.module)
    model = model_config(bf16=bf16, **fields_of(FAMILIES["llada2"]))
    config = transformer_config(model, ParallelConfig())
    rollout = BlockDiffusionModel(config, model_shape(model), rollout_groups(state.groups).pg_collection)
    rollout.requires_grad_(False).eval()
    for _ in range(2):
        train_step(state, [as_row(text(seed), BLOCK) for seed in (3, 4)], forward_step, LENGTH)
    after = bias_of(state.module)
    distributed.save(state, folder, 1, {})
    for value in state.module.buffers():
        value.zero_()
    distributed.load(state, folder)
    Refit(state, rollout, verify=True).run()
    if pp == 1:
        with torch.no_grad():
            row = as_row(text(5), BLOCK)
            assert torch.equal(rollout.forward_row(row), state.module.forward_row(row))
    return before, after, bias_of(state.module), bias_of(rollout)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_expert_bias_stays_through_training_checkpoints_and_refit(pp: int, bf16: bool, tmp_path) -> None:
    weights = oracles.random_llada2_weights(oracles.LLADA2)
    expected = {BIAS.format(layer): weights[f"model.layers.{layer}.mlp.gate.expert_bias"] for layer in (1, 2, 3)}
    answers = pool(pp).run(trained_bias, pp, bf16, str(tmp_path))
    for moment in range(3):
        found = {name: value for answer in answers for name, value in answer[moment].items()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == torch.float32 and torch.equal(found[name], value), (name, moment)
    for answer in answers:
        assert answer[3].keys() == expected.keys()
        assert all(torch.equal(answer[3][name], value) for name, value in expected.items())


def test_a_pattern_of_layers_is_followed() -> None:
    model = make_model(
        num_layers=4, num_experts=4, moe_router_topk=2, transformer_overrides={"moe_layer_freq": [0, 1, 1, 0]}
    )
    assert [hasattr(layer.mlp, "router") for layer in model.decoder.layers] == [False, True, True, False]


def test_full_attention_needs_no_block_size() -> None:
    from megatron_dlm.model.shape import resolve

    sizes = dict(num_layers=2, hidden_size=32, num_attention_heads=4)
    assert resolve(ModelConfig(**sizes, full_attention=True), 64).block_size is None
    assert resolve(ModelConfig(model_preset="sdar-1.7b", full_attention=True), 64).block_size is None
    with pytest.raises(ConfigError, match="--block-size is not set"):
        resolve(ModelConfig(**sizes), 64)


def trains_with_full_attention() -> list[float]:
    """Losses of supervised fine-tuning of a model of Dream's kind."""
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.sft import SFTConfig
    from megatron_dlm.data.sft_data import Sample
    from megatron_dlm.sft.trainer import SFTTrainer
    from tests.tiny import make_session, make_state, sampler_of

    changes = dict(fields_of(FAMILIES["dream"]), init_method_std=0.1)
    state = make_state(torch.float32, optimizer=OptimizerConfig(lr=1e-2), train_iters=30, **changes)
    samples = [Sample(f"s{n}", (n, n + 1), (n + 2, n + 3, n + 4, n + 5, 49)) for n in range(4)]
    settings = SFTConfig(global_batch_size=4, train_iters=30, max_tokens_per_row=64)
    trainer = SFTTrainer(make_session(**changes), state, sampler_of(samples, 1), settings, seed=1)
    assert trainer.session.grid.block_size is None
    results = [trainer.step()[0].metrics for _ in range(24)]
    return [result["nll"] / max(result["targets"], 1) for result in results]


def test_supervised_fine_tuning_learns_under_full_attention_with_a_shift() -> None:
    losses = pool(1).run(trains_with_full_attention)[0]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
