"""The launch path without a device: what the driver is called with, byte for byte, by a driver that keeps it."""

import threading

import pytest
from cuda_stand_in import Library, stand_in

from kernels_numba.gpu import cubins, driver, launches, prepared
from kernels_numba.gpu.launches import Launch, Plan
from kernels_numba.gpu.prepared import Kernels, Prepared
from sfmp.checks import SfmpError

gpu_weight = pytest.importorskip("kernels_numba.gpu.weight", reason="needs numba-cuda")


def make_first(*options): ...


def make_second(*options): ...


FIRST, SECOND = "sfmp_test_cuda_launch_first", "sfmp_test_cuda_launch_second"
TYPES = {FIRST: "uhnf", SECOND: "fhfn"}
PLAN = Plan({"a": (3, "h"), "b": (5, "f")}, (
    Launch(make_first, (1,), TYPES[FIRST], ("w", ("x", 7), -9, "b"), (3, 2), 64),
    Launch(make_second, ("k",), TYPES[SECOND], ("bias", ("y", 11), ("b", 2), 2**31 - 1), (5, 1), 128, 1 << 16)))


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(cubins, "get", lambda launch, capability: b"code")
    return Library(TYPES)


def test_every_parameter_is_what_the_plan_names(library):
    run = Prepared(PLAN, {"w": 1 << 40}, stand_in(library).kernels)
    assert run.scratch_bytes == 256 + 20
    run(10_000, 20_000, 30_000, 40_960)
    assert library.launches == [
        (FIRST, (3, 2, 1), (64, 1, 1), 0, 5, [1 << 40, 10_014, -9, 41_216]),
        (SECOND, (5, 1, 1), (128, 1, 1), 1 << 16, 5, [30_000, 20_022, 41_224, 2**31 - 1])]


def test_every_call_has_its_own_addresses_and_stream(library):
    streams = iter((7, 0, 9))
    run = Prepared(PLAN, {"w": 1}, stand_in(library, stream=lambda index: next(streams)).kernels)
    for base in (1000, 2000, 3000):
        run(base, base + 1, base + 2, base + 3)
    assert [launch[4] for launch in library.launches] == [7, 7, 0, 0, 9, 9]
    assert [launch[5][1] for launch in library.launches[::2]] == [1014, 2014, 3014]
    assert [launch[5][0] for launch in library.launches[1::2]] == [1002, 2002, 3002]


def test_threads_do_not_share_arguments(library):
    """Both threads are inside the driver at once; each finds the arguments it gave."""
    meeting, seen = threading.Barrier(2, timeout=20), []

    def meet(kernel, grid, block, shared, stream, values):
        if library.names[kernel] == FIRST:
            meeting.wait()
        seen.append((threading.get_ident(), values[1]))

    library.launched = meet
    run = Prepared(PLAN, {"w": 1}, stand_in(library).kernels)

    def work(base):
        for i in range(20):
            run(base + i, base + i, 0, 0)
        mine = [value for thread, value in seen if thread == threading.get_ident()]
        assert mine == [base + i + shift for i in range(20) for shift in (14, 22)]

    failures = []
    threads = [threading.Thread(target=lambda base=base: _collect(work, base, failures)) for base in (10**6, 10**9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(seen) == 80


def _collect(work, base, failures):
    try:
        work(base)
    except BaseException as error:  # of a thread: told by the thread that waits for it
        failures.append(error)


def test_kernels_are_loaded_once_and_put_on_the_device(library):
    kernels = stand_in(library).kernels
    for _ in range(2):
        Prepared(PLAN, {"w": 1}, kernels)
    called = [call[0] for call in library.calls]
    assert called.count("cuLibraryLoadData") == called.count("cuFuncLoad") == 2
    assert [call for call in library.calls if call[0] == "cuKernelSetAttribute"] == [
        ("cuKernelSetAttribute", 1 << 16, 0x1001, 3)]


def test_shared_memory_grows_with_what_is_asked_for(library):
    kernels = stand_in(library).kernels
    for size in (100, 50, 200):
        kernels.get(Launch(make_first, (), "n", (1,), (1, 1), 32, size))
    assert [call[1] for call in library.calls if call[0] == "cuKernelSetAttribute"] == [100, 200]


def test_threads_that_load_one_kernel_take_no_shared_memory_back(library, monkeypatch):
    """The one that asks for less is held up in the driver until the other has gone as far as it can."""
    kernels, asked, together = stand_in(library).kernels, [], threading.Barrier(2)

    def compiled(launch, capability):
        try:
            together.wait(0.5)  # never, where one loads at a time
        except threading.BrokenBarrierError:
            pass
        return b"code"

    monkeypatch.setattr(cubins, "get", compiled)
    wants = [Launch(make_first, (), "n", (1,), (1, 1), 32, size) for size in (200, 100)]
    threads = [threading.Thread(target=lambda want=want: asked.append(kernels.get(want))) for want in wants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    called = [call for call in library.calls if call[0] in ("cuLibraryLoadData", "cuKernelSetAttribute")]
    sizes = [call[1] for call in called if call[0] == "cuKernelSetAttribute"]
    assert len(called) - len(sizes) == 1 and len(set(asked)) == 1 and sizes == sorted(sizes)


def test_first_use_inside_a_graph_says_to_warm_up(library):
    with pytest.raises(SfmpError, match=r"CUDA graph: .*sfmp_test_cuda_launch_first.*is not loaded on device 0; call"):
        Prepared(PLAN, {"w": 1}, stand_in(library, capturing=lambda: True).kernels)
    assert not library.calls


def test_a_thread_without_a_context_gets_one(library):
    library.status["cuLaunchKernel"] = [driver.NO_CONTEXT, 0]
    Prepared(PLAN, {"w": 1}, stand_in(library).kernels)(1, 2, 3, 4)
    assert len(library.launches) == 2 and ("cuDevicePrimaryCtxRetain", 3) in library.calls
    assert library.calls[-1] == ("cuCtxSetCurrent",)


def test_refused_launches_are_named(library):
    library.status["cuLaunchKernel"] = [0, 701]
    run = Prepared(PLAN, {"w": 1}, stand_in(library).kernels)
    with pytest.raises(SfmpError, match=r"launching \w+_second on device 0: .*STAND_IN \(701, no device"):
        run(1, 2, 3, 4)
    library.status["cuLibraryLoadData"] = [209]
    with pytest.raises(SfmpError, match=rf"loading kernel {FIRST}: .*\(209"):
        Prepared(PLAN, {"w": 1}, stand_in(library).kernels)


def test_an_old_driver_is_named():
    library = Library()
    del library.cuLibraryLoadData
    with pytest.raises(SfmpError, match="CUDA 12.0.*update it"):
        driver.Driver(library, None, None)


def test_scratch_arrays_do_not_overlap():
    plan = Plan({"a": (3, "h"), "b": (65, "f"), "c": (1, "u")}, ())
    assert prepared.scratch_places(plan) == ({"a": 0, "b": 256, "c": 768}, 772)


def test_kernels_of_devices_are_their_own(library):
    one, two = (stand_in(library, index=index).kernels for index in (0, 1))
    launch = PLAN.launches[0]
    assert one.get(launch) == one.get(launch) != two.get(launch)
    assert isinstance(one, Kernels)


def test_signatures_pass_pointers():
    pytest.importorskip("numba")
    assert str(launches.signature("uhfin")) == "(uint32*, uint16*, float32*, int32*, int32) -> none"
