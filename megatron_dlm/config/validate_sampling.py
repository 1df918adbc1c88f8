"""What of sampling cannot work, refused before anything is built: rules that rollouts, evaluation and `generate` share.

The rules of these checks are those of `validate`. Fields are named by the caller, because evaluation's have a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.eval import EvalConfig
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.generate import GenerateConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import EngineConfig, RolloutConfig
from megatron_dlm.config.validate import above, at_least, within


def check_unmasking(
    settings: RolloutConfig | EvalConfig | GenerateConfig, ways: Sequence[str], prefix: str = ""
) -> None:
    """Refuse bounds that no confidence could meet.

    Args:
        ways: of unmasking that are asked for.
        prefix: of the names of the fields.
    """
    threshold, confidence = f"{prefix}threshold", f"{prefix}confidence"
    above(settings, 0, f"{prefix}entropy_bound")
    if "dynamic" not in ways or getattr(settings, confidence) != "entropy":
        within(settings, 0, 1, threshold, low_open=True)
    elif getattr(settings, threshold) >= 0:
        raise ConfigError(
            f"{flag_name(threshold)} is {getattr(settings, threshold)}, which {flag_name(confidence)} entropy never "
            "passes, because it is minus the entropy, in nats. Use a value below 0."
        )


def check_window(settings: EngineConfig | GenerateConfig, model: ModelConfig) -> None:
    """Refuse what only decoding under full attention reads."""
    at_least(settings, 0, "horizon")
    if model.full_attention:
        return
    if settings.horizon is not None:
        raise ConfigError(
            f"--horizon {settings.horizon} is for models of full attention; under attention blocks nothing behind a "
            "block is shown. Leave it out."
        )
    if not settings.prefix_cache:
        raise ConfigError(
            "--no-prefix-cache is for models of full attention; under attention blocks the cache changes nothing. "
            "Leave it out."
        )


def check_decoding_block(given: int | None, model: ModelConfig) -> int:
    """The block in which tokens are generated: as given, or else that of attention.

    Raises:
        ConfigError: there is neither.
    """
    block = model.block_size if given is None else given
    if block is None:
        flags = "--rollout-block-size" if model.full_attention else "--block-size or --rollout-block-size"
        raise ConfigError(f"Generation does not know its block size. Give {flags}.")
    return block


def check_steps_of_block(steps: int | None, block: int, flag: str) -> None:
    """Refuse more denoising steps than a block has tokens."""
    if steps is not None and steps > block:
        raise ConfigError(
            f"{flag} {steps} is more than the {block} tokens of a block, and a step unmasks at least one. "
            f"Use 1 to {block}."
        )
