"""A weight on a device that is none: its image, what a product of it reads and writes, its bias, its operator."""

import ctypes

import pytest
import torch
from cases import packed_case
from cuda_stand_in import Library, stand_in

from kernels_numba.gpu import cubins, devices, prepared
from sfmp.checks import SfmpError
from sfmp.linear import SFMPLinear

gpu_weight = pytest.importorskip("kernels_numba.gpu.weight", reason="needs numba-cuda")


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(cubins, "get", lambda launch, capability: b"code")
    return Library()


@pytest.fixture
def device(library, monkeypatch):
    found = stand_in(library)
    monkeypatch.setattr(devices, "get", lambda index: found)
    return found


def _weight(mode, device, **shape):
    packed = packed_case(0, **{"rows": 50, "cols": 300, "levels": (2, 3), "block_rows": 25, **shape})
    weight = gpu_weight.make_weight(packed, mode, torch.device("cpu"))
    library = device.kernels.driver._library
    for tokens in (1, 3, 70):
        for launch in gpu_weight.LAYOUTS[mode][1].plan(weight.structure.layout, tokens, "float16").launches:
            library.types[prepared.name_of(launch)] = launch.types
    return packed, weight


@pytest.mark.parametrize("mode", ("mma", "lut"))
def test_an_image_holds_every_array_where_its_address_says(mode, device):
    packed, weight = _weight(mode, device)
    maker, runner = gpu_weight.LAYOUTS[mode]
    arrays = runner.layout_arrays(maker.make_layout(packed))
    ends = []
    for name, array in arrays.items():
        address = weight._addresses[name]
        assert ctypes.string_at(address, array.nbytes) == array.tobytes(), name
        assert address % 4 == 0 and weight.structure.places[name] % 256 == 0
        ends.append((address, address + array.nbytes))
    ends = sorted(ends)
    assert all(end <= start for (_, end), (start, _) in zip(ends[:-1], ends[1:], strict=True))
    assert ends[-1][1] <= weight.image.data_ptr() + weight.image.numel()


@pytest.mark.parametrize("mode", ("mma", "lut"))
def test_host_knows_of_a_layout_what_a_plan_asks(mode, device):
    packed, weight = _weight(mode, device)
    maker, runner = gpu_weight.LAYOUTS[mode]
    for tokens in (1, 5, 40):
        assert runner.plan(weight.structure.layout, tokens, "float16") == runner.plan(maker.make_layout(packed), tokens,
                                                                                     "float16")


@pytest.mark.parametrize("mode", ("mma", "lut"))
@pytest.mark.parametrize("tokens", (1, 3))
def test_a_product_reads_x_and_writes_what_it_returns(mode, tokens, device, library):
    packed, weight = _weight(mode, device)
    x = torch.zeros(tokens, 300, dtype=torch.float16)
    for _ in range(2):  # prepared, then from what was prepared
        library.launches.clear()
        y = weight.enqueue(x, None)
        assert y.shape == (tokens, 50) and y.dtype == x.dtype
        plan = gpu_weight.LAYOUTS[mode][1].plan(weight.structure.layout, tokens, "float16", blocks=8) \
            if mode == "lut" else gpu_weight.LAYOUTS[mode][1].plan(weight.structure.layout, tokens, "float16")
        assert len(library.launches) == len(plan.launches)
        known = {**weight._addresses, "x": x.data_ptr(), "y": y.data_ptr(), "bias": weight._no_bias}
        for launch, (name, grid, block, shared, stream, values) in zip(plan.launches, library.launches, strict=True):
            assert (name, grid, block) == (prepared.name_of(launch), (*launch.grid, 1), (launch.threads, 1, 1))
            assert (shared, stream) == (launch.shared_bytes, 5)
            for argument, letter, value in zip(launch.arguments, launch.types, values, strict=True):
                name, first = argument if isinstance(argument, tuple) else (argument, 0)
                if letter == "n":
                    assert value == argument
                elif name in known:
                    assert value == known[name] + first * prepared.SIZES[letter]
    assert not ctypes.string_at(weight._no_bias, 200).strip(b"\0")


def test_many_tokens_are_cut(device, library):
    _, weight = _weight("lut", device)
    x = torch.zeros(2, 35, 300, dtype=torch.float16)
    y = weight.enqueue(x, None)
    inputs = [values[10 - 1] for name, *_, values in library.launches if name.endswith("lut_kernel")]
    passes = [*range(0, 64, 8), 64]
    assert y.shape == (2, 35, 50) and inputs == [x.data_ptr() + 600 * first for first in passes]
    assert weight.enqueue(x[:0], None).shape == (0, 35, 50)


def _bias_of(library):
    """Address of the bias in the last launch that takes one."""
    return library.launches[-1][5][2]


def test_a_bias_of_float32_is_read_where_it_is_and_others_are_copied(device, library):
    _, weight = _weight("lut", device)
    x, wide, half = torch.zeros(1, 300).half(), torch.randn(50), torch.randn(50).half()
    weight.enqueue(x, wide)
    assert _bias_of(library) == wide.data_ptr()
    _, weight = _weight("lut", device)
    for change in (1, 2):
        half.mul_(change)
        weight.enqueue(x, half)
        copy = _bias_of(library)
        assert weight.image.data_ptr() <= copy < weight.image.data_ptr() + weight.image.numel()
        assert ctypes.string_at(copy, 200) == half.float().numpy().tobytes(), "changed in place"
    before = device.counts["finish"]
    weight.enqueue(x, half)
    assert _bias_of(library) == copy and device.counts["finish"] == before
    weight.enqueue(x, torch.zeros(50).half())
    assert _bias_of(library) != copy and ctypes.string_at(copy, 200) == half.float().numpy().tobytes()
    weight.enqueue(x, None)
    assert _bias_of(library) == weight._no_bias
    for wrong, text in ((torch.zeros(49), r"dense \[50\]"), (torch.zeros(50, device="meta"), "expected device cpu")):
        with pytest.raises(SfmpError, match=text):
            weight.enqueue(x, wrong)


def test_other_devices_are_guarded(library, monkeypatch):
    now = [1]
    found = stand_in(library, alone=False, current=lambda: now[0])
    monkeypatch.setattr(devices, "get", lambda index: found)
    guard = found.guard

    class Guard:
        def __enter__(self):
            self.kept, now[0] = now[0], 0

        def __exit__(self, *_):
            now[0] = self.kept

    monkeypatch.setattr(type(found), "guard", lambda self: guard() and None or Guard())
    _, weight = _weight("lut", found)
    x = torch.zeros(1, 300).half()
    weight.enqueue(x, None)
    assert found.counts["guard"] == 1 and now == [1] and library.launches
    now[0] = 0
    weight.enqueue(x, None)
    assert found.counts["guard"] == 1


@pytest.fixture
def on_cpu():
    """The operator on the CPU, for a device that is none."""
    from kernels_numba.gpu import product

    library = torch.library.Library("sfmp", "IMPL", "CPU")
    library.impl("cuda_linear", product._cuda_linear)
    yield
    library._destroy()


def test_compiled_layers_call_the_operator(device, library, on_cpu, monkeypatch):
    packed, weight = _weight("lut", device, bias=True)
    layer = SFMPLinear(packed)
    layer._cache["ready"] = layer.backend, layer.mode, weight, layer.mode, *packed.source()
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **options: new_empty(x, *size, **options).zero_())
    x = torch.zeros(2, 300).half()
    torch.library.opcheck(torch.ops.sfmp.cuda_linear.default, (x, weight.image, layer.bias, 50, weight.key))
    monkeypatch.undo()
    monkeypatch.setattr(devices, "get", lambda index: device)
    monkeypatch.setattr(cubins, "get", lambda launch, capability: b"code")
    with torch.no_grad():
        torch._dynamo.mark_static_address(weight.image)  # as on a device
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        compiled(x)
        library.launches.clear()
        y = compiled(x)
    assert y.shape == (2, 50) and [launch[0] for launch in library.launches] == ["sfmp_lut_kernel", "sfmp_lut_sum"]
    assert _bias_of(library) == layer.bias.data_ptr() and library.launches[0][5][0] == weight._addresses["lines"]
    copy = weight.image.clone()  # as a compiler may
    torch.ops.sfmp.cuda_linear(x, copy, None, 50, weight.key)
    assert library.launches[-2][5][0] == copy.data_ptr() + weight.structure.places["lines"], "copies are what they are"
