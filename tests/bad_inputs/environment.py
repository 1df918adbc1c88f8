"""What the launcher says."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.bad_inputs.bench import Bad

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}


_held = socket.socket()
_held.bind(("127.0.0.1", 0))
PORT = _held.getsockname()[1]  # nobody else gets it while this module is there


def _take_a_port(folder: Path) -> None:
    _held.listen()


def _launch(id: str, says: str | tuple[str, ...], **changes: str) -> Bad:
    return Bad(id, "sft", "--distributed-timeout-minutes 1", says, environment=changes)


ENTRIES = [
    _launch("WORLD_SIZE without RANK", ("WORLD_SIZE", "RANK"), WORLD_SIZE="2"),
    _launch("WORLD_SIZE that is no number", ("WORLD_SIZE", "'two'"), **{**ALONE, "WORLD_SIZE": "two"}),
    _launch("WORLD_SIZE of zero", ("WORLD_SIZE", "0"), **{**ALONE, "WORLD_SIZE": "0"}),
    _launch("RANK without WORLD_SIZE", ("RANK", "WORLD_SIZE"), RANK="0"),
    _launch("RANK that is no number", ("RANK", "'first'"), **{**ALONE, "RANK": "first"}),
    _launch("RANK beyond WORLD_SIZE", ("RANK", "WORLD_SIZE"), **{**ALONE, "RANK": "1"}),
    _launch("a negative RANK", ("RANK", "-1"), **{**ALONE, "RANK": "-1"}),
    _launch("no MASTER_ADDR", "MASTER_ADDR", RANK="0", WORLD_SIZE="1", MASTER_PORT="29511"),
    _launch("no MASTER_PORT", "MASTER_PORT", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1"),
    _launch("MASTER_PORT that is no number", ("MASTER_PORT", "'http'"), **{**ALONE, "MASTER_PORT": "http"}),
    _launch("MASTER_PORT beyond all ports", ("MASTER_PORT", "99999"), **{**ALONE, "MASTER_PORT": "99999"}),
    Bad(
        "MASTER_PORT in use",
        "sft",
        "",
        ("MASTER_PORT", "in use"),
        write=_take_a_port,
        environment=ALONE | {"MASTER_PORT": str(PORT)},
    ),
    _launch(
        "a host that nobody knows",
        ("MASTER_ADDR", "no.such.host.invalid"),
        **{**ALONE, "MASTER_ADDR": "no.such.host.invalid"},
    ),
    _launch("LOCAL_RANK that is no number", ("LOCAL_RANK", "'x'"), LOCAL_RANK="x"),
    _launch("an empty RANK", "RANK", **{**ALONE, "RANK": ""}),
]
