"""Every method of the comparison behind one call; one file each.

    outcome = baselines.quantize("amq", model, windows, 3.0, seed=0, **knobs)

A method takes a model, calibration windows, a budget in bits per weight and a seed; it returns an
:class:`sfmp.baselines.outcome.Outcome`: the model quantized in place, the bytes it has to store, and a cost
record. The defaults of a method's knobs are those of its publication; ``config/knobs.tsv`` lists them beside
the reduced ones of the embedded tier.
"""

from __future__ import annotations

from sfmp.checks import SfmpError


def methods() -> dict:
    """Return name → function ``(model, windows, bpw, *, seed=0, **knobs) -> Outcome``."""
    from sfmp.baselines import (
        amq,
        bitstack,
        efficient_qat,
        element,
        layer_wise,
        scalebits,
        sfmp,
        slim_llm,
        uniform,
    )

    return {
        "rtn": uniform.rtn, "awq": uniform.awq, "gptq": uniform.gptq, "sfmp": sfmp.quantize,
        "slim_llm": slim_llm.quantize, "amq": amq.quantize, "bitstack": bitstack.quantize,
        "scalebits": scalebits.quantize, "efficient_qat": efficient_qat.quantize,
        "layer_wise": layer_wise.quantize, "element": element.quantize,
    }


def quantize(method: str, model, windows, bpw: float, /, *, seed: int = 0, **knobs):
    """Quantize `model` in place by the named method.

    Parameters
    ----------
    method : str
        A key of :func:`methods`.
    model : nn.Module
        A causal language model of transformers, any architecture with ``nn.Linear`` layers.
    windows : Tensor int64 [n, seqlen]
        Calibration windows.
    bpw : float
        Budget in bits per quantized weight.
    seed : int
        Of every random choice.
    **knobs
        Settings of the method; see its own function.

    Returns
    -------
    Outcome

    Raises
    ------
    SfmpError
        If the method is unknown, or the method cannot work with what it was given.
    """
    known = methods()
    if method not in known:
        raise SfmpError(f"method {method!r}: expected one of {', '.join(known)}")
    return known[method](model, windows, bpw, seed=seed, **knobs)
