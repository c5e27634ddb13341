"""One matrix on a device and its products: an image of all its arrays, and the launches that were prepared for it.

The image is one tensor, so that torch's operator can be given it. What the host must know of it (sizes, tiles of a row
block, …) is its `Structure`; the operator gets the structure's hash, and finds it in `_structures`.

Up to the crossover of the launch table the kernels read the codes; beyond, panels of rows are dequantized and
multiplied by torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref

import numpy as np
import torch
from torch import Tensor

from kernels_numba.cpu.plain import dispatch_modes, forward, function_modes, tracing, transform
from kernels_numba.gpu import dequantize_run, devices, lut_layout, lut_run, mma_layout, mma_run, panels
from kernels_numba.gpu.prepared import ALIGNMENT, Prepared
from kernels_numba.linear_operator import readable_bias
from sfmp.checks import SfmpError

LAYOUTS = {"mma": (mma_layout, mma_run), "lut": (lut_layout, lut_run)}
KINDS = {"mma": (torch.float16, torch.bfloat16), "lut": (torch.float16, torch.bfloat16, torch.float32)}
BULK = ("units", "lines", "scales")  # arrays that no plan looks into
CHUNK = 64  # most tokens of a prepared product; more are cut
BIASES = ("no bias", "wide bias")  # float32 [N] in the image: zeros, and the bias if that has another dtype
_STRIDED = torch.strided


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What the host knows of an image.

    Attributes
    ----------
    mode : "mma" or "lut"
    layout : MmaLayout or LutLayout; of the arrays of `BULK` only their sizes
    places : dict, array → first byte in the image
    size : int, bytes of the image
    options : dict, of `plan`
    """

    mode: str
    layout: object
    places: dict[str, int]
    size: int
    options: dict

    def key(self) -> str:
        """Hash by which torch's operator names a structure."""
        fields = {name: value.tolist() if isinstance(value, np.ndarray) else value
                  for name, value in vars(self.layout).items() if name not in (*BULK, "rows", "columns")}
        what = self.mode, self.layout.shape, fields, self.places, self.size, sorted(self.options.items())
        return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


_structures: weakref.WeakValueDictionary[str, Structure] = weakref.WeakValueDictionary()
_weights: weakref.WeakValueDictionary[tuple, Weight] = weakref.WeakValueDictionary()  # (address, structure) →


def make_weight(packed, mode: str, device: torch.device, kinds=None, **options) -> Weight:
    """Lay out a PackedMatrix, on any device, for a mode on a CUDA device.

    Parameters
    ----------
    packed : PackedMatrix
    mode : "mma" or "lut"
    device : torch.device with an index
    kinds : tuple of dtypes that the weight takes; `KINDS` of the mode if None
    options : of `mma_run.plan` or `lut_run.plan`, for all products
    """
    maker, runner = LAYOUTS[mode]
    layout = maker.make_layout(packed)
    arrays = {**runner.layout_arrays(layout), **(panels.arrays(layout) if mode == "mma" else {}),
              **{name: np.zeros(packed.shape[0], np.float32) for name in BIASES}}
    places, size = {}, 0
    for name, array in arrays.items():
        places[name] = -(-size // ALIGNMENT) * ALIGNMENT
        size = places[name] + array.nbytes
    image = np.zeros(size, np.uint8)
    for name, array in arrays.items():
        image[places[name] :][: array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    bulk = {name: np.broadcast_to(np.uint32(0), len(getattr(layout, name))) for name in BULK if hasattr(layout, name)}
    structure = Structure(mode, dataclasses.replace(layout, **bulk), places, size, options)
    with torch.inference_mode(False):
        image = torch.from_numpy(image).to(device)
    if image.is_cuda:  # compiled models that replay graphs would copy it before every replay
        torch._dynamo.mark_static_address(image)
    return Weight(image, structure, kinds)


class Weight:
    """A matrix on a device, and its product with activations that need no checks and no gradient.

    Attributes
    ----------
    image : uint8 [bytes]
    structure : Structure
    key : str, of the structure
    rows, columns : N, K
    device : torch.device
    kinds : dtypes of activations
    """

    def __init__(self, image: Tensor, structure: Structure, kinds=None):
        self.image, self.structure, self.device = image, structure, image.device
        self.rows, self.columns = structure.layout.shape
        self.kinds = kinds or KINDS[structure.mode]
        self.key = structure.key()
        self._device = devices.get(image.device.index or 0)
        self._driver = self._device.kernels.driver
        start = image.data_ptr()
        self._addresses = {name: start + first for name, first in structure.places.items()}
        self._no_bias = self._addresses["no bias"]
        self._runs: dict[tuple, Prepared] = {}  # (tokens, dtype) →
        self._ready: dict[tuple, tuple] = {}  # (shape of x, dtype) → (run, shape of y)
        self._bias = None, 0, None, None, 0  # see `_bias_at`
        self.structure = _structures.setdefault(self.key, structure)
        _weights[start, self.key] = self

    def __reduce__(self):
        return Weight, (self.image, self.structure, self.kinds)  # addresses are not copied

    def takes(self, x, bias) -> bool:
        """Whether `multiply` may be called: a dense tensor on the device, of a kind it takes, and no gradient."""
        return (isinstance(x, Tensor) and x.device == self.device and x.dtype in self.kinds and x.layout is _STRIDED
                and x.dim() != 0 and x.shape[-1] == self.columns and forward._current_level < 0
                and not ((x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled()))

    def multiply(self, x, bias, mode=None):
        """Return x Wᵀ + bias, past torch's dispatcher where nothing watches it."""
        if (type(x) is Tensor and x.is_contiguous() and not (x.is_neg() or dispatch_modes() or function_modes())
                and transform() is None and tracing() is None):
            return self.enqueue(x, bias)
        return self.dispatch(x, bias, mode)

    def dispatch(self, x, bias, mode=None):
        """`multiply` by torch's operator."""
        return torch.ops.sfmp.cuda_linear.default(x, self.image, bias, self.rows, self.key)

    def enqueue(self, x, bias) -> Tensor:
        """Enqueue the product of contiguous x on torch's current stream and return y."""
        device = self._device
        if not device.alone and self._driver.device() != device.index:
            with device.guard():
                return self.enqueue(x, bias)
        ready = self._ready.get((x.shape, x.dtype))
        if ready is None:
            return self._first(x, bias)
        run, shape, size = ready
        bias_at, _keep = self._no_bias, None
        if bias is not None:
            bias_at, _keep = self._bias_at(bias)
        y, scratch_at = x.new_empty(*shape), 0  # a tuple would take torch longer to read
        if size:
            scratch = x.new_empty(size, dtype=torch.uint8)
            scratch_at = scratch.data_ptr()
        run(x.data_ptr(), y.data_ptr(), bias_at, scratch_at)
        return y

    def _first(self, x, bias):
        """`enqueue` for a shape that comes for the first time, and for what needs more than one prepared product."""
        tokens = x.numel() // self.columns
        if self.structure.mode == "mma" and tokens >= self._device.settings.crossover:
            y = x.new_empty(*x.shape[:-1], self.rows)
            panels.multiply(self, x.view(tokens, -1), y.view(tokens, -1), bias)
            return y
        return self.through_codes(x, bias)

    def through_codes(self, x, bias) -> Tensor:
        """`enqueue` by the kernel that reads codes, whatever the number of tokens."""
        shape, tokens = (*x.shape[:-1], self.rows), x.numel() // self.columns
        y, step = x.new_empty(*shape), x.element_size()
        bias_at, _keep = (self._no_bias, None) if bias is None else self._bias_at(bias)
        for first in range(0, tokens, CHUNK):
            run = self.prepared(min(CHUNK, tokens - first), x.dtype)
            scratch = x.new_empty(run.scratch_bytes, dtype=torch.uint8)
            run(x.data_ptr() + first * self.columns * step, y.data_ptr() + first * self.rows * step, bias_at,
                scratch.data_ptr())
            if tokens <= CHUNK and (self.structure.mode != "mma" or tokens < self._device.settings.crossover):
                self._ready[x.shape, x.dtype] = run, shape, run.scratch_bytes
        return y

    def prepared(self, tokens: int, kind: torch.dtype) -> Prepared:
        """Return the prepared product of so many tokens; its arguments are addresses of x, y, bias and scratch.

        Raises
        ------
        SfmpError
            A kernel is not loaded yet and a graph is being captured.
        """
        run = self._runs.get((tokens, kind))
        if run is None:
            structure, device = self.structure, self._device
            options = {"warps": device.settings.warps[structure.mode]}
            if structure.mode == "lut":
                options["blocks"] = device.settings.waves * device.multiprocessors
            plan = LAYOUTS[structure.mode][1].plan(structure.layout, tokens, name_of(kind),
                                                   **{**options, **structure.options})
            run = self._runs[tokens, kind] = Prepared(plan, self._addresses, device.kernels)
        return run

    def panel(self, kind: torch.dtype, first_strip: int, strips: int) -> Prepared:
        """Return the prepared launch that writes a panel of the weight; its arguments are addresses of panel and 0.

        Raises
        ------
        SfmpError
            The kernel is not loaded yet and a graph is being captured.
        """
        key = first_strip, strips, kind
        run = self._runs.get(key)
        if run is None:
            plan = dequantize_run.plan(self.structure.layout, name_of(kind), first_strip, strips)
            run = self._runs[key] = Prepared(plan, self._addresses, self._device.kernels, (dequantize_run.WORKSPACE,))
        return run

    def _bias_at(self, bias) -> tuple[int, Tensor | None]:
        """(address of the bias as float32, what has to live until the launch).

        A bias of another dtype is copied to a place in the image, again when it changed; other biases than the first of
        a weight are copied at every call, and so are inference tensors, which do not count their changes.
        """
        known, address, kind, version, found = self._bias
        if (bias is known and bias.data_ptr() == address and bias.dtype is kind
                and (version is None or version == bias._version)):
            return found, None
        wide = readable_bias(bias.detach(), self.rows, self.device, (torch.float32,))
        address, kind = bias.data_ptr(), bias.dtype
        if wide.data_ptr() == address:
            self._bias = bias, address, kind, None, address
            return address, None
        if bias.is_inference() or (known is not None and bias is not known):
            return wide.data_ptr(), wide
        place = self.structure.places["wide bias"]
        self.image[place : place + 4 * self.rows].view(torch.float32).copy_(wide)
        found = self._addresses["wide bias"]
        if not self._device.kernels.capturing():  # a graph copies when it is replayed
            self._device.finish()  # the next product may be on another stream
            self._bias = bias, address, kind, bias._version, found
        return found, None


def name_of(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def find(image: Tensor, key: str) -> Weight:
    """Return the weight of an image, for torch's operator.

    Raises
    ------
    SfmpError
        No weight of this structure was made in this process.
    """
    found = _weights.get((image.data_ptr(), key))
    if found is not None:
        return found
    structure = _structures.get(key)
    if structure is None or image.numel() != structure.size:
        raise SfmpError("image: expected the weight of a layer of this process, found one that nothing here made; call "
                        "the model once before it is compiled or exported")
    found = Weight(image, structure)
    image._sfmp_weight = found  # as long as the copy of the image that a compiler made lives
    return found

