"""Schedules of learning rates and weight decays that cannot work, refused before anything is built.

The policy's flags and those of the value model are the same but for a prefix, and so are their rules.
"""

from __future__ import annotations

from typing import Any

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.validate import at_least, only_with, within

_OF_THE_END = ("lr_wsd_decay_iters", "lr_wsd_decay_style")
_BOUNDS = ("start_weight_decay", "end_weight_decay")


def check_schedule(section: Any, prefix: str = "") -> None:
    """Refuse what cannot work whatever the length of the run.

    Args:
        section: of the settings. prefix: of the names of its schedule's fields.
    """

    def value(name: str) -> Any:
        return getattr(section, prefix + name)

    def flag(name: str) -> str:
        return flag_name(prefix + name)

    at_least(section, 0, *(prefix + name for name in ("min_lr", "lr_warmup_iters", "lr_warmup_init", "weight_decay")))
    at_least(section, 0, *(prefix + name for name in _BOUNDS))
    at_least(section, 1, prefix + "lr_decay_iters", prefix + "lr_wsd_decay_iters")
    within(section, 0, 1, prefix + "lr_warmup_fraction", low_open=True, high_open=True)
    for name in ("min_lr", "lr_warmup_init"):
        if value(name) > value("lr"):
            raise ConfigError(
                f"{flag(name)} {value(name)} is above {flag('lr')} {value('lr')}. Use at most {value('lr')}."
            )
    if value("lr_warmup_fraction") is not None and value("lr_warmup_iters"):
        raise ConfigError(
            f"{flag('lr_warmup_fraction')} and {flag('lr_warmup_iters')} both say how long the warm-up is. Leave one "
            "of the two out."
        )
    if value("lr_warmup_fraction") is None and not value("lr_warmup_iters"):
        only_with(section, prefix + "lr_warmup_init", flag("lr_warmup_iters"))
    if value("lr_decay_style") != "WSD":
        for name in _OF_THE_END:
            only_with(section, prefix + name, f"{flag('lr_decay_style')} WSD")
    elif value("lr_wsd_decay_iters") is None:
        raise ConfigError(
            f"{flag('lr_decay_style')} WSD needs {flag('lr_wsd_decay_iters')}, the steps at its end in which the "
            "learning rate goes down. Give them."
        )
    _check_weight_decay(section, prefix)


def _check_weight_decay(section: Any, prefix: str) -> None:
    style, (start, end) = flag_name(prefix + "weight_decay_incr_style"), (flag_name(prefix + name) for name in _BOUNDS)
    low, high = (getattr(section, prefix + name) for name in _BOUNDS)
    chosen = getattr(section, prefix + "weight_decay_incr_style")
    if chosen == "constant":
        for name in _BOUNDS:
            only_with(section, prefix + name, f"{style} linear or cosine")
        return
    if low is None or high is None:
        raise ConfigError(f"{style} {chosen} needs {start} and {end}. Give both.")
    if low > high:
        raise ConfigError(f"{start} {low} is above {end} {high}, and weight decay can only increase. Swap them.")
    only_with(section, prefix + "weight_decay", f"{style} constant")


def check_length(section: Any, steps: int | None, name: str, prefix: str = "") -> None:
    """Refuse a warm-up and an end that do not fit into the schedule.

    Args:
        steps: of the run, where they are known; `name`: what they are called. The schedule may be given its own length.
    """
    get = lambda field: getattr(section, prefix + field)
    flag = lambda field: flag_name(prefix + field)
    if get("lr_decay_iters") is not None:
        steps, name = get("lr_decay_iters"), flag("lr_decay_iters")
    if steps is None:
        return
    steps = max(steps, 1)  # a run of no step is refused as such
    warmup = get("lr_warmup_iters")
    if warmup >= steps:
        raise ConfigError(
            f"{flag('lr_warmup_iters')} {warmup} leaves nothing of {name}, {steps} steps. Use fewer than {steps}."
        )
    if get("lr_warmup_fraction") is not None:
        warmup = int(get("lr_warmup_fraction") * steps)
    end = get("lr_wsd_decay_iters")
    if end is not None and end > steps - warmup:
        raise ConfigError(
            f"{flag('lr_wsd_decay_iters')} {end} is more than the {steps - warmup} steps of {name} after the warm-up. "
            f"Use at most {steps - warmup}."
        )
