"""Recipes of FP8: what they are called and what they are made with."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any


class Format(enum.Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


@dataclass
class Float8CurrentScaling:
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False


@dataclass
class Float8BlockScaling:
    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling:
    fp8_format: Format = Format.E4M3


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    override_linear_precision: tuple = (False, False, False)
    params_dtype: Any = None
    device: Any = None
    fp8_dpa: bool = False
    fp8_mha: bool = False
    made_of: dict = field(default_factory=dict)
