"""Which tokenizer a run uses, and how a question becomes a prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TokenIdsConfig:
    """The tokenizer of a command that reads token ids only."""

    tokenizer_model: str | None = None
    """Folder of a tokenizer; that of the checkpoint when it is not given."""
    mask_token_id: int | None = None
    """Id of the mask token; that of the checkpoint, else of the tokenizer, when it is not given."""


@dataclass(slots=True)
class TokenizerConfig(TokenIdsConfig):
    """The tokenizer, and how a question becomes a prompt."""

    apply_chat_template: bool = False
    """Wrap each prompt in the tokenizer's chat template."""
    prompt_template: str = "{question}"
    """Text of a prompt; {question} stands for the question."""
    response_prefix: str | None = None
    """What every response begins with, put at the end of the prompts that are made of questions and conversations
    (behind the header of the chat template, unless that ends so already): "<think>\\n", say. A response to learn that
    begins so loses it."""
