"""What the GPU bench does on a device, with stand-ins for the driver, torch's events and graphs, and nvidia-smi."""

import contextlib
import math
import types
from concurrent.futures import Future

import cuda_stand_in
import pytest
import torch

from kernels_numba.gpu import cubins, devices, lut, mma, mma_gather, weight
from kernels_numba.gpu.compile import name_of
from sfmp.bench import gpu_ceilings, gpu_prebuild, gpu_products, gpu_timing, gpu_wanted, kernels
from sfmp.bench.gpu_candidates import random_matrix
from sfmp.bench.gpu_timing import Settings
from sfmp.bench.gpu_wanted import Kind, Wanted
from sfmp.bench.timing import Candidate
from sfmp.checks import SfmpError

CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch):
    """A stand-in device; its `asked` are the kernels that were wanted."""
    library = cuda_stand_in.Library()
    found = cuda_stand_in.stand_in(library, crossover=4)
    asked = []

    def get(launch, capability):
        library.types[name_of(launch)] = launch.types
        asked.append(launch)
        return b"code"

    monkeypatch.setattr(cubins, "get", get)
    monkeypatch.setattr(devices, "get", lambda index: found)
    return types.SimpleNamespace(library=library, asked=asked, found=found)


def keys(launches):
    return {(launch.make, launch.options, launch.types) for launch in launches}


def test_every_copy_has_weights_of_its_own(device):
    packed = random_matrix(64, 256, Kind(3))
    copies = gpu_products.DeviceCopies(packed, "mma", 3, CPU)
    products = copies.products(torch.zeros(1, 256, dtype=torch.float16))
    assert len(products) == 3 and all(product().shape == (1, 64) for product in products)
    starts = [values[0] for *_, values in device.library.launches]
    assert len(set(starts)) == 3 and len(device.library.launches) == 3
    images = [one.image for one in copies._weights]
    assert all(torch.equal(images[0], image) for image in images[1:])


def test_options_reach_the_plan_and_share_the_images(device):
    packed, x = random_matrix(64, 256, Kind(3, "uniform")), torch.zeros(1, 256, dtype=torch.float16)
    copies = gpu_products.DeviceCopies(packed, "lut", 2, CPU)
    for width in (2, 8):
        device.asked.clear()
        start = len(device.library.launches)
        for product in copies.products(x, width=width):
            product()
        kernel = next(launch for launch in device.asked if launch.make is lut.make_kernel)
        assert kernel.options[0] == width
        lines = [values[0] for name, *_, values in device.library.launches[start:] if name.endswith("_kernel")]
        assert lines == [one._addresses["lines"] for one in copies._weights]


def test_who_orders_activations_is_what_is_launched(device):
    packed, x = random_matrix(64, 256, Kind(3)), torch.zeros(1, 256, dtype=torch.float16)
    copies = gpu_products.DeviceCopies(packed, "mma", 1, CPU)
    assert copies.gather(x) == "fused" and copies.gather(x, gather="unfused") == "own kernel"
    copies.products(x, gather="unfused")[0]()
    assert [launch.make for launch in device.asked] == [mma_gather.make_arrange, mma.make_kernel]
    assert len(device.library.launches) == 2
    assert gpu_products.DeviceCopies(packed, "lut", 1, CPU).gather(x) == "fused"


def test_the_kernel_is_measured_beyond_the_crossover_too(device):
    packed, tokens = random_matrix(64, 256, Kind(3)), weight.CHUNK + 3
    y = gpu_products.DeviceCopies(packed, "mma", 1, CPU).products(torch.zeros(tokens, 256, dtype=torch.float16))[0]()
    assert y.shape == (tokens, 64)
    multiplied = [(values, name) for name, *_, values in device.library.launches if not name.endswith("_arrange")]
    assert sum(values[-1] for values, _ in multiplied) == tokens, "tokens are the last parameter"
    assert len(multiplied) == 3, "32, 32 and 3"


def test_a_dequantized_matrix_is_measured_below_the_crossover_too(device):
    packed, x = random_matrix(64, 256, Kind(3)), torch.zeros(1, 256, dtype=torch.float16)
    copies = gpu_products.DeviceCopies(packed, "dequantize", 2, CPU)
    assert [product().shape for product in copies.products(x)] == [(1, 64)] * 2 and copies.gather(x) == "own kernel"
    assert [launch.make.__module__ for launch in device.asked] == ["kernels_numba.gpu.dequantize"]
    assert len(device.library.launches) == 2


def test_torch_permutes_around_the_product(device, monkeypatch):
    packed = random_matrix(64, 256, Kind(3, natural=True))
    monkeypatch.setattr(weight.Weight, "multiply", lambda self, x, bias: x[:, : self.rows])
    x = torch.arange(256.0).half()[None]
    columns, rows = torch.arange(255, -1, -1), torch.arange(63, -1, -1)
    (product,) = gpu_products.DeviceCopies(packed, "mma", 1, CPU).products(x, columns=columns, rows=rows)
    assert product()[0].tolist() == list(range(192, 256))


def test_what_is_compiled_beforehand_is_what_is_launched(device):
    shape, batches = [64, 512], [1, 2, 5, 9, 20, 40]
    parts = [{"part": name, "shape": shape, "batches": batches} for name in ("product", "batch", "width", "accuracy")]
    for part in parts:
        for one in gpu_wanted.wanted(part, "cuda"):
            if one.way != "dequantize" and not one.around:
                x = torch.zeros(one.tokens, 512, dtype=getattr(torch, one.dtype))
                copies = gpu_products.DeviceCopies(random_matrix(*shape, one.kind), one.way, 1, CPU)
                copies.products(x, **dict(one.options))[0]()
    tasks = gpu_prebuild.tasks(parts, "cuda")
    built = [launch for task in tasks for launch in gpu_prebuild.launches_of(*task)]
    assert keys(device.asked) == keys(built)
    assert all(launch.arguments == () for launch in built), "arguments do not decide the code"


class Inline:
    """An executor that works where it is asked."""

    map = staticmethod(map)

    def submit(self, function, *arguments):
        found = Future()
        found.set_result(function(*arguments))
        return found


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    tried, words = [], []

    def get(launch, capability):
        tried.append((launch.make.__qualname__, capability))
        if launch.make.__qualname__ == "make_sum":
            raise SfmpError("no compiler\nmore")

    monkeypatch.setattr(cubins, "get", get)
    tasks = gpu_prebuild.tasks([{"part": "width", "shape": [32, 256]}] * 2, "cuda")
    assert len(tasks) == len(gpu_wanted.GROUP_SIZES), "one for each matrix"
    assert all(len(ones) == len(gpu_wanted.TABLE_WIDTHS) for _, ones in tasks), "each candidate once"
    count, failed = gpu_prebuild.compile_all(tasks, (9, 0), Inline(), words.append)
    assert count == len(tried) == len(set(words)) - len(tasks) and (("make_sum", (9, 0)) in tried)
    assert failed == {"make_sum('float16',)": "no compiler"}


def test_taller_matrices_are_compiled_for_as_tall_as_matters():
    tasks = gpu_prebuild.tasks([{"part": "product", "shape": [size, 256]} for size in (14336, 28672)], "cuda")
    assert {shape for shape, _ in tasks} == {(gpu_prebuild.MOST_ROWS, 256)}
    assert len(tasks) == 2 * len(gpu_wanted.KINDS)


def test_nothing_is_compiled_for_a_processor_or_without_a_cache(monkeypatch):
    assert gpu_prebuild.build([], Settings("cpu"), pytest.fail) == {}
    monkeypatch.setenv(cubins.VARIABLE, "")
    assert gpu_prebuild.build([], Settings("cuda"), pytest.fail) == {}


def test_names_say_what_differs():
    for part in ({"part": "product"}, {"part": "batch", "batches": [1, 2]}, {"part": "width"}, {"part": "accuracy"}):
        found = gpu_wanted.wanted(part, "cuda")
        assert found and len({one.name for one in found}) == len(found)
    assert gpu_wanted.wanted({"part": "host"}, "cuda") == []
    assert Wanted(Kind(3, natural=True), "mma", around=True).name == "mma 3 blocks unfused"
    assert Wanted(Kind(2.5, natural=True), "lut").name == "lut 2.5 blocks natural"
    assert Wanted(Kind(3, "uniform", True, 64), "lut", options=(("width", 4),)).name == (
        "lut 3 uniform groups of 64 width 4")


class Cuda:
    """torch.cuda with a clock that products move; the device runs behind the host, a graph is a list of its work."""

    def __init__(self):
        self.host = self.device = 0.0  # microseconds
        self.recorded, self.graphs = None, 0

    def work(self, device_us, host_us=1.0):
        """A product."""
        if self.recorded is not None:
            self.recorded.append(device_us)
            return
        self.host += host_us
        self.device = max(self.device, self.host) + device_us

    def synchronize(self):
        self.host = max(self.host, self.device)

    def replay(self, graph):
        self.device += sum(graph.recorded)

    @contextlib.contextmanager
    def graph(self, graph):
        self.recorded = graph.recorded = []
        yield
        self.recorded, self.graphs = None, self.graphs + 1


@pytest.fixture
def cuda(monkeypatch):
    found = Cuda()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = found.device

        def synchronize(self):
            found.synchronize()

        def elapsed_time(self, end):
            return (end.time - self.time) / 1e3

    class Graph:
        def replay(self):
            found.replay(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", found.graph)
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: found.host * 1e-6)
    return found


@pytest.mark.parametrize(("us", "copies", "laps"), [(4.0, 27, 2), (30.0, 3, 16), (500.0, 3, 1), (0.5, 100, 1)])
def test_a_sample_is_replays_of_a_graph_of_many_products(cuda, us, copies, laps):
    candidate = Candidate("mma", "sfmp", [lambda: cuda.work(us)] * copies, 10)
    prepared = gpu_timing.prepare(candidate, Settings())
    assert cuda.graphs == 1
    before = cuda.device
    assert prepared.sample() == pytest.approx(us)
    replays = (cuda.device - before) / (us * copies * laps)
    expected = 1 + max(1, math.ceil(gpu_timing.SAMPLE_US / (us * copies * laps)))
    assert replays == pytest.approx(expected), "one that is not counted, and about a millisecond"
    assert prepared.host_us == pytest.approx(1.0) and prepared.eager_us >= us


def test_host_time_ends_before_the_device_is_done(cuda):
    slow = gpu_timing.prepare(Candidate("a", "sfmp", [lambda: cuda.work(50.0, 5.0)] * 20, 10), Settings())
    assert slow.host_us == pytest.approx(5.0) and slow.eager_us == pytest.approx(50.0, rel=0.05)
    fast = gpu_timing.prepare(Candidate("b", "sfmp", [lambda: cuda.work(2.0, 9.0)] * 20, 10), Settings())
    assert fast.eager_us == pytest.approx(9.0, rel=0.01), "the device waits for the host"
    assert fast.sample() == pytest.approx(2.0), "a graph costs the host nothing"


def test_copies_are_three_times_the_cache_of_the_device(monkeypatch):
    for cache, rotation in ((60 << 20, 180 << 20), (96 << 20, 288 << 20), (4 << 20, 180 << 20)):
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda index, cache=cache: types.SimpleNamespace(L2_cache_size=cache))
        assert Settings().rotation() == rotation and Settings().copies(1 << 20) == rotation >> 20


PROPERTIES = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, uuid="ab-12",
                                   total_memory=7, L2_cache_size=5)


@pytest.mark.parametrize(("says", "driver", "clocks"), [
    ("580.1, 1755, 1980, 3201, 3201, [N/A]", "580.1", {"clocks.sm": 1755.0, "power.limit": None}),
    ("no devices were found", None, None),
])
def test_the_device_is_described_as_far_as_it_says(tmp_path, monkeypatch, says, driver, clocks):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{says}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: PROPERTIES)
    found = gpu_ceilings.describe_device("cuda")
    assert found["name"] == "NVIDIA H200" and found["capability"] == [9, 0] and found["driver"] == driver
    assert (found["clocks"] or {}).items() >= (clocks or {}).items()
    assert "-i GPU-ab-12 " in (tmp_path / "asked").read_text()


def test_without_nvidia_smi_the_driver_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: PROPERTIES)
    found = gpu_ceilings.describe_device("cuda")
    assert found["driver"] is None and found["clocks"] is None and found["l2_bytes"] == 5


def test_kernels_are_compiled_before_anything_of_ours_is_measured(tmp_path, monkeypatch):
    asked = []

    def run(self, part, seconds):
        asked.append(part)
        if part["part"] == "ceilings":
            return {"device": {}, "ceilings": {"copy_gbps": 1.0}, "rotation_bytes": 5}
        return {"compiled": {"kernels": 3}} if part["part"] == "compile" else {"rows": [], "absent": {"triton 2": "no"}}

    monkeypatch.setattr(kernels.Worker, "run", run)
    chosen = [{"part": "product", "shape": [128, 128]}]
    result = kernels.measure(chosen, {"device": "cuda"}, tmp_path / "k.json", log=lambda *_, **__: None)
    assert [part["part"] for part in asked] == ["ceilings", "compile", "product"] and asked[1]["parts"] == chosen
    assert result["compiled"] == {"kernels": 3} and result["absent"] == {"triton 2": "no"}
    assert [part["part"] for part in result["parts"]] == ["product"]
