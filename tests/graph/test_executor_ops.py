"""Single operators against ONNX Runtime, where the standard's node tests are thin: older opsets, asymmetric
padding, groups, rounding of output sizes, optional inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from efrapq.errors import UnsupportedModelError
from efrapq.graph.executor import Executor


def _model(
    op_type: str, inputs: list[np.ndarray | None], opset: int, outputs: int = 1, **attributes: Any
) -> onnx.ModelProto:
    names = ["" if array is None else f"x{i}" for i, array in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, names, results, name="node", **attributes)
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, inputs, strict=True)
        if array is not None
    ]
    graph = helper.make_graph([node], "g", declared, [onnx.ValueInfoProto(name=name) for name in results])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def _in_ort(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def _assert_as_ort(
    op_type: str, inputs: list[np.ndarray | None], opset: int, outputs: int = 1, **attributes: Any
) -> None:
    """Shapes, types and integers equal; floats within 2e-6 of the largest magnitude."""
    proto = _model(op_type, inputs, opset, outputs, **attributes)
    feeds = {f"x{i}": array for i, array in enumerate(inputs) if array is not None}
    expected = _in_ort(proto, feeds)
    results = Executor(ir.from_proto(proto)).run({name: torch.from_numpy(array) for name, array in feeds.items()})
    for i, wanted in enumerate(expected):
        result = results[f"y{i}"].numpy()
        assert result.dtype == wanted.dtype
        assert result.shape == wanted.shape
        if wanted.dtype.kind == "f":
            tolerance = 2e-6 * max(1.0, float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0)))
            np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance)
        else:
            np.testing.assert_array_equal(result, wanted)


def _f(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _i(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def _id(case: tuple[Any, ...]) -> str:
    op_type, opset, inputs, attributes = case
    shown = "-".join(f"{k}{v}".replace(" ", "") for k, v in attributes.items())
    return f"{op_type}{opset}-{len(inputs)}in-{shown}"


CONVOLUTIONS: list[tuple[Any, ...]] = [
    ("Conv", 11, [_f(2, 3, 9), _f(4, 3, 3), _f(4)], {"pads": [1, 2], "strides": [2]}),
    ("Conv", 11, [_f(2, 3, 9, 8), _f(4, 3, 3, 2)], {"pads": [0, 1, 2, 0], "strides": [2, 1]}),
    ("Conv", 11, [_f(2, 4, 9, 8), _f(6, 2, 3, 3), _f(6)], {"group": 2, "dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    ("Conv", 11, [_f(2, 4, 9, 8), _f(4, 1, 3, 3), _f(4)], {"group": 4, "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("Conv", 22, [_f(1, 2, 5, 6, 7), _f(3, 2, 3, 2, 3), _f(3)], {"pads": [1, 0, 1, 1, 1, 0]}),
    *(
        ("Conv", opset, [_f(1, 2, 8, 7), _f(3, 2, 4, 3), _f(3)], {"auto_pad": auto_pad, "strides": [3, 2]})
        for opset in (7, 11)
        for auto_pad in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    ("ConvTranspose", 11, [_f(2, 4, 5), _f(4, 2, 3), _f(4)], {"group": 2, "strides": [2], "output_padding": [1]}),
    ("ConvTranspose", 11, [_f(2, 4, 5, 4), _f(4, 3, 3, 3), _f(3)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("ConvTranspose", 11, [_f(2, 4, 5, 4), _f(4, 3, 3, 3), _f(3)], {"strides": [2, 3], "pads": [1, 0, 0, 2]}),
    ("ConvTranspose", 11, [_f(2, 4, 5, 4), _f(4, 3, 3, 3), _f(3)], {"strides": [3, 2], "output_padding": [2, 1]}),
    (
        "ConvTranspose",
        11,
        [_f(2, 4, 5, 4), _f(4, 3, 3, 3), _f(3)],
        {"strides": [2, 2], "pads": [0, 0, 1, 1], "output_padding": [1, 1]},
    ),
    ("ConvTranspose", 11, [_f(1, 2, 5, 4), _f(2, 3, 3, 3), _f(3)], {"strides": [2, 2], "output_shape": [10, 8]}),
    ("ConvTranspose", 22, [_f(1, 2, 5, 4), _f(2, 3, 3, 3)], {"dilations": [2, 2], "group": 1}),
    *(
        ("ConvTranspose", 11, [_f(1, 2, 5, 4), _f(2, 3, 3, 4)], {"auto_pad": auto_pad, "strides": [2, 2]})
        for auto_pad in ("SAME_UPPER", "SAME_LOWER")
    ),
]

POOLS: list[tuple[Any, ...]] = [
    ("MaxPool", 7, [_f(2, 3, 9)], {"kernel_shape": [3], "strides": [2], "pads": [0, 1]}),
    ("MaxPool", 12, [_f(2, 3, 9, 8)], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}),
    ("MaxPool", 12, [_f(2, 3, 9, 8)], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    (
        "MaxPool",
        12,
        [_f(2, 3, 6, 8)],
        {"kernel_shape": [2, 3], "strides": [4, 3], "ceil_mode": 1, "pads": [0, 1, 1, 1]},
    ),
    ("MaxPool", 12, [_f(2, 3, 9, 8)], {"kernel_shape": [3, 3], "dilations": [2, 2], "pads": [2, 2, 2, 2]}),
    ("MaxPool", 12, [_f(1, 1, 8, 7)], {"kernel_shape": [3, 2], "auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ("MaxPool", 12, [_f(1, 2, 5, 6, 7)], {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2], "ceil_mode": 1}),
    ("AveragePool", 7, [_f(2, 3, 9, 8)], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", 7, [_f(2, 3, 9, 8)], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    *(
        (
            "AveragePool",
            19,
            [_f(2, 3, 9, 8)],
            {"kernel_shape": [3, 2], "strides": [2, 2], "pads": pads, "count_include_pad": include, "ceil_mode": ceil},
        )
        for pads in ([0, 1, 1, 0], [1, 1, 1, 1])
        for include in (0, 1)
        for ceil in (0, 1)
    ),
    ("AveragePool", 19, [_f(2, 3, 9, 8)], {"kernel_shape": [3, 2], "dilations": [2, 1], "pads": [1, 0, 1, 0]}),
    ("AveragePool", 11, [_f(2, 3, 9, 8)], {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("AveragePool", 11, [_f(2, 3, 9)], {"kernel_shape": [4], "strides": [3], "pads": [1, 2]}),
    ("GlobalAveragePool", 7, [_f(2, 3, 5, 4)], {}),
    ("GlobalMaxPool", 7, [_f(2, 3, 5)], {}),
]

MATRICES: list[tuple[Any, ...]] = [
    *(
        (
            "Gemm",
            11,
            [_f(*((4, 3) if trans_a else (3, 4))), _f(*((5, 4) if trans_b else (4, 5))), *c],
            {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "beta": 2.0},
        )
        for trans_a in (0, 1)
        for trans_b in (0, 1)
        for c in ([], [_f(5)], [_f(3, 1)], [_f(3, 5)])
    ),
    ("Gemm", 7, [_f(3, 4), _f(4, 5), _f(1)], {}),
    ("MatMul", 9, [_f(2, 3, 4), _f(4, 5)], {}),
    ("MatMul", 13, [_f(4), _f(2, 4, 5)], {}),
]

NORMALIZATIONS: list[tuple[Any, ...]] = [
    *(
        ("BatchNormalization", opset, [_f(2, 3, *size), _f(3), _f(3), _f(3), np.abs(_f(3))], {"epsilon": 1e-3})
        for opset in (7, 9, 14, 15)
        for size in ((), (4,), (4, 5))
    ),
    ("InstanceNormalization", 6, [_f(2, 3, 4, 5), _f(3), _f(3)], {}),
    ("InstanceNormalization", 6, [_f(2, 3, 1, 2), _f(3), _f(3)], {"epsilon": 0.5}),
    ("LayerNormalization", 17, [_f(2, 3, 4), _f(3, 4), _f(3, 4)], {"axis": 1}),
    ("LayerNormalization", 17, [_f(2, 3, 4), _f(4)], {}),
    ("GroupNormalization", 18, [_f(2, 4, 3, 3), _f(2), _f(2)], {"num_groups": 2}),
    ("GroupNormalization", 21, [_f(2, 4, 3, 3), _f(4), _f(4)], {"num_groups": 2}),
    ("LRN", 13, [_f(2, 7, 3, 3)], {"size": 5, "alpha": 0.3, "beta": 0.6, "bias": 2.0}),
    *(
        (op_type, opset, [_f(2, 3, 4)], {"axis": axis})
        for op_type in ("Softmax", "LogSoftmax")
        for opset in (7, 11, 13)
        for axis in (0, 1, 2)
    ),
    ("Softmax", 11, [_f(2, 3, 4)], {}),
    ("Softmax", 13, [_f(2, 3, 4)], {}),
    ("Softmax", 11, [_f(2, 3, 4)], {"axis": -1}),
]

ELEMENTWISE: list[tuple[Any, ...]] = [
    ("Clip", 7, [_f(3, 4)], {"min": -0.5, "max": 0.25}),
    ("Clip", 7, [_f(3, 4)], {"min": 0.0}),
    ("Clip", 11, [_f(3, 4), np.float32(-0.5), np.float32(0.25)], {}),
    ("Clip", 13, [_f(3, 4), None, np.float32(0.25)], {}),
    ("Clip", 13, [np.arange(-4, 4, dtype=np.int8), np.int8(0), np.int8(2)], {}),
    ("Div", 13, [_i(-7, 7, -7, 7), _i(2, 2, -2, -2)], {}),
    ("Mod", 13, [_i(-7, 7, -7, 7), _i(2, 2, -2, -2)], {}),
    ("Mod", 13, [_f(6), _f(6, seed=1)], {"fmod": 1}),
    ("Pow", 13, [np.abs(_f(3, 4)), _i(2)], {}),
    ("Pow", 13, [_i(1, 2, 3), np.float32([1.5, 2, 0.5])], {}),
    ("PRelu", 9, [_f(2, 3, 4), _f(3, 1)], {}),
    ("Gelu", 20, [_f(3, 4)], {"approximate": "tanh"}),
    ("HardSigmoid", 6, [3 * _f(3, 4)], {"alpha": 0.3}),
    ("Selu", 6, [_f(3, 4)], {}),
    ("Celu", 12, [_f(3, 4)], {"alpha": 0.7}),
    ("Round", 11, [np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.7])], {}),
    ("Max", 8, [_f(3, 4), _f(4), _f(3, 1)], {}),
    ("Mean", 8, [_f(3, 4), _f(4), _f(3, 1)], {}),
    ("Where", 9, [_f(3, 4) > 0, _f(4), _f(3, 1)], {}),
    ("Equal", 11, [_i(1, 2), _i(1, 3)], {}),
    ("Cast", 9, [np.float32([-1.7, 0.0, 1.7])], {"to": TensorProto.INT64}),
    ("Cast", 9, [np.float32([-1.7, 0.0, 1.7])], {"to": TensorProto.BOOL}),
    ("CumSum", 14, [_f(3, 4), np.int64(-1)], {"exclusive": 1, "reverse": 1}),
]

REDUCTIONS: list[tuple[Any, ...]] = [
    *(
        (op_type, opset, [_f(2, 3, 4)] + ([_i(-1, 0)] if opset >= since else []), attributes)
        for op_type in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd")
        for opset, since in ((11, 99), (18, 0))
        for attributes in (
            {"keepdims": 0} | ({} if opset >= since else {"axes": [-1, 0]}),
            {} if opset >= since else {"axes": [1]},
        )
    ),
    ("ReduceSum", 13, [_f(2, 3), _i(1)], {}),
    ("ReduceSum", 13, [_f(2, 3), _i()], {"noop_with_empty_axes": 1}),
    ("ReduceMean", 13, [_f(2, 3)], {}),
    ("ReduceSum", 13, [np.arange(6, dtype=np.int32).reshape(2, 3)], {"keepdims": 0}),
    ("ArgMax", 13, [np.float32([[1, 3, 3], [2, 2, 1]])], {"axis": -1, "keepdims": 0, "select_last_index": 1}),
    ("ArgMin", 11, [_f(3, 4)], {}),
]

LAYOUT: list[tuple[Any, ...]] = [
    ("Slice", 9, [_f(5, 6)], {"starts": [1, -4], "ends": [4, 100]}),
    ("Slice", 9, [_f(5, 6)], {"starts": [-3], "ends": [-1], "axes": [1]}),
    ("Slice", 10, [_f(5, 6), _i(4, 5), _i(-100, 0), _i(0, 1), _i(-2, -1)], {}),
    ("Slice", 13, [_f(5, 6), _i(-100), _i(2**62), _i(-1), _i(2)], {}),
    ("Slice", 13, [_f(5, 6), _i(4), _i(2), _i(0)], {}),
    ("Pad", 7, [_f(2, 3)], {"pads": [0, 1, 2, 3], "value": 0.5}),
    ("Pad", 11, [_f(2, 3), _i(0, 1, 2, 3), np.float32(0.5)], {}),
    ("Pad", 13, [_f(2, 3), _i(0, -1, 1, 0)], {}),
    ("Pad", 18, [_f(2, 3, 4), _i(1, 2), None, _i(-1)], {}),
    ("Pad", 13, [_f(2, 3, 4, 5), _i(0, 0, 2, 1, 0, 0, 1, 3)], {"mode": "reflect"}),
    ("Pad", 13, [_f(2, 3, 4, 5), _i(1, 0, 2, 1, 0, 2, 1, 6)], {"mode": "edge"}),
    ("Pad", 19, [_f(2, 3, 4), _i(0, 0, 2, 1, 0, 3)], {"mode": "wrap"}),
    ("Reshape", 7, [_f(2, 3, 4), _i(0, -1)], {}),
    ("Reshape", 14, [_f(0, 3), _i(0, 5)], {"allowzero": 1}),
    ("Reshape", 14, [_f(0, 3), _i(-1, 3)], {}),
    ("Flatten", 9, [_f(2, 3, 4)], {"axis": 3}),
    ("Flatten", 11, [_f(2, 3, 4)], {"axis": -1}),
    ("Squeeze", 11, [_f(1, 3, 1)], {"axes": [-1]}),
    ("Squeeze", 13, [_f(1, 3, 1), _i(0)], {}),
    ("Squeeze", 13, [_f(1, 3, 1)], {}),
    ("Unsqueeze", 11, [_f(3, 4)], {"axes": [0, 3]}),
    ("Unsqueeze", 13, [_f(3, 4), _i(-1, 1)], {}),
    ("Gather", 11, [_f(3, 4), np.array([[0, -1], [2, 0]])], {"axis": 1}),
    ("Gather", 13, [_i(5, 6, 7), np.int64(-1)], {}),
    ("Expand", 8, [_f(3, 1), _i(2, 1, 4)], {}),
    ("Shape", 13, [_f(2, 3, 4)], {}),
    ("Shape", 15, [_f(2, 3, 4)], {"start": -2, "end": 2}),
    ("ConstantOfShape", 9, [_i(2, 3)], {"value": helper.make_tensor("v", TensorProto.INT64, [1], [7])}),
    ("ConstantOfShape", 9, [_i(2, 3)], {}),
    ("Range", 11, [np.float32(1), np.float32(2), np.float32(0.3)], {}),
    ("Range", 11, [np.int64(5), np.int64(-2), np.int64(-2)], {}),
    ("DepthToSpace", 7, [_f(1, 8, 2, 3)], {"blocksize": 2}),
    ("DepthToSpace", 11, [_f(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", 7, [_f(1, 2, 4, 6)], {"blocksize": 2}),
]

QUANTIZATION: list[tuple[Any, ...]] = [
    ("QuantizeLinear", 10, [5 * _f(3, 40), np.float32(0.02), np.uint8(128)], {}),
    ("QuantizeLinear", 10, [_f(3, 40), np.float32(0.5)], {}),
    ("QuantizeLinear", 13, [np.float32([-1.5, -0.5, 0.5, 1.5, 2.5]), np.float32(1), np.int8(3)], {}),
    ("QuantizeLinear", 13, [5 * _f(3, 4), np.float32([0.1, 0.2, 0.3]), np.int8([0, 1, 2])], {"axis": 0}),
    ("QuantizeLinear", 21, [500 * _f(3, 4), np.float32(0.01), np.uint16(7)], {}),
    ("DequantizeLinear", 10, [np.uint8([0, 128, 255]), np.float32(0.1), np.uint8(128)], {}),
    (
        "DequantizeLinear",
        13,
        [np.arange(-6, 6, dtype=np.int8).reshape(3, 4), np.float32([0.1, 0.2, 0.3, 0.4]), np.int8([1, 2, 3, 4])],
        {"axis": -1},
    ),
    ("DequantizeLinear", 13, [np.int32([-70000, 3]), np.float32(0.001)], {}),
    (
        "DequantizeLinear",
        21,
        [np.arange(-16, 16, dtype=np.int8).reshape(2, 16), np.abs(_f(2, 1)), np.int8([[1], [2]])],
        {"axis": 1, "block_size": 16},
    ),
]


@pytest.mark.parametrize(
    ("op_type", "opset", "inputs", "attributes"),
    [
        pytest.param(*case, id=_id(case))
        for table in (
            CONVOLUTIONS,
            POOLS,
            MATRICES,
            NORMALIZATIONS,
            ELEMENTWISE,
            REDUCTIONS,
            LAYOUT,
            QUANTIZATION,
        )
        for case in table
    ],
)
def test_operator_agrees_with_ort(op_type: str, opset: int, inputs: list[Any], attributes: dict[str, Any]) -> None:
    arrays = [None if given is None else np.asarray(given) for given in inputs]
    _assert_as_ort(op_type, arrays, opset, **attributes)


@pytest.mark.parametrize(
    ("opset", "inputs", "attributes", "outputs"),
    [
        (11, [_f(6, 4)], {"axis": 0}, 3),
        (11, [_f(6, 4)], {"split": [1, 5]}, 2),
        (13, [_f(6, 4), _i(1, 3)], {"axis": -1}, 2),
        (18, [_f(7, 4)], {"num_outputs": 3}, 3),
    ],
)
def test_split_agrees_with_ort(opset: int, inputs: list[Any], attributes: dict[str, Any], outputs: int) -> None:
    _assert_as_ort("Split", inputs, opset, outputs, **attributes)


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4], ids=["int4", "uint4"])
def test_quantize_to_four_bits_and_back_agrees_with_ort(kind: int) -> None:
    """The zero point, held as int8 or uint8 in torch, still says that the codes have four bits."""
    x = 3 * _f(4, 8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0),
    ]
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, [4], [0.2, 0.3, 0.4, 0.5]),
        helper.make_tensor("z", kind, [4], [0, 1, 2, 3]),
    ]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    results = Executor(ir.from_proto(proto)).run({"x": torch.from_numpy(x)}, ["q", "y"])
    low, high = (-8, 7) if kind == TensorProto.INT4 else (0, 15)
    assert (results["q"].min(), results["q"].max()) == (low, high)
    np.testing.assert_array_equal(results["y"].numpy(), _in_ort(proto, {"x": x})[0])


_position = st.integers(-9, 9)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(0, 6), start=_position, end=_position, step=st.sampled_from([-3, -2, -1, 1, 2, 3]))
def test_slice_agrees_with_numpy(size: int, start: int, end: int, step: int) -> None:
    if step < 0 and start < -size:
        start = -size  # there ONNX starts at the first element and NumPy takes none
    if step < 0 and end < -size:
        end = -size - 1
    x = np.arange(size, dtype=np.float32)
    executor = Executor(ir.from_proto(_model("Slice", [x, _i(start), _i(end), _i(0), _i(step)], 13)))
    feeds = {"x0": torch.from_numpy(x)} | {
        f"x{i}": torch.tensor([number]) for i, number in enumerate((start, end, 0, step), start=1)
    }
    np.testing.assert_array_equal(executor.run(feeds)["y0"].numpy(), x[start:end:step])


@pytest.mark.parametrize(
    ("op_type", "opset", "inputs", "attributes", "problem"),
    [
        ("Conv", 11, [_f(1, 2, 5, 5), _f(3, 4, 3, 3)], {}, "channels"),
        ("Conv", 11, [_f(1, 2, 3, 3, 3, 3), _f(2, 2, 1, 1, 1, 1)], {}, "4 spatial dimensions"),
        ("Add", 13, [_f(3), _f(4)], {}, "must match"),
        ("Reshape", 13, [_f(3), _i(2)], {}, "invalid"),
        ("Squeeze", 13, [_f(3, 2), _i(0)], {}, "size 1"),
        ("Softmax", 13, [_f(3)], {"axis": 4}, "range"),
        ("Flatten", 13, [_f(3)], {"axis": 4}, "axis 4"),
        ("Gemm", 13, [_f(3)], {}, "missing"),
        ("Pad", 13, [_f(3), _i(1, 1)], {"mode": "odd"}, "'odd'"),
        ("BatchNormalization", 7, [_f(1, 1), _f(1), _f(1), _f(1), _f(1)], {"spatial": 0}, "spatial"),
        ("Cast", 13, [_f(3)], {"to": TensorProto.STRING}, "STRING"),
    ],
)
def test_what_an_operator_cannot_do_names_the_node_and_the_operator(
    op_type: str, opset: int, inputs: list[np.ndarray], attributes: dict[str, Any], problem: str
) -> None:
    executor = Executor(ir.from_proto(_model(op_type, [*inputs], opset, **attributes)))
    with pytest.raises(UnsupportedModelError, match=rf"node 'node' \({op_type}\) cannot be run: .*{problem}"):
        executor.run({f"x{i}": torch.from_numpy(array) for i, array in enumerate(inputs)})
