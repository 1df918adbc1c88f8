"""The config.json of models that `transformers` does not know, as plain fields (child).

Published checkpoints bring these classes as code of their own, which is not run here. They stand at the top of a module
because SGLang hands configurations to its processes.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class _Plain(PretrainedConfig):
    """Keeps `rope_theta` where SGLang's models look for it; newer releases of transformers put it elsewhere."""

    def __init__(self, rope_theta: float = 10000.0, **fields: Any) -> None:
        super().__init__(**fields)
        self.rope_theta = rope_theta


class SDARConfig(_Plain):
    model_type = "sdar"


class SDARMoeConfig(_Plain):
    model_type = "sdar_moe"


class LLaDA2MoeConfig(_Plain):
    model_type = "llada2_moe"


def register() -> None:
    for one in (SDARConfig, SDARMoeConfig, LLaDA2MoeConfig):
        AutoConfig.register(one.model_type, one, exist_ok=True)
