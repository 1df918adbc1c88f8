"""A host's own address and interface. What there is between two hosts is tested in tests/multinode."""

from __future__ import annotations

import pytest

from megatron_dlm.parallel import addresses


def test_a_host_speaks_to_itself_through_loopback() -> None:
    assert addresses.own_address("127.0.0.1") == "127.0.0.1"
    assert addresses.is_loopback("127.0.1.1") and addresses.is_loopback("::1")
    assert not addresses.is_loopback("10.77.0.1")
    assert addresses.interface_of("127.0.0.1") == "lo" and "lo" in addresses.interfaces()


def test_an_address_that_nobody_has_here() -> None:
    """Both are set aside for documentation."""
    assert addresses.interface_of("192.0.2.1") is None
    assert addresses.interface_of("2001:db8::1") is None


def test_a_host_that_nobody_knows() -> None:
    with pytest.raises(OSError):
        addresses.own_address("nowhere.invalid")
