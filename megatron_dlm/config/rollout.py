"""How responses are generated: how many, how long, and in which order their tokens are unmasked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class CapacityConfig:
    """How much the engine works on at once, and by which means."""

    max_running_requests: int = 256
    """Responses that one engine works on at the same time."""
    max_tokens_per_pass: int | None = None
    """Most tokens in one pass of the engine; when its responses need more, they take turns, and prompts are cut into
    chunks. 8192 on a GPU and 1024 on a CPU when it is not given."""
    kv_page_size: int = 16
    """Tokens per page of the KV cache."""
    kv_cache_gib: float | None = None
    """Memory for the KV cache of each process, in GiB; a share of what is free when it is not given."""
    kv_cache_memory_fraction: float = 0.5
    """Share of the free memory that the KV cache may take, if it needs so much. What the optimizer is still to take
    does not count as free."""
    rollout_rounds_per_sync: int | None = None
    """Denoising rounds that the device makes before the host looks what became of them, while no response waits to be
    started; 4 on a GPU and 1 on a CPU when it is not given. Always 1 under full attention or a logit shift, for
    responses of different block sizes, and for engines that share experts."""
    rollout_cuda_graphs: bool = False
    """Capture these rounds as CUDA graphs, with the sampler where that is triton; with --rollout-attention-backend
    flash, on a GPU."""
    rollout_weights: Literal["trained", "fp8"] = "trained"
    """What the engine keeps of the weights of the layers' matrices: them as they are trained, or e4m3 numbers with a
    scale per row, half as many bytes, which it multiplies in FP8 with activations that are rounded likewise; with
    --bf16."""
    rollout_sampler: Literal["auto", "torch", "triton"] = "auto"
    """What draws tokens and decides which of them are unmasked: torch's operations, or kernels in Triton, which read
    the logits once, and some times more for responses with top-k or top-p; float64 is torch's in both. auto is triton
    on a GPU where it does what torch does in a small round, which is tried at the start, and torch elsewhere."""
    longest_first: bool = False
    """Start the responses that have most tokens left before others; those of an earlier step come before new ones."""
    rollout_attention_backend: Literal["auto", "sdpa", "flex", "flash", "flashinfer"] = "auto"
    """What computes attention over the pages of the KV cache: torch's own kernels (sdpa, or flex, which it compiles),
    FlashAttention (3, or 2 with pages of 256 tokens), or FlashInfer. auto is one of the last two where they work, and
    sdpa elsewhere."""


@dataclass(slots=True)
class EngineConfig(CapacityConfig):
    """What every generation needs: the room for texts, and the block in which they grow."""

    rollout_max_prompt_len: int = 1024
    """Longest prompt, in tokens."""
    rollout_max_response_len: int = 256
    """Longest response, in tokens."""
    rollout_block_size: int | None = None
    """Block in which tokens are generated; the attention block size when it is not given."""
    stop_token_ids: list[int] | None = None
    """Token ids that end a response; the tokenizer's end token when they are not given."""
    prefix_cache: bool = True
    """Under full attention, read the text before a block once per block, not at each of its steps."""
    horizon: int | None = None
    """Under full attention, how many positions after the block a model sees as masks; all that are left when it is not
    given."""
    rollout_tensor_model_parallel_size: int | None = None
    """Number of processes that share each layer of the engine's model; as in training when it is not given."""
    rollout_expert_model_parallel_size: int | None = None
    """Number of processes that share the experts of the engine's model; as in training when it is not given."""
    refit_bucket_mib: int = 512
    """Most memory, in MiB, that a process uses while weights are carried to an engine of another layout."""
    verify_refit: bool = False
    """Compare all weights of the engine with those of training each time they are carried to it."""
    rollout_backend: Literal["native", "sglang"] = "native"
    """Who generates: the engine of this package, in the training processes, or SGLang, in processes beside them."""
    sglang_python: str | None = None
    """Python of the environment that SGLang is installed in; it needs nothing of this package."""
    sglang_mem_fraction_static: float = 0.4
    """Share of a device's memory that SGLang takes for its weights and its cache, beside those of training."""


@dataclass(slots=True)
class RolloutConfig(EngineConfig):
    """How responses are generated in training."""

    rollout_batch_size: int = 64
    """Prompts per RL step."""
    over_sampling_batch_size: int | None = None
    """Prompts that an RL step works on; it is over, and the rest is stopped, when --rollout-batch-size of them have all
    their responses. When it is not given, a step waits for all."""
    partial_rollout: bool = False
    """Keep the responses that over-sampling stops, and go on with them in the next step, by the weights of then.
    Without it they are dropped, and their prompts start anew in the next step."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Learn nothing of the tokens that were decided in earlier steps, by older weights."""
    n_samples_per_prompt: int = 16
    """Responses per prompt."""
    rollout_temperature: float = 1.0
    """Sampling temperature, above 0."""
    rollout_top_k: int = 0
    """Sample among this many likeliest tokens; 0 is all of them."""
    rollout_top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability."""
    remasking: Literal["static", "dynamic", "sequential", "entropy_bounded"] = "dynamic"
    """Tokens that a denoising step unmasks: the surest at a fixed rate, all above the threshold, left to right, or as
    many of the least uncertain as the entropy bound allows."""
    denoising_steps: int | None = None
    """Denoising steps per block; the block size (one token per step) when it is not given."""
    threshold: float = 0.9
    """Confidence above which dynamic remasking unmasks a token."""
    confidence: Literal["sampled", "untempered", "margin", "entropy"] = "sampled"
    """What makes a token sure: its probability when it was drawn, that without temperature and filters, the lead of the
    likeliest token, or a low entropy, which is what entropy-bounded remasking always goes by."""
    entropy_bound: float = 0.35
    """Entropy, in nats, below which the tokens that entropy-bounded remasking unmasks together must stay in sum."""
