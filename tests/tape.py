"""What a CUDA graph does, on the CPU: one run is noted operation by operation, and run again as it was noted."""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Tape(TorchDispatchMode):
    """Operations of what runs inside, which `replay` runs again: constants as they were, the same buffers."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, out))
        return out

    def replay(self):
        """Run the operations; tensors that were made inside are made anew, others are where they were."""
        made = {}
        with torch.no_grad():
            for function, args, kwargs, out in self.operations:
                args, kwargs = tree_map_only(torch.Tensor, lambda tensor: made.get(id(tensor), tensor), (args, kwargs))
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    made[id(old)] = new


def stand_in(monkeypatch):
    """Let torch.cuda capture on the CPU; memory is 1000 bytes, and 7 more at most for each capture so far."""
    captured = []

    def capture(graph):
        captured.append(graph)
        return graph

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, function in {
        "Stream": lambda device: stream, "current_stream": lambda device: stream, "CUDAGraph": Tape, "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 1000, "empty_cache": lambda: None,
        "max_memory_allocated": lambda: 1000 + 7 * len(captured),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return captured
