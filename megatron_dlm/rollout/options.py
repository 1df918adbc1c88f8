"""What an engine is built with: how much it works on at once, in how much memory, and by which means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Attributes:
    max_running_requests: sequences in flight.
    max_length: longest text in tokens, prompt and terminal block included.
    max_tokens_per_pass: token budget of a pass. Prompts are cut into chunks to fit it; sequences that do not fit take
        turns.
    page_size: tokens per page of the KV cache; it need not have anything to do with block sizes.
    kv_cache_bytes: memory of the KV cache; None is what `max_running_requests` longest texts need.
    full_attention: the model has one attention block for the whole text (LLaDA, Dream).
    attention_backend: a name of rollout/attention.BACKENDS.
    share_prompts, fuse_commit, masked_head: switches of what saves work and changes no result: the full blocks of a
        prompt are computed once for all its responses; a finished block is committed together with the first
        denoising step of the next one; head and softmax run at masked positions only.
    rounds_per_sync: denoising rounds that are made before the host looks at what became of them, where nobody waits to
        be let in. On a GPU the device then never waits for the host; sequences that end in between idle.
    cuda_graphs: such rounds are captured and replayed, whole with fused_sampler, else their forward passes; their width
        and the number of keys are rounded up to few values.
    fused_sampler: tokens are drawn and unmasked by kernels in Triton (Denoiser).
    longest_first: waiting requests with the most tokens left start first, so that no long one is left over at the end.
    """

    max_running_requests: int
    max_length: int
    max_tokens_per_pass: int = 8192
    page_size: int = 16
    kv_cache_bytes: int | None = None
    full_attention: bool = False
    attention_backend: str = "sdpa"
    share_prompts: bool = True
    fuse_commit: bool = True
    masked_head: bool = True
    longest_first: bool = False
    rounds_per_sync: int = 1
    cuda_graphs: bool = False
    fused_sampler: bool = False
