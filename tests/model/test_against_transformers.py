"""The model against another implementation: Qwen3 of the transformers package, with the same weights."""

from __future__ import annotations

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.diffusion.layout import CLEAN, Layout
from megatron_dlm.diffusion.rows import Row, Targets
from tests.tiny import PADDED, ExplicitAttention, make_model, model_config, one_process

LENGTH = 27


def as_row(tokens: torch.Tensor, block: int) -> Row:
    """A clean text of one group, read at every slot."""
    position, zero = torch.arange(len(tokens), dtype=torch.int32), torch.zeros(len(tokens), dtype=torch.int32)
    targets = Targets(position.long(), tokens, torch.ones(len(tokens)), zero.long(), position.long())
    return Row(tokens, Layout(zero, zero, zero + CLEAN, position // block, position), targets).to(platform.device())


def twin(model, theta: float):
    """A Qwen3 with our weights: qkv is stored by key/value group, [queries | key | value], fc1 as [gate; up]."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    other = (
        transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=PADDED,
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=heads,
                num_key_value_heads=groups,
                head_dim=width,
                rms_norm_eps=config.layernorm_epsilon,
                tie_word_embeddings=False,
                rope_theta=theta,
                rope_parameters={"rope_type": "default", "rope_theta": theta},
                attention_bias=False,
                attn_implementation="sdpa",
                max_position_embeddings=256,
            )
        )
        .to(config.params_dtype)
        .eval()
    )
    ours = {name: value.detach().cpu() for name, value in model.named_parameters()}
    weights = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for layer in range(config.num_layers):
        mine, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        by_group = ours[mine + "self_attention.linear_qkv.weight"].view(
            groups, heads // groups + 2, width, config.hidden_size
        )
        for name, part in {"q": by_group[:, :-2], "k": by_group[:, -2:-1], "v": by_group[:, -1:]}.items():
            weights[f"{theirs}self_attn.{name}_proj.weight"] = part.reshape(-1, config.hidden_size)
        gate, up = ours[mine + "mlp.linear_fc1.weight"].chunk(2)
        weights |= {
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": ours[mine + "mlp.linear_fc2.weight"],
            theirs + "self_attn.o_proj.weight": ours[mine + "self_attention.linear_proj.weight"],
            theirs + "self_attn.q_norm.weight": ours[mine + "self_attention.q_layernorm.weight"],
            theirs + "self_attn.k_norm.weight": ours[mine + "self_attention.k_layernorm.weight"],
            theirs + "input_layernorm.weight": ours[mine + "input_layernorm.weight"],
            theirs + "post_attention_layernorm.weight": ours[mine + "pre_mlp_layernorm.weight"],
        }
    assert sum(value.numel() for value in weights.values()) == sum(value.numel() for value in ours.values())
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize("block", [1, 4])
def test_logits_are_those_of_qwen3(block: int) -> None:
    """Block size 1 is an autoregressive model; larger ones are Qwen3 under a block-causal mask."""
    model = make_model(torch.float32, num_layers=3, rotary_base=5e4, hidden_size=48)
    other = twin(model, 5e4)
    tokens = torch.randint(0, 50, (LENGTH,), generator=torch.Generator().manual_seed(block))
    blocks = torch.arange(LENGTH) // block
    mask = torch.where(blocks[None, :] <= blocks[:, None], 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        expected = other(input_ids=tokens[None], attention_mask=None if block == 1 else mask).logits[0]
        found = model.forward_row(as_row(tokens, block)).cpu()
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


def parameters(layers: int, **changes: object) -> int:
    """Parameters of a preset with another number of layers, counted on a model without storage."""
    groups = one_process()
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, resolve, transformer_config

    config = resolve(ModelConfig(num_layers=layers, **changes), None)
    megatron = transformer_config(config, ParallelConfig(), use_cpu_initialization=True, perform_initialization=False)
    with platform.cuda_calls_on_cpu(), torch.device("meta"):
        model = BlockDiffusionModel(megatron, model_shape(config), groups.pg_collection)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "preset, layers, billions",
    [("sdar-1.7b", 28, 2.03), ("sdar-4b", 36, 4.41), ("sdar-8b", 36, 8.19), ("sdar-30b-a3b", 48, 30.5)],
)
def test_presets_have_the_published_number_of_parameters(preset: str, layers: int, billions: float) -> None:
    from megatron_dlm.model.presets import PRESETS

    assert PRESETS[preset]["num_layers"] == layers
    one, two = (parameters(count, model_preset=preset, make_vocab_size_divisible_by=1) for count in (1, 2))
    assert (one + (layers - 1) * (two - one)) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(
    "preset, layers, tensors",
    [("llada-8b", 32, 8_015_581_184), ("dream-7b", 28, 7_615_616_512), ("llada2-mini", 20, 16_255_643_392)],
)
def test_presets_have_exactly_the_published_number_of_values(preset: str, layers: int, tensors: int) -> None:
    """Those of the released checkpoints, whose LLaDA2 counts a bias for each expert of a layer too."""
    from megatron_dlm.model.presets import PRESETS

    assert PRESETS[preset]["num_layers"] == layers
    two, three = (parameters(count, model_preset=preset) for count in (2, 3))
    biases = 256 * (layers - 1) if preset == "llada2-mini" else 0
    assert two + (layers - 2) * (three - two) + biases == tensors


def test_a_mixture_of_experts_is_the_sum_over_the_chosen_experts() -> None:
    """Router of one layer by hand: softmax over all experts, the two best, renormalised (Qwen3-MoE)."""
    model = make_model(torch.float32, num_layers=1, num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24)
    mlp = model.decoder.layers[0].mlp
    hidden = torch.randn(LENGTH, 1, 32, generator=torch.Generator().manual_seed(0)).to(platform.device())
    output = mlp(hidden)[0][:, 0]
    expected = torch.zeros_like(output)
    for token, state in enumerate(hidden[:, 0]):
        probability = (mlp.router.weight @ state).softmax(0)
        best = probability.topk(2).indices.tolist()
        for expert in best:
            weights = mlp.experts.local_experts[expert]
            gate, up = (weights.linear_fc1.weight @ state).chunk(2)
            share = probability[expert] / sum(probability[one] for one in best)
            expected[token] += share * (weights.linear_fc2.weight @ (torch.nn.functional.silu(gate) * up))
    assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_mixture_of_experts_learns() -> None:
    model = make_model(torch.float32, num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24)
    tokens = torch.randint(0, 50, (LENGTH,), generator=torch.Generator().manual_seed(1))
    row = as_row(tokens, 4)
    loss = torch.nn.functional.cross_entropy(model.forward_row(row), row.tokens)
    loss.backward()
    assert torch.isfinite(loss)
    missing = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.norm() > 0
    ]
    assert not missing


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = (make_model(torch.float32, untie_embeddings_and_output_weights=untie) for untie in (False, True))
    count = lambda model: sum(parameter.numel() for parameter in model.parameters())
    assert count(untied) - count(tied) == PADDED * model_config().hidden_size
    tokens = torch.arange(LENGTH)
    states = []
    tied.output_layer.register_forward_hook(lambda *_: states.append("used"))
    from megatron_dlm.model.row_params import RowParams

    position = torch.arange(LENGTH)
    blocks = position // 4
    params = RowParams(
        position=position.to(platform.device()),
        slots=position.to(platform.device()),
        attention=ExplicitAttention((blocks[None] <= blocks[:, None]).to(platform.device())),
    )
    with torch.no_grad():
        tied.embedding.word_embeddings.weight[7] = 0
        logits = tied.forward_tokens(tokens.to(platform.device()), params)
    assert not states and (logits[:, 7] == 0).all() and (logits[:, 8] != 0).any()
