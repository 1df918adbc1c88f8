"""A command server (tests/command_server.py) on the pretended GPU."""

from __future__ import annotations

import json
import os

from tests.pretend_gpu.install import install
from tests.pretend_gpu.tensors import waits


def serve() -> None:
    install()
    import megatron_dlm.__main__ as entry
    from tests.command_server import serve as serve_commands

    main = entry.main

    def with_account(argv: list[str]) -> int:
        try:
            return main(argv)
        finally:
            if "PRETEND_GPU_WAITS" in os.environ and os.environ.get("RANK", "0") == "0":
                with open(os.environ["PRETEND_GPU_WAITS"], "w") as file:
                    json.dump([[kind, asking, count] for (kind, asking), count in waits.items()], file)

    entry.main = with_account
    serve_commands()


if __name__ == "__main__":
    serve()
