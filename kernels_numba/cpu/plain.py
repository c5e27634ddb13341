"""Whether the numbers of a tensor may be read at its address, past torch's dispatcher: what to ask.

They may not while something watches or transforms the calls of the dispatcher (tracing, ``TorchDispatchMode``,
functorch), nor if the memory holds other numbers than the tensor shows (negative bit). Some of this can only be asked
with private functions of torch: where one is missing, the answer is yes, and every product uses the dispatcher.
"""

from __future__ import annotations

from types import SimpleNamespace

from torch.autograd import forward_ad

try:
    from torch._C import _get_tracing_state as tracing
    from torch._C import _is_torch_function_mode_enabled as function_modes
    from torch._C import _len_torch_dispatch_stack as dispatch_modes
    from torch._C._functorch import maybe_current_level as transform
except ImportError:

    def _unknown():
        return 1

    tracing = function_modes = dispatch_modes = transform = _unknown
# forward._current_level is below 0 unless forward-mode derivatives are taken
forward = forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)
