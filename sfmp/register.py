"""Make ``import sfmp`` enough for ``AutoModelForCausalLM.from_pretrained`` to load SFMP checkpoints.

transformers asks a table in `transformers.quantizers.auto` which class loads a checkpoint. If that module is
loaded, the modules in `FORMATS` enter themselves at once. If not, importing transformers here would load torch,
so an import hook waits for that one module and adds the entries right after it has run. The hook touches no
other import.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

TABLE = "transformers.quantizers.auto"
FORMATS = ("sfmp.hf", "sfmp.baselines.bitstack_hf")


class _WhenTableLoads(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != TABLE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        load = spec.loader.exec_module

        def load_then_register(module):
            load(module)
            _enter()

        spec.loader.exec_module = load_then_register
        return spec


def _enter():
    for name in FORMATS:
        importlib.import_module(name)


def install() -> None:
    """Register with transformers now if it is loaded, else as soon as it is; calling it again changes
    nothing."""
    if TABLE in sys.modules:
        _enter()
    elif not any(isinstance(finder, _WhenTableLoads) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenTableLoads())
