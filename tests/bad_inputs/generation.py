"""`generate` and `score`: their settings and the files they read and write."""

from __future__ import annotations

from tests.bad_inputs.bench import Bad, edit_line, folder_at, line, remove, text, truncate

MASK = "<|MASK|>"


def _prompts(id: str, record: object, says: str | tuple[str, ...]) -> Bad:
    return Bad(
        id,
        "generate",
        "",
        ("prompts.jsonl, line 3", *([says] if isinstance(says, str) else says)),
        write=line("prompts.jsonl", record),
        kind="DataError",
    )


def _trace(id: str, says: str | tuple[str, ...], **changes: object) -> Bad:
    """A line of responses.jsonl with other values."""
    return Bad(
        id,
        "score",
        "",
        ("responses.jsonl, line 3", *([says] if isinstance(says, str) else says)),
        write=edit_line("responses.jsonl", 3, **changes),
        kind="DataError",
    )


ENTRIES = [
    Bad("nothing to generate with", "generate", "", "--load is not set", "--load"),
    Bad("nothing to generate for", "generate", "", "--prompts is not set", "--prompts"),
    Bad("nowhere to write responses", "generate", "", "--output is not set", "--output"),
    Bad("nothing to score with", "score", "", "--load is not set", "--load"),
    Bad("nothing to score", "score", "", "--input is not set", "--input"),
    Bad("nowhere to write scores", "score", "", "--output is not set", "--output"),
    Bad("prompts as output", "generate", "--output prompts.jsonl", ("--output prompts.jsonl", "--prompts")),
    Bad("input as output", "score", "--output ./responses.jsonl", ("--output ./responses.jsonl", "--input")),
    Bad("a folder as output", "generate", "--output out", "--output out"),
    Bad("an output below a file", "score", "--output sft.jsonl/x", "--output sft.jsonl/x"),
    Bad("an output in a folder of nobody", "generate", "--output /proc/x.jsonl", "--output /proc/x.jsonl"),
    Bad("no samples", "generate", "--num-samples 0", "--num-samples is 0"),
    Bad("no new tokens", "generate", "--max-new-tokens 0", "--max-new-tokens is 0"),
    Bad(
        "more tokens than positions", "generate", "--max-new-tokens 126", ("128", "--max-new-tokens"), kind="DataError"
    ),
    Bad("a temperature below zero", "generate", "--temperature -0.1", "--temperature is -0.1"),
    Bad("a temperature of a score below zero", "score", "--temperature -0.1", "--temperature is -0.1"),
    Bad("more steps than a block has tokens", "generate", "--denoising-steps 5", ("--denoising-steps 5", "4")),
    Bad("steps of other blocks", "generate", "--rollout-block-size 2 --denoising-steps 3", "--denoising-steps 3"),
    Bad("a block of nothing", "generate", "--rollout-block-size 0", "--rollout-block-size is 0"),
    Bad("an entropy bound below zero", "generate", "--entropy-bound -0.5", "--entropy-bound is -0.5"),
    Bad("a confidence below every threshold", "generate", "--confidence entropy", ("--threshold is 0.9", "below 0")),
    Bad("a horizon under attention blocks", "generate", "--horizon 0", ("--horizon 0", "full attention")),
    Bad("a horizon behind the block", "generate", "--horizon -1", "--horizon is -1"),
    Bad("no prefix cache for blocks", "generate", "--no-prefix-cache", ("--no-prefix-cache", "full attention")),
    Bad("a cache of nothing", "generate", "--kv-cache-gib 0", "--kv-cache-gib is 0"),
    Bad("a cache too small for a text", "generate", "--kv-cache-gib 0.000001", ("too small", "one text", "memory")),
    Bad("all memory and more", "generate", "--kv-cache-memory-fraction 1.5", "--kv-cache-memory-fraction is 1.5"),
    Bad("pages of nothing", "generate", "--kv-page-size 0", "--kv-page-size is 0"),
    Bad("a pass of nothing", "generate", "--max-tokens-per-pass 0", "--max-tokens-per-pass is 0"),
    Bad("graphs of any attention", "generate", "--rollout-cuda-graphs", ("--rollout-cuda-graphs", "flash", "auto")),
    Bad("no rounds", "generate", "--rollout-rounds-per-sync 0", "--rollout-rounds-per-sync is 0"),
    Bad("a stop token that is the mask", "generate", "--stop-token-ids 2 0", "--stop-token-ids 0 is the mask"),
    Bad("rows of nothing", "score", "--max-tokens-per-row 0", "--max-tokens-per-row is 0"),
    Bad("rows too short for a response", "score", "--max-tokens-per-row 4", "--max-tokens-per-row 4", kind="DataError"),
    Bad("a flag of training", "generate", "--lr 1", "--lr"),
    Bad("a seed for a score", "score", "--seed 1", "--seed"),
    Bad("no such file of prompts", "generate", "", "prompts.jsonl", write=remove("prompts.jsonl"), kind="DataError"),
    Bad("no such responses", "score", "", "responses.jsonl", write=remove("responses.jsonl"), kind="DataError"),
    Bad("a generator as prompts", "generate", "--prompts reasoning_gym:chain_sum", "chain_sum", kind="DataError"),
    Bad("an empty file of prompts", "generate", "", "prompts.jsonl", write=text("prompts.jsonl", ""), kind="DataError"),
    Bad("a folder of responses", "score", "", "folder", write=folder_at("responses.jsonl"), kind="DataError"),
    Bad("responses that are cut", "score", "", "not JSON", write=truncate("responses.jsonl"), kind="DataError"),
    Bad(
        "a longer prompt than positions",
        "generate",
        "",
        ("128",),
        write=line("prompts.jsonl", {"prompt": "x " * 200}),
        kind="DataError",
    ),
    _prompts("a prompt without a field", {"text": "1"}, "no prompt"),
    _prompts("an empty prompt", {"question": ""}, "no tokens"),
    _prompts("a mask in a prompt", {"question": MASK}, "mask"),
    _prompts("ids that are text", {"prompt_token_ids": "1 2"}, "'prompt_token_ids'"),
    _prompts("ids outside the vocabulary", {"prompt_token_ids": [1, 100000]}, "100000"),
    _prompts("ids that are negative", {"prompt_token_ids": [-1]}, "-1"),
    _prompts("ids that are fractions", {"prompt_token_ids": [1.5]}, "1.5"),
    _prompts("no ids", {"prompt_token_ids": []}, "no tokens"),
    _prompts("sampling that is a number", {"question": "1", "sampling": 0.5}, "'sampling' is not an object"),
    _prompts("sampling with a slip", {"question": "1", "sampling": {"topk": 5}}, ("'topk'", "Did you mean top_k?")),
    _prompts("sampling of text", {"question": "1", "sampling": {"top_k": "5"}}, ("'top_k'", "whole number")),
    _prompts("sampling out of range", {"question": "1", "sampling": {"top_p": 2}}, "'top_p' is 2.0"),
    _prompts("sampling without steps", {"question": "1", "sampling": {"denoising_steps": 5}}, ("5", "4 tokens")),
    _prompts("sampling by the mask", {"question": "1", "sampling": {"stop_token_ids": [0]}}, "'stop_token_ids' 0"),
    _prompts("sampling without room", {"question": "1", "sampling": {"max_new_tokens": 200}}, "128"),
    Bad(
        "messages without a template",
        "generate",
        "",
        "chat template",
        kind="DataError",
        write=line("prompts.jsonl", {"messages": [{"role": "user", "content": "1"}]}),
    ),
    _trace("a response without ids", "'token_ids' is missing", token_ids=None),
    _trace("a response without steps", "'step_map' is missing", step_map=None),
    _trace("fewer steps than tokens", ("'token_ids'", "'step_map'"), step_map=[1]),
    _trace("steps from zero", ("'step_map'", "0"), token_ids=[1, 2], step_map=[0, 1]),
    _trace("a step beyond counting", "'step_map'", token_ids=[1, 2], step_map=[1, 2**40]),
    _trace("a token outside the vocabulary", "100000", token_ids=[100000], step_map=[1]),
    _trace("a tail of another length", "'tail_token_ids'", tail_token_ids=[1], tail_step_map=[1, 2]),
    _trace("a block size that is text", "'block_size'", block_size="four"),
    _trace("a negative temperature", "'temperature'", temperature=-1),
    _trace("a way of unmasking that is a number", "'remasking'", remasking=1),
    _trace("log-probabilities that are text", "'logprobs'", logprobs="none"),
    Bad("another tokenizer to generate", "generate", "--tokenizer-model nowhere", "nowhere", kind="DataError"),
    Bad("another width to generate", "generate", "--hidden-size 64", "--hidden-size 32", kind="CheckpointError"),
    Bad("another shape to score", "score", "--num-layers 4", "--num-layers 2", kind="CheckpointError"),
    Bad("a checkpoint of nobody", "generate", "--load tokenizer", "tokenizer", kind="CheckpointError"),
    Bad("an iteration of nobody", "generate", "--ckpt-step 7", ("iter_0000007", "--ckpt-step"), kind="CheckpointError"),
    Bad(
        "a damaged checkpoint to score",
        "score",
        "",
        "damaged",
        write=truncate("ckpt/iter_0000002/*.distcp", 0.02),
        kind="CheckpointError",
    ),
]
