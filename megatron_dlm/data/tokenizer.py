"""Text to token ids and back, with the three ids that a diffusion model cannot do without.

A `Tokenizer` reads a local folder; nothing is ever fetched. What lies in it decides who does the work: tokenizer.json a
HuggingFace fast tokenizer (data/tokenizer_huggingface.py), else tokenizer.model a sentencepiece model
(data/tokenizer_sentencepiece.py). Both are a `Backend`; what they have in common is here, above all which token is the
mask. Diffusion models are often grown from autoregressive ones, whose tokenizers know no mask: then one is added. Where
a checkpoint names its mask by id, the id counts, whatever the token's name: published checkpoints call one id by two.

Invariants (tests/data/test_tokenizer.py):
  - every id that `encode` returns, and mask_id, pad_id, eos_id, is smaller than vocab_size;
  - `encode` adds nothing to the text: encode(a) of plain text decodes to a (a HuggingFace tokenizer may bring Unicode
    into normal form, and a sentencepiece model without byte fallback lacks some characters);
  - a saved tokenizer, read again, has the same ids and the same chat template.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.tokenizer_huggingface import HuggingFace
from megatron_dlm.data.tokenizer_sentencepiece import SentencePiece

MASK_TOKENS = ("<|MASK|>", "<|mdm_mask|>", "<|mask|>", "<MASK>")  # SDAR and TraDo; LLaDA; Dream; older SDAR checkpoints


class Backend(Protocol):
    """One kind of tokenizer. The constructor takes the folder; it raises DataError and DependencyError as `Tokenizer`.

    Attributes:
        size: largest id + 1, added tokens included.
        eos_id, pad_id, mask_id: what the files declare, or None.
        mask_is_new: no file had the declared mask in its vocabulary; it was added while loading.
        chat_template: None if there is none.
    """

    size: int
    eos_id: int | None
    pad_id: int | None
    mask_id: int | None
    mask_is_new: bool
    chat_template: object | None

    def find(self, token: str) -> int | None:
        """Id of a token of the vocabulary."""

    def name(self, token_id: int) -> str | None:
        """The token of an id; None if no token has it."""

    def declare_mask(self, token: str) -> int:
        """Make a token the mask, a special token from now on; add it, with the next free id, if it is new. Its id."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat template's text, up to and including the assistant's header; fails in any way a template can."""

    def save(self, folder: Path) -> None: ...


KINDS: dict[str, type[Backend]] = {"tokenizer.json": HuggingFace, "tokenizer.model": SentencePiece}
"""The file that tells a kind -> its backend, in order of preference."""


class Tokenizer:
    """The tokenizer of a local folder.

    Attributes:
        vocab_size: number of ids in use, added tokens included (what the embedding must at least hold, before padding
            it).
        mask_id: the token that stands for "not yet decided".
        eos_id: the stop token.
        pad_id: fills rows; the stop token where the tokenizer names no other.
        response_prefix: what every response begins with; it stands at the end of prompts.
    """

    vocab_size: int
    mask_id: int
    eos_id: int
    pad_id: int
    response_prefix: str = ""

    def __init__(self, folder: str | Path, mask_id: int | None = None, response_prefix: str | None = None):
        """Load the tokenizer.

        Args:
            folder: where tokenizer.json or tokenizer.model lies.
            mask_id: the mask, whatever its name. None: what the tokenizer declares, or a token with the name of a
                mask, or a new one.

        Raises:
            DataError: the folder holds no usable tokenizer, no stop token is declared, or the mask cannot be settled.
            DependencyError: the package that reads this kind is absent.
        """
        self.folder = Path(folder)
        self.response_prefix = response_prefix or ""
        self._backend = _open(self.folder)
        if self._backend.eos_id is None:
            raise DataError(
                f"The tokenizer in {self.folder} declares no eos_token. Add it to its tokenizer_config.json."
            )
        self.eos_id = self._backend.eos_id
        self.pad_id = self._backend.pad_id if self._backend.pad_id is not None else self.eos_id
        self.mask_id = self._settle_mask(mask_id)
        self.vocab_size = self._backend.size

    def save(self, folder: str | Path) -> None:
        """Write it to a folder from which a `Tokenizer` with the same ids can be made."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._backend.save(Path(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids of the text. Special tokens written in the text are recognised; none is added."""
        return self._backend.encode(text)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of some token ids; with `skip_special_tokens`, without mask, stop and other control tokens."""
        return self._backend.decode(ids, skip_special_tokens)

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to and including the header of the assistant's next turn, and what every
        response begins with.

        Args:
            messages: {'role': ..., 'content': ...} in order.

        Raises:
            DataError: the tokenizer has no chat template, or the template refuses these messages.
        """
        if not self._backend.chat_template:
            raise DataError(
                f"The tokenizer in {self.folder} has no chat template. Switch the chat template off, "
                "or add a chat_template to the tokenizer."
            )
        try:
            text = self._backend.render(messages)
        except Exception as error:  # a template is a program of the user's, and may fail in any way
            raise DataError(
                f"The chat template of the tokenizer in {self.folder} refuses a conversation "
                f"({' '.join(str(error).split())}). Correct the template or the conversation."
            ) from None
        return self.encode(opened(text, self.response_prefix))

    def fingerprint(self) -> dict[str, int | str]:
        """What token ids of this tokenizer mean: as long as it is the same, they can be read by another copy of it."""
        names = "\x1f".join(f"{one}:{self._backend.name(one)}" for one in range(self.vocab_size))
        digest = hashlib.blake2b(names.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return {"vocab_size": self.vocab_size, "eos_id": self.eos_id, "mask_id": self.mask_id, "hash": digest}

    def differing(self, folder: str | Path) -> tuple[int, int] | None:
        """Compare with the tokenizer of another folder, which needs neither a mask nor a stop token.

        Returns:
            How many of the ids of both are another token there, and how many ids both have; None if there is no
            tokenizer in the folder.
        """
        if not any((Path(folder) / file).is_file() for file in KINDS):
            return None
        other = _open(Path(folder))
        names = [(self._backend.name(one), other.name(one)) for one in range(min(self._backend.size, other.size))]
        both = [pair for pair in names if None not in pair]
        return sum(here != there for here, there in both), len(both)

    def _settle_mask(self, wanted: int | None) -> int:
        token = self._token_of(wanted) if wanted is not None else self._declared_or_known()
        settled = self._backend.declare_mask(token)
        if wanted not in (None, settled):
            raise DataError(
                f"The mask token {token} of the tokenizer in {self.folder} got the id {settled}, not the mask id "
                f"{wanted} that the model was trained with: the tokenizer's ids have gaps. Export it again without."
            )
        if settled == self.eos_id:
            raise DataError(
                f"The id {settled} is both mask and stop token of the tokenizer in {self.folder}, so no response "
                "could end. Give another mask id or another eos_token."
            )
        return settled

    def _token_of(self, mask_id: int) -> str:
        """The token with this id, or the name of a new one if the id is the next free one."""
        backend = self._backend
        found = backend.name(mask_id) if type(mask_id) is int and 0 <= mask_id < backend.size else None
        if found is not None:
            return found
        if mask_id != backend.size:
            raise DataError(
                f"The mask id {mask_id} is no token of the tokenizer in {self.folder}, whose next free id is "
                f"{backend.size}. Use the tokenizer that the model was trained with, or correct the mask id."
            )
        unused = [name for name in MASK_TOKENS if backend.find(name) is None]
        return unused[0] if unused else f"<|mask_{mask_id}|>"

    def _declared_or_known(self) -> str:
        backend = self._backend
        known = {name: backend.find(name) for name in MASK_TOKENS if backend.find(name) is not None}
        if backend.mask_id is not None:
            others = [f"{name} ({known[name]})" for name in known if known[name] != backend.mask_id]
            if backend.mask_is_new and others:
                raise DataError(
                    f"The tokenizer in {self.folder} declares the mask_token {backend.name(backend.mask_id)}, which is "
                    f"not in its vocabulary, but has {' and '.join(others)}. Give the id that the model was trained "
                    "with: --mask-token-id."
                )
            return backend.name(backend.mask_id)
        return next(iter(known), MASK_TOKENS[0])


def opened(prompt: str, prefix: str) -> str:
    """The text of a prompt, and behind it what every response begins with, unless it stands there already."""
    return prompt if prefix.strip() and prompt.rstrip().endswith(prefix.strip()) else prompt + prefix


def without_opening(response: str, prefix: str) -> str:
    """The text of a response without what every response begins with, which is a part of the prompt."""
    start, rest = prefix.strip(), response.lstrip()
    return rest.removeprefix(start).lstrip() if start and rest.startswith(start) else response


def _open(folder: Path) -> Backend:
    for file, kind in KINDS.items():
        if (folder / file).is_file():
            return kind(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        raise DataError(
            f"There is no tokenizer.json in {folder}, only vocab.json and merges.txt. For Dream and others of the Qwen "
            'family it can be made of them. Run: python -c "from transformers import Qwen2TokenizerFast as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    raise DataError(
        f"There is no tokenizer.json and no tokenizer.model in {folder}. Give a local folder with a HuggingFace fast "
        "tokenizer or a sentencepiece model."
    )
