"""How a zygote gets its code: as text through a pipe, since inside there is no file of this package to read.

`COMMAND` is what the bare interpreter runs. It takes the sources from standard input, imports the zygote from them, and
forgets them.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

_PACKAGE = __package__
_MODULES = ("kernel", "filters", "values", "remote", "programs", "confine", "zygote")

COMMAND = f"""
import importlib.abc, importlib.util, json, sys

class Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name in self.texts:
            return importlib.util.spec_from_loader(name, self, is_package=not self.texts[name])
    def exec_module(self, module):
        exec(compile(self.texts[module.__name__], module.__name__, "exec"), module.__dict__)

finder = Sources()
finder.texts = json.load(sys.stdin)
sys.meta_path.insert(0, finder)
from {_PACKAGE}.zygote import main
sys.meta_path.remove(finder)
finder.texts = {{}}
main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
"""


@lru_cache(maxsize=1)
def sources() -> bytes:
    """The texts by the names of their modules, as JSON; packages are empty."""
    parents = _PACKAGE.split(".")
    texts = {".".join(parents[: depth + 1]): "" for depth in range(len(parents))}
    for name in _MODULES:
        texts[f"{_PACKAGE}.{name}"] = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return json.dumps(texts).encode()
