"""The plain way to generate: one sequence at a time, block by block, with a KV cache. Nothing but PyTorch.

This is what the engine is measured against (benchmarks/rollout.py): a model of Qwen3's and SDAR's shape, and the loop
that scripts around such models have. It is written for speed as far as that does not change the idea: the cache is
allocated once and written in place, a block's keys and values stand in it from the first denoising step on, the head
sees the block alone and is left out where a block is only committed, and so is the commit of the last block.

    prefill of the prompt's full blocks, then for each block:
        up to `denoising_steps` forwards of its tokens; each unmasks some of them
        one more forward, the commit, which leaves the finished block's keys and values in the cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Uniform = Callable[[Tensor, int], Tensor]
"""(positions int64 [B], denoising steps taken so far) -> a uniform number in [0, 1) for each."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model. `vocab_size` counts real tokens; the embedding may have more rows."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rotary_base: float
    epsilon: float
    tied: bool


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a response is drawn; temperature 0 is greedy, top_k 0 and top_p 1 keep all tokens.

    At the n-th step of a block its B / denoising_steps most confident positions are unmasked (the remainder is spread
    over the first steps); 'dynamic' adds all whose confidence is above the threshold.
    """

    mask_id: int
    max_new_tokens: int
    block_size: int = 4
    denoising_steps: int = 4
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    remasking: str = "static"
    threshold: float = 0.9
    stop_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Response:
    """One response with the rest of its last block.

    Attributes:
        tokens: after the prompt. length: how many of them are the response.
        steps: 1-based denoising step of the response at which each was unmasked.
        denoising, commits: forwards of either kind.
    """

    tokens: list[int]
    length: int
    steps: list[int]
    denoising: int
    commits: int


class Layer(nn.Module):
    """Attention and feed-forward, both behind a norm; queries and keys are normed head by head, then turned."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        wide = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False, dtype=dtype)
        norm = lambda width: nn.RMSNorm(width, shape.epsilon, dtype=dtype)
        hidden, inner = shape.hidden_size, shape.heads * shape.head_dim
        self.input_norm, self.post_norm = norm(hidden), norm(hidden)
        self.q_norm, self.k_norm = norm(shape.head_dim), norm(shape.head_dim)
        self.qkv_proj = wide(hidden, inner + 2 * shape.kv_heads * shape.head_dim)
        self.o_proj = wide(inner, hidden)
        self.gate_up_proj = wide(hidden, 2 * shape.ffn_hidden_size)
        self.down_proj = wide(shape.ffn_hidden_size, hidden)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Tensor, start: int, mask: Tensor | None) -> Tensor:
        """x: [T, h], the tokens from position `start` on. cache: [2, kv heads, L, d], written there and read up to the
        end of x. mask: bool [T, T], or None where all of x sees all of the cache and of x.
        """
        shape, tokens = self.shape, len(x)
        heads = self.qkv_proj(self.input_norm(x)).view(tokens, -1, shape.head_dim).transpose(0, 1)
        q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads])
        end = start + tokens
        cache[0, :, start:end] = _turned(self.k_norm(k), turn)
        cache[1, :, start:end] = v
        q = _turned(self.q_norm(q), turn)
        if mask is None:
            # The heads that share keys see the same ones: they are queries of one head.
            q = q.reshape(1, shape.kv_heads, -1, shape.head_dim)
        out = F.scaled_dot_product_attention(
            q.view(1, -1, q.shape[-2], shape.head_dim),
            cache[:1, :, :end],
            cache[1:, :, :end],
            attn_mask=mask,
            enable_gqa=mask is not None,
        )
        x = x + self.o_proj(out.view(shape.heads, tokens, shape.head_dim).transpose(0, 1).reshape(tokens, -1))
        gate, up = self.gate_up_proj(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class PlainModel(nn.Module):
    """A block-diffusion transformer of Qwen3's shape."""

    def __init__(self, shape: Shape, dtype: torch.dtype, longest: int) -> None:
        super().__init__()
        self.shape, self.dtype, self.longest = shape, dtype, longest
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Layer(shape, dtype) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.epsilon, dtype=dtype)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False, dtype=dtype)
        if shape.tied:
            self.head.weight = self.embedding.weight
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        exponent = torch.arange(0, shape.head_dim, 2, dtype=wide) / shape.head_dim
        angles = torch.arange(longest, dtype=wide)[:, None] / shape.rotary_base**exponent
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cosine", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sine", angles.sin().to(dtype), persistent=False)

    def new_cache(self) -> Tensor:
        """[layers, 2, kv heads, longest, d]."""
        shape = self.shape
        return self.cosine.new_empty(shape.num_layers, 2, shape.kv_heads, self.longest, shape.head_dim)

    def forward(self, tokens: Tensor, cache: Tensor, start: int, mask: Tensor | None = None) -> Tensor:
        """Hidden states [T, h] of tokens [T] from position `start` on; their keys and values are left in the cache."""
        turn = self.cosine[start : start + len(tokens)], self.sine[start : start + len(tokens)]
        x = self.embedding(tokens)
        for layer, its_cache in zip(self.layers, cache):
            x = layer(x, turn, its_cache, start, mask)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, h] -> [T, V], float32 or better."""
        logits = self.head(self.norm(hidden))
        return logits if logits.dtype == torch.float64 else logits.float()


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on [heads, T, d]."""
    cosine, sine = turn
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-right, left], dim=-1) * sine


def weights_of(parameters: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """A PlainModel's state from the parameters of a BlockDiffusionModel on one rank.

    Its fused projection holds, for each key-value head, the query heads that use it, the key head, and the value head;
    here all query heads come first, then all key heads, then all value heads. Rows that pad the vocabulary are cut off.

    Raises:
        ValueError: parameters that the plain model has no place for.
    """
    left, found = dict(parameters), {}

    def take(theirs: str, ours: str) -> None:
        found[ours] = left.pop(theirs)

    take("embedding.word_embeddings.weight", "embedding.weight")
    found["embedding.weight"] = found["embedding.weight"][: shape.vocab_size]
    if shape.tied:
        found["head.weight"] = found["embedding.weight"]
    else:
        take("output_layer.weight", "head.weight")
        found["head.weight"] = found["head.weight"][: shape.vocab_size]
    take("decoder.final_layernorm.weight", "norm.weight")
    for n in range(shape.num_layers):
        theirs, ours = f"decoder.layers.{n}.", f"layers.{n}."
        fused = left.pop(theirs + "self_attention.linear_qkv.weight")
        grouped = fused.view(shape.kv_heads, -1, shape.head_dim, shape.hidden_size)
        parts = grouped.split([shape.heads // shape.kv_heads, 1, 1], dim=1)
        found[ours + "qkv_proj.weight"] = torch.cat([part.reshape(-1, shape.hidden_size) for part in parts])
        take(theirs + "input_layernorm.weight", ours + "input_norm.weight")
        take(theirs + "pre_mlp_layernorm.weight", ours + "post_norm.weight")
        take(theirs + "self_attention.q_layernorm.weight", ours + "q_norm.weight")
        take(theirs + "self_attention.k_layernorm.weight", ours + "k_norm.weight")
        take(theirs + "self_attention.linear_proj.weight", ours + "o_proj.weight")
        take(theirs + "mlp.linear_fc1.weight", ours + "gate_up_proj.weight")  # [gate; up] in both
        take(theirs + "mlp.linear_fc2.weight", ours + "down_proj.weight")
    if left:
        raise ValueError(f"the plain model has no place for {sorted(left)[:4]}")
    return found


@torch.no_grad()
def plain_model(parameters: Mapping[str, Tensor], shape: Shape, longest: int) -> PlainModel:
    """A PlainModel with a copy of these weights, for texts of up to `longest` tokens."""
    weight = parameters["embedding.word_embeddings.weight"]
    with torch.device(weight.device):
        model = PlainModel(shape, weight.dtype, longest)
    model.load_state_dict(weights_of(parameters, shape))
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def generate(model: PlainModel, prompt: Sequence[int], decoding: Decoding, uniform: Uniform | None = None) -> Response:
    """One response.

    Args:
        uniform: where the random numbers come from; torch's own by default.
    """
    block, first, device = decoding.block_size, len(prompt), model.cosine.device
    text = torch.tensor(prompt, device=device)
    start, limit = first // block * block, first + decoding.max_new_tokens
    cache = model.new_cache()
    if start:
        blocks = torch.arange(start, device=device) // block
        model(text[:start], cache, 0, blocks[None, :] <= blocks[:, None])
    tokens, steps, commits = list(prompt), [0] * first, 0
    taken = 0
    while True:
        end = start + block
        shown = torch.full((block,), decoding.mask_id, device=device)
        shown[: len(tokens) - start] = torch.tensor(tokens[start:], device=device)
        masked = list(range(len(tokens) - start, block))
        tokens += [decoding.mask_id] * len(masked)
        steps += [0] * len(masked)
        position = torch.arange(start, end, device=device)
        for step in range(decoding.denoising_steps):
            logits = model.logits(model(shown, cache, start))
            logits[:, decoding.mask_id] = float("-inf")
            numbers = uniform(position, taken) if uniform else torch.rand(block, device=device, dtype=logits.dtype)
            token, confidence = draw(logits, numbers, decoding)
            taken += 1
            drawn = token.tolist()
            for column in unmasked(masked, confidence.tolist(), step, decoding):
                tokens[start + column], steps[start + column] = drawn[column], taken
                masked.remove(column)
            if not masked:
                break
            shown = torch.tensor(tokens[start:], device=device)
        stop = next(
            (n for n in range(max(start, first), min(end, limit)) if tokens[n] in decoding.stop_token_ids), None
        )
        if stop is not None or end >= limit:
            length = limit - first if stop is None else stop + 1 - first
            return Response(tokens[first:], length, steps[first:], taken, commits)
        model(torch.tensor(tokens[start:], device=device), cache, start)
        commits += 1
        start = end


def draw(logits: Tensor, uniform: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """A token at each position, and the probability with which it was drawn (greedy: of the softmax); both [B].

    Args:
        logits: [B, V], -inf where nothing may be drawn.
    """
    if decoding.temperature == 0:
        confidence, token = logits.softmax(-1).max(-1)
        return token, confidence
    probability = (logits / decoding.temperature).softmax(-1)
    if decoding.top_k or decoding.top_p < 1:
        best, index = probability.topk(decoding.top_k) if decoding.top_k else probability.sort(-1, descending=True)
        before = (best / best.sum(-1, keepdim=True)).cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        best = torch.where(before < decoding.top_p, best, 0) if decoding.top_p < 1 else best
        best /= best.sum(-1, keepdim=True)
        probability = torch.zeros_like(probability).scatter_(1, index, best)
    cumulative = probability.cumsum(-1)
    goal = uniform.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, goal, right=True).clamp_(max=logits.shape[-1] - 1)
    return token[:, 0], probability.gather(1, token)[:, 0]


def unmasked(masked: Sequence[int], confidence: Sequence[float], step: int, decoding: Decoding) -> list[int]:
    """The columns of a block that its `step`-th denoising step (0-based) unmasks; at the last one all that are left."""
    if step == decoding.denoising_steps - 1:
        return list(masked)
    count, rest = divmod(decoding.block_size, decoding.denoising_steps)
    surest = sorted(masked, key=lambda column: (-confidence[column], column))
    count += step < rest
    if decoding.remasking == "dynamic":
        count = max(count, sum(confidence[column] > decoding.threshold for column in masked))
    return surest[:count]
