"""Which tokenizer a run uses, and how a question becomes a prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TokenizerConfig:
    """The tokenizer, and how a question becomes a prompt."""

    tokenizer_model: str | None = None
    """Folder of a HuggingFace tokenizer."""
    apply_chat_template: bool = False
    """Wrap each prompt in the tokenizer's chat template."""
    prompt_template: str = "{question}"
    """Text of a prompt; {question} stands for the question."""
