"""Tables of one input serve every matrix with its column order: built once for q, k, v and for gate, up."""

import numpy as np
import pytest
import torch

from kernels_numba.cpu import drive, product, targets
from sfmp import QuantSpec, fisher_salience, make_plan, quantize_model
from sfmp.linear import SFMPLinear

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])]
FIRST = {"q_proj", "o_proj", "gate_proj", "down_proj"}  # in the order of a layer: who has to build tables
LATER = {"k_proj", "v_proj", "up_proj"}


def _words():
    """The job of this thread, as int64."""
    return product._local.job[: 8 * drive.RANGES].view(np.int64)


def _model(model, shared):
    windows = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bpw=4.0, group_size=32, block_rows=16, method="rtn", shared_columns=shared)
    quantize_model(model, make_plan(fisher_salience(model, windows), spec))
    for layer in model.modules():
        if isinstance(layer, SFMPLinear):
            layer.backend = "cpu"
    return model


def _watched(model, ids, forget=False):
    """Logits, and for every layer called the last part of its name and whether it found its tables."""
    found, handles = [], []
    for name, layer in model.named_modules():
        if isinstance(layer, SFMPLinear):
            def before(module, args):
                if forget and getattr(product._local, "job", None) is not None:
                    _words()[drive.KEPT_BATCH] = 0

            def after(module, args, output, name=name):
                words = _words()
                found.append((name.rpartition(".")[2], bool(words[drive.KEPT] == 1 and words[drive.CHANGED] == 0)))

            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        with torch.no_grad():
            return model(ids).logits, found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("tokens", [1, 2, 8])  # in one run; of several, each has tables of its own
def test_later_products_of_a_group_find_their_tables(tiny_llama, tokens):
    model, ids = _model(tiny_llama, True), torch.arange(tokens)[None]
    with torch.no_grad():
        model(ids)  # repacks
    logits, found = _watched(model, ids)
    assert {name for name, kept in found if kept} == LATER and {name for name, kept in found if not kept} == FIRST
    assert len(found) == 14 and sum(kept for _, kept in found) == 6
    rebuilt, without = _watched(model, ids, forget=True)
    assert not any(kept for _, kept in without)
    assert torch.equal(logits, rebuilt)


def test_orders_of_their_own_share_no_tables(tiny_llama):
    model, ids = _model(tiny_llama, False), torch.arange(3)[None]
    orders = {name: model.get_submodule(f"model.layers.0.{name}").packed.col_perm.tolist()
              for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")}
    assert len(set(map(tuple, orders.values()))) == 4
    assert not any(kept for _, kept in _watched(model, ids)[1])
