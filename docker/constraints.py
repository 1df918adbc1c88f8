#!/usr/bin/env python
"""Constraints for pip, so that what is installed over an image replaces nothing of it: the versions of everything that
the image holds, and the pins of a file for what it lacks.

    python constraints.py pins.txt > constraints.txt    before anything is installed
    python constraints.py --check constraints.txt       afterwards: everything has the version that was written down
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

NEEDED = ("torch", "transformer_engine", "apex", "megatron.core", "megatron_dlm")  # modules of the finished image


def name_of(text: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", text).lower()


def installed() -> dict[str, str]:
    """Name -> version of all packages here; of two copies the one that Python would import."""
    found: dict[str, str] = {}
    for package in distributions():
        if package.metadata["Name"]:
            found.setdefault(name_of(package.metadata["Name"]), package.version)
    return found


def read(file: Path) -> dict[str, str]:
    """Name -> version of the lines NAME==VERSION of a file."""
    lines = (line.strip() for line in file.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name_of(name): version for name, version in pairs}


def constraints(pins: dict[str, str], image: dict[str, str]) -> list[str]:
    """The lines of the constraints: the image decides where both name a package."""
    return [f"{name}=={version}" for name, version in sorted((pins | image).items())]


def changed(written: dict[str, str], here: dict[str, str]) -> list[str]:
    """What is here in another version than was written down."""
    return [
        f"{name} is {here[name]}, not {version}"
        for name, version in written.items()
        if name in here and here[name] != version
    ]


def main(words: list[str]) -> int:
    if words[0] != "--check":
        print("\n".join(constraints(read(Path(words[0])), installed())))
        return 0
    wrong = changed(read(Path(words[1])), installed())
    for module in NEEDED:
        # Looked for and not imported: Transformer Engine and Apex want a GPU, and an image is built without one.
        package = module.split(".")[0]
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
            wrong.append(f"{module} is missing")
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
