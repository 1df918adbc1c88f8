"""The families of models, written out in plain torch from their formulas, under the tensor names of their checkpoints.

One text at a time, [T] tokens in, [T, V] logits out: those that the model gives for the token at each position (a
family that predicts one position ahead has its logits moved back here). Everything is computed in the dtype of the
weights.
`config` is the mapping that stands in the config.json of such a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]

# Small configurations of each family: only what the formulas need, and what an importer reads
LLADA: dict[str, Any] = dict(
    architectures=["LLaDAModelLM"], model_type="llada", activation_type="silu", alibi=False, attention_layer_norm=False,
    block_group_size=1, block_type="llama", d_model=32, embedding_size=64, vocab_size=64, n_layers=2, n_heads=4,
    n_kv_heads=4, mlp_hidden_size=48, mlp_ratio=4, max_sequence_length=256, include_bias=False, include_qkv_bias=False,
    layer_norm_type="rms", rms_norm_eps=1e-5, rope=True, rope_full_precision=True, rope_theta=5e4,
    input_emb_norm=False, scale_logits=False, weight_tying=False, mask_token_id=51, eos_token_id=49, pad_token_id=49,
)  # fmt: skip
DREAM: dict[str, Any] = dict(
    architectures=["DreamModel"], model_type="Dream", hidden_act="silu", hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e4,
    rope_scaling=None, max_position_embeddings=256, vocab_size=64, tie_word_embeddings=False, use_sliding_window=False,
    mask_token_id=51, bos_token_id=49, eos_token_id=49, pad_token_id=49,
)  # fmt: skip
LLADA2: dict[str, Any] = dict(
    architectures=["LLaDA2MoeModelLM"], model_type="llada2_moe", hidden_act="silu", hidden_size=32,
    intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    first_k_dense_replace=1, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=24, num_shared_experts=1,
    n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, score_function="sigmoid",
    moe_router_enable_expert_bias=True, router_dtype="fp32", partial_rotary_factor=0.5, rotary_dim=8, rope_theta=6e3,
    rope_scaling=None, use_qk_norm=True, use_qkv_bias=False, use_bias=False, rms_norm_eps=1e-6, norm_head=False,
    max_position_embeddings=256, sliding_window=4096, use_sliding_window=False, tie_word_embeddings=False,
    vocab_size=64, pad_token_id=50,
)  # fmt: skip


def llada_logits(weights: Weights, config: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """LLaDA: every token sees the whole text."""
    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    x = weights["model.transformer.wte.weight"][tokens]
    eps, heads = config["rms_norm_eps"], config["n_heads"]
    width = config["d_model"] // heads
    angles = _angles(len(tokens), width, config["rope_theta"], x.dtype)
    for layer in range(config["n_layers"]):
        w = _below(weights, f"model.transformer.blocks.{layer}.")
        h = _norm(x, w["attn_norm.weight"], eps)
        q, k, v = (_heads(h @ w[f"{name}_proj.weight"].T, width) for name in "qkv")
        x = x + _attend(_turn(q, angles), _turn(k, angles), v, seen) @ w["attn_out.weight"].T
        h = _norm(x, w["ff_norm.weight"], eps)
        x = x + _feed_forward(h, w["ff_proj.weight"], w["up_proj.weight"], w["ff_out.weight"])
    return _norm(x, weights["model.transformer.ln_f.weight"], eps) @ weights["model.transformer.ff_out.weight"].T


def dream_logits(weights: Weights, config: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Dream and DiffuCoder: every token sees the whole text; the token at i is read at i - 1, the first at itself."""
    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    x = weights["model.embed_tokens.weight"][tokens]
    eps, width = config["rms_norm_eps"], config["hidden_size"] // config["num_attention_heads"]
    angles = _angles(len(tokens), width, config["rope_theta"], x.dtype)
    for layer in range(config["num_hidden_layers"]):
        w = _below(weights, f"model.layers.{layer}.")
        h = _norm(x, w["input_layernorm.weight"], eps)
        q, k, v = (
            _heads(h @ w[f"self_attn.{name}_proj.weight"].T + w[f"self_attn.{name}_proj.bias"], width) for name in "qkv"
        )
        x = x + _attend(_turn(q, angles), _turn(k, angles), v, seen) @ w["self_attn.o_proj.weight"].T
        h = _norm(x, w["post_attention_layernorm.weight"], eps)
        x = x + _feed_forward(h, *(w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    logits = _norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
    return torch.cat([logits[:1], logits[:-1]])


def llada2_logits(weights: Weights, config: Mapping[str, Any], tokens: Tensor, block_size: int = 4) -> Tensor:
    """LLaDA2: a token sees its block, and those before it."""
    block = torch.arange(len(tokens)) // block_size
    seen = block[None, :] <= block[:, None]
    x = weights["model.word_embeddings.weight"][tokens]
    eps, width = config["rms_norm_eps"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    turned = int(width * config["partial_rotary_factor"])
    angles = _angles(len(tokens), turned, config["rope_theta"], x.dtype)
    for layer in range(config["num_hidden_layers"]):
        w = _below(weights, f"model.layers.{layer}.")
        h = _norm(x, w["input_layernorm.weight"], eps)
        qkv = _heads(h @ w["attention.query_key_value.weight"].T, width)  # all queries, then keys, then values
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]
        q, k = _norm(q, w["attention.query_layernorm.weight"], eps), _norm(k, w["attention.key_layernorm.weight"], eps)
        q, k = (torch.cat([_turn(a[..., :turned], angles), a[..., turned:]], dim=-1) for a in (q, k))
        x = x + _attend(q, k, v, seen) @ w["attention.dense.weight"].T
        h = _norm(x, w["post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            x = x + _feed_forward(h, *(w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
        else:
            x = x + torch.stack([_llada2_experts(state, w, config) for state in h])
    return _norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def _llada2_experts(state: Tensor, w: Weights, config: Mapping[str, Any]) -> Tensor:
    """One token [H] through its experts: scores choose with the bias, and weigh without it."""
    score = torch.sigmoid(w["mlp.gate.weight"] @ state)
    choice = score + w["mlp.gate.expert_bias"].to(score.dtype)
    size = config["num_experts"] // config["n_group"]
    rank = sorted(
        range(config["n_group"]), key=lambda g: -choice[g * size : (g + 1) * size].sort(descending=True)[0][:2].sum()
    )
    allowed = [expert for group in rank[: config["topk_group"]] for expert in range(group * size, (group + 1) * size)]
    chosen = sorted(allowed, key=lambda expert: -choice[expert])[: config["num_experts_per_tok"]]
    total = sum(score[expert] for expert in chosen) + 1e-20
    names = ("gate", "up", "down")
    out = _feed_forward(state, *(w[f"mlp.shared_experts.{name}_proj.weight"] for name in names))
    for expert in chosen:
        share = config["routed_scaling_factor"] * score[expert] / total
        out = out + share * _feed_forward(state, *(w[f"mlp.experts.{expert}.{name}_proj.weight"] for name in names))
    return out


def random_llada_weights(config: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Every tensor of a LLaDA checkpoint, drawn so wide that distributions are far from flat."""
    hidden, inner = config["d_model"], config["mlp_hidden_size"]
    groups = hidden // config["n_heads"] * config["n_kv_heads"]
    shapes = {
        "model.transformer.wte.weight": (config["embedding_size"], hidden),
        "model.transformer.ln_f.weight": (hidden,),
        "model.transformer.ff_out.weight": (config["embedding_size"], hidden),
    }
    for layer in range(config["n_layers"]):
        own = {
            "attn_norm": (hidden,), "q_proj": (hidden, hidden), "k_proj": (groups, hidden), "v_proj": (groups, hidden),
            "attn_out": (hidden, hidden), "ff_norm": (hidden,), "ff_proj": (inner, hidden), "up_proj": (inner, hidden),
            "ff_out": (hidden, inner),
        }  # fmt: skip
        shapes |= {f"model.transformer.blocks.{layer}.{name}.weight": shape for name, shape in own.items()}
    return _draw(shapes, seed, dtype)


def random_dream_weights(config: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Every tensor of a Dream checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    groups = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        own = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden), "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (groups, hidden), "self_attn.k_proj.bias": (groups,),
            "self_attn.v_proj.weight": (groups, hidden), "self_attn.v_proj.bias": (groups,),
            "self_attn.o_proj.weight": (hidden, hidden), "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden), "mlp.down_proj.weight": (hidden, inner),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return _draw(shapes, seed, dtype)


def random_llada2_weights(config: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Every tensor of a LLaDA2 checkpoint; the expert bias is in float32 and large enough to change the choice."""
    hidden, width, experts = config["hidden_size"], config["head_dim"], config["num_experts"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {
        "model.word_embeddings.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }

    def feed_forward(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (inner, hidden),
            f"{prefix}.up_proj.weight": (inner, hidden),
            f"{prefix}.down_proj.weight": (hidden, inner),
        }

    for layer in range(config["num_hidden_layers"]):
        own = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "attention.query_key_value.weight": ((heads + 2 * groups) * width, hidden),
            "attention.query_layernorm.weight": (width,), "attention.key_layernorm.weight": (width,),
            "attention.dense.weight": (hidden, heads * width),
        }  # fmt: skip
        if layer < config["first_k_dense_replace"]:
            own |= feed_forward("mlp", config["intermediate_size"])
        else:
            inner = config["moe_intermediate_size"]
            own |= {"mlp.gate.weight": (experts, hidden), "mlp.gate.expert_bias": (experts,)}
            own |= feed_forward("mlp.shared_experts", inner * config["num_shared_experts"])
            for expert in range(experts):
                own |= feed_forward(f"mlp.experts.{expert}", inner)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    weights = _draw(shapes, seed, dtype)
    return {name: value.float() if name.endswith("expert_bias") else value for name, value in weights.items()}


def _draw(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    is_norm = lambda name: len(shapes[name]) == 1 and name.endswith(".weight")
    return {name: (1 + 0.2 * x if is_norm(name) else 0.3 * x).to(dtype) for name, x in noise.items()}


def _below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def _heads(x: Tensor, width: int) -> Tensor:
    """[T, n * width] -> [T, n, width]."""
    return x.view(len(x), -1, width)


def _angles(length: int, width: int, theta: float, dtype: torch.dtype) -> Tensor:
    """[T, width / 2]: channel j and channel j + width / 2 turn by position * theta^(-2 j / width)."""
    speed = torch.tensor([theta ** (-2 * j / width) for j in range(width // 2)], dtype=torch.float64)
    return (torch.arange(length)[:, None] * speed).to(dtype)


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """[T, n, d], [T, g, d], [T, g, d] -> [T, n * d]; head j uses key/value head j // (n / g)."""
    sharing = q.shape[1] // k.shape[1]
    out = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // sharing].T / math.sqrt(q.shape[-1])
        out.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, head // sharing])
    return torch.cat(out, dim=-1)


def _feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
