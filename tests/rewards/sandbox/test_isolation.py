"""Which isolation there is, and that a run without any is refused."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.rewards.sandbox import confine, isolation
from tests.rewards.sandbox.conftest import level_here


def test_the_host_offers_one_or_the_run_is_refused():
    found = level_here()
    if found is None:
        with pytest.raises(ConfigError, match="not run without isolation"):
            isolation.choose("auto")
    else:
        assert found in confine.LEVELS and isolation.trouble(found) is None


def test_without_any_it_is_refused(monkeypatch):
    monkeypatch.setattr(isolation, "trouble", lambda level: "no such thing")
    with pytest.raises(
        ConfigError, match="not run without isolation.*namespaces: no such thing.*--code-isolation none"
    ):
        isolation.choose("auto")
    with pytest.raises(ConfigError, match="--code-isolation landlock does not work on this host"):
        isolation.choose("landlock")


def test_none_is_taken_only_by_name():
    assert isolation.choose("none") == "none"
    assert "none" not in confine.LEVELS
    assert "NO isolation" in isolation.describe("none")


def test_the_probe_finds_what_a_program_could_do():
    found = isolation.trouble("none")  # the probe itself is harmless
    for words in ("read", "write", "use the network", "signal the trainer", "start any number of processes"):
        assert words in found


@pytest.mark.parametrize("level", confine.LEVELS)
def test_a_level_works_or_says_why_not(level):
    found = isolation.trouble(level)
    assert found is None or (found and "\n" not in found)
    assert isolation.describe(level).startswith("Programs are run in ")
