"""Peers on the CPU as candidates: torch, onnxruntime and OpenVINO, each with its own best layout of the weights.

Copies have contents of their own, because onnxruntime keeps one of several identical weights and would then be timed
from cache. Errors are against float64 with the weight a peer dequantizes.

Source: CPU.md sections 0 and 2.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch

from sfmp.bench.timing import Candidate, copies, relative_error

GROUP_SIZE = 128
LEVELS = {"acc1": 1, "acc4": 4, "lut": 4}  # onnxruntime's accuracy_level: 4 allows int8 activations


def torch_dense(rows: int, columns: int, x: torch.Tensor, dtype: torch.dtype) -> Candidate:
    """``torch.nn.functional.linear`` with weights and activations of one dtype."""
    size, generator = dtype.itemsize * rows * columns, torch.Generator().manual_seed(0)
    weights = [(torch.randn(rows, columns, generator=generator) * 0.02).to(dtype) for _ in range(copies(size))]
    x = x.to(dtype)
    products = [functools.partial(torch.nn.functional.linear, x, weight) for weight in weights]
    error = relative_error(products[0]().float(), x.double() @ weights[0].double().T)
    name = str(dtype).removeprefix("torch.")
    return Candidate(f"torch {name}", "torch", products, size, error=error,
                     facts={"mode": name, "bits": 8 * dtype.itemsize})


def torch_int4(rows: int, columns: int, x: torch.Tensor) -> Candidate:
    """``_weight_int4pack_mm_for_cpu`` with bfloat16 activations, the one dtype it is fast with."""
    generator, x, products = torch.Generator().manual_seed(0), x.bfloat16(), []
    groups = -(-columns // GROUP_SIZE)
    size = rows * columns // 2 + groups * rows * 4
    while len(products) < copies(size):
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=generator)
        scales = torch.rand(groups, rows, 2, generator=generator).mul_(0.02).to(torch.bfloat16)
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        products.append(functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, weight, GROUP_SIZE, scales))
        if len(products) == 1:
            scale, zero = (part.double().T.repeat_interleave(GROUP_SIZE, 1) for part in scales.unbind(-1))
            error = relative_error(products[0]().float(), x.double() @ ((codes.double() - 8) * scale + zero).T)
    return Candidate("torch int4pack", "torch", products, size, error=error, facts={"mode": "int4pack", "bits": 4})


def torch_int8(rows: int, columns: int, x: torch.Tensor) -> Candidate:
    """``_weight_int8pack_mm`` with bfloat16 activations."""
    generator, x = torch.Generator().manual_seed(0), x.bfloat16()
    size = rows * columns + 2 * rows
    weights = [torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
               for _ in range(copies(size))]
    scale = (torch.rand(rows, generator=generator) * 0.01 + 0.001).bfloat16()
    products = [functools.partial(torch.ops.aten._weight_int8pack_mm, x, weight, scale) for weight in weights]
    expected = x.double() @ (weights[0].double() * scale.double()[:, None]).T
    return Candidate("torch int8pack", "torch", products, size, error=relative_error(products[0]().float(), expected),
                     facts={"mode": "int8pack", "bits": 8})


def _codes(rng, rows, columns, bits):
    """(codes uint8, float32 scales [rows, groups], zero points, dequantized weight) of a random matrix."""
    groups = columns // GROUP_SIZE
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = (rng.random((rows, groups), np.float32) * 0.02 + 0.01).astype(np.float16).astype(np.float32)
    zeros = np.full((rows, groups), 1 << bits - 1, np.uint8)
    weight = (codes.astype(np.float32) - zeros.repeat(GROUP_SIZE, 1)) * scales.repeat(GROUP_SIZE, 1)
    return codes, scales, zeros, weight


def _pack_fields(codes, bits):
    """Codes beside each other in a byte, the first in its lowest bits."""
    fields = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    return np.bitwise_or.reduce(fields << (np.arange(8 // bits, dtype=np.uint8) * bits), axis=-1)


def onnxruntime(rows: int, columns: int, x: torch.Tensor, bits: int, kind: str, threads: int, cpus) -> Candidate:
    """MatMulNBits, symmetric; kind "acc1" computes in float32, "acc4" in int8, "lut" by T-MAC's tables.

    All copies are nodes of one graph, so that a call's cost is shared among them.
    """
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng, tokens = np.random.default_rng(0), len(x)
    groups, size = columns // GROUP_SIZE, rows * columns * bits // 8 + 4 * rows * (columns // GROUP_SIZE)
    nodes, initializers, outputs = [], [], []
    for copy in range(copies(size)):
        codes, scales, _, weight = _codes(rng, rows, columns, bits)
        if copy == 0:
            expected = x.double().numpy() @ weight.T.astype(np.float64)
        packed = _pack_fields(codes.reshape(rows, groups, GROUP_SIZE), bits)
        initializers += [numpy_helper.from_array(packed, f"b{copy}"),
                         numpy_helper.from_array(scales.reshape(-1), f"s{copy}")]
        nodes.append(helper.make_node("MatMulNBits", ["x", f"b{copy}", f"s{copy}"], [f"y{copy}"],
                                      domain="com.microsoft", K=columns, N=rows, bits=bits, block_size=GROUP_SIZE,
                                      accuracy_level=LEVELS[kind]))
        outputs.append(helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, [tokens, rows]))
    graph = helper.make_graph(nodes, "products", [helper.make_tensor_value_info("x", TensorProto.FLOAT,
                                                                                [tokens, columns])],
                              outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # when a call returns
    if threads > 1:  # of the threads beside the calling one; processors count from 1
        options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(str(c + 1) for c in cpus[1:]))
    if kind == "lut":
        options.add_session_config_entry("mlas.use_lut_gemm", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "products.onnx"
        onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location="weights")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding, x = session.io_binding(), np.ascontiguousarray(x.float().numpy())
    ys = [np.zeros((tokens, rows), np.float32) for _ in outputs]
    binding.bind_cpu_input("x", x)
    for copy, y in enumerate(ys):
        binding.bind_output(f"y{copy}", "cpu", 0, np.float32, y.shape, y.ctypes.data)

    def run(kept=(x, ys)):  # the session has only their addresses
        session.run_with_iobinding(binding)

    run()
    return Candidate(f"onnxruntime {kind} {bits}", "onnxruntime", [run], size, per_call=len(ys),
                     error=relative_error(ys[0], expected), facts={"mode": kind, "bits": bits})


def openvino(rows: int, columns: int, x: torch.Tensor, bits: int, threads: int) -> Candidate:
    """Compressed constants of 2, 4 or 8 bits under a MatMul; int8 activations in groups where OpenVINO uses them."""
    import openvino as ov
    from openvino import opset13 as op

    rng, tokens = np.random.default_rng(0), len(x)
    groups, kind = columns // GROUP_SIZE, {2: ov.Type.u2, 4: ov.Type.u4, 8: ov.Type.u8}[bits]
    size = rows * columns * bits // 8 + rows * groups * 2 + rows * groups * bits // 8
    parameter, results = op.parameter([tokens, columns], np.float32, name="x"), []

    def constant(array):
        tensor = ov.Tensor(kind, list(array.shape))
        tensor.data.reshape(-1)[:] = _pack_fields(array.reshape(-1), bits)
        return op.constant(tensor)

    for copy in range(copies(size)):
        codes, scales, zeros, weight = _codes(rng, rows, columns, bits)
        if copy == 0:
            expected = x.double().numpy() @ weight.T.astype(np.float64)
        whole = op.convert(constant(codes.reshape(rows, groups, GROUP_SIZE)), np.float16)
        centred = op.subtract(whole, op.convert(constant(zeros[..., None]), np.float16))
        scaled = op.multiply(centred, op.constant(scales[..., None].astype(np.float16)))
        dense = op.convert(op.reshape(scaled, op.constant(np.array([rows, columns])), False), np.float32)
        results.append(op.matmul(parameter, dense, False, True))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
                "NUM_STREAMS": 1}
    compiled = ov.Core().compile_model(ov.Model(results, [parameter], "products"), "CPU", settings)
    request = compiled.create_infer_request()
    given = np.ascontiguousarray(x.float().numpy())
    request.set_input_tensor(ov.Tensor(given))

    def run(kept=given):  # the request may have only its address
        request.infer()

    run()
    return Candidate(f"openvino u{bits}", "openvino", [run], size, per_call=len(results),
                     error=relative_error(request.get_output_tensor(0).data, expected),
                     facts={"mode": f"u{bits}", "bits": bits})


def importable(name: str) -> bool:
    """Whether a peer is installed."""
    return importlib.util.find_spec(name) is not None
