"""SFMP: search-free fine-grained mixed-precision weight quantization, replicated (arXiv 2602.01027).

``import sfmp`` is cheap: it loads neither torch nor transformers. Every public name, and every submodule, is
resolved on first use::

    from sfmp import QuantSpec, fisher_salience, make_plan, quantize_model
"""

import importlib.util
import pkgutil

from sfmp import register as _register

__version__ = "0.1.0"

_PUBLIC = {
    "SfmpError": "spec", "QuantSpec": "spec", "BlockGrid": "spec", "MatrixPlan": "spec", "Plan": "spec",
    "fisher_salience": "salience", "save_salience": "salience", "load_salience": "salience",
    "SALIENCE_SOURCES": "salience",
    "make_plan": "allocate", "quantize_model": "apply",
    "Quantized": "quantize", "PackedMatrix": "pack", "SFMPLinear": "linear",
    "SFMPConfig": "hf", "SFMPQuantizer": "hf",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, *(module.name for module in pkgutil.iter_modules(__path__))})


_register.install()
