"""Text to token ids and back, with the three ids that a diffusion model cannot do without.

A `Tokenizer` wraps a HuggingFace fast tokenizer that lies in a local folder (tokenizer.json and, usually,
tokenizer_config.json); nothing is ever fetched. It decides which token is the mask, and adds one where the vocabulary
has none: diffusion models are often grown from autoregressive ones, whose tokenizers know no mask.

Invariants (tests/data/test_tokenizer.py):
  - every id that `encode` returns, and mask_id, pad_id, eos_id, is smaller than vocab_size;
  - `encode` adds nothing to the text: encode(a) of plain text decodes to a.
"""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.config.errors import DataError, DependencyError

MASK_TOKENS = ("<|MASK|>", "<|mdm_mask|>", "<|mask|>", "<MASK>")  # SDAR and TraDo; LLaDA; Dream; older SDAR checkpoints


class Tokenizer:
    """A fast tokenizer from a local folder.

    Attributes:
        vocab_size: number of ids in use, added tokens included (what the embedding must at least hold, before padding
            it).
        mask_id: the token that stands for "not yet decided".
        eos_id: the stop token.
        pad_id: fills rows; the stop token where the tokenizer names no other.
    """

    vocab_size: int
    mask_id: int
    eos_id: int
    pad_id: int

    def __init__(self, folder: str | Path):
        """Load the tokenizer.

        Raises:
            DataError: the folder holds no usable tokenizer.json, or no stop token is declared.
            DependencyError: the transformers package is absent.
        """
        self.folder = Path(folder)
        self._hf = _load(self.folder)
        if self._hf.eos_token_id is None:
            raise DataError(
                f"The tokenizer in {self.folder} declares no eos_token. Add it to its tokenizer_config.json."
            )
        self.eos_id = self._hf.eos_token_id
        self.pad_id = self._hf.pad_token_id if self._hf.pad_token_id is not None else self.eos_id
        self.mask_id = _mask_id(self._hf)
        self.vocab_size = max(self._hf.get_vocab().values()) + 1

    def save(self, folder: str | Path) -> None:
        """Write it to a folder from which a `Tokenizer` with the same ids can be made."""
        self._hf.save_pretrained(str(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids of the text. Special tokens written in the text are recognised; none is added."""
        return self._hf.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of some token ids; with `skip_special_tokens`, without mask, stop and other control tokens."""
        return self._hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to and including the header of the assistant's next turn.

        Args:
            messages: {'role': ..., 'content': ...} in order.

        Raises:
            DataError: the tokenizer has no chat template, or the template refuses these messages.
        """
        if not self._hf.chat_template:
            raise DataError(
                f"The tokenizer in {self.folder} has no chat template. Switch the chat template off, "
                "or add a chat_template to the tokenizer."
            )
        try:
            text = self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the user's, and may fail in any way
            raise DataError(
                f"The chat template of the tokenizer in {self.folder} refuses a conversation "
                f"({' '.join(str(error).split())}). Correct the template or the conversation."
            ) from None
        return self.encode(text)


def _load(folder: Path):
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"There is no tokenizer.json in {folder}. Give a local folder with a HuggingFace fast tokenizer."
        )
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise DependencyError(
            "Tokenizers need the transformers package, which is not installed. Run: pip install transformers"
        ) from None
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise DataError(
            f"The tokenizer in {folder} cannot be loaded ({error}). Export it again with save_pretrained."
        ) from error


def _mask_id(hf) -> int:
    if hf.mask_token_id is not None:
        return hf.mask_token_id
    vocabulary = hf.get_vocab()
    for name in MASK_TOKENS:
        if name in vocabulary:
            hf.mask_token = name
            return vocabulary[name]
    hf.add_special_tokens({"mask_token": MASK_TOKENS[0]})
    return hf.mask_token_id
