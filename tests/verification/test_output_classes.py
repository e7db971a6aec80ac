"""Which axis of an output counts classes, on the ends that networks have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from efrapq.verification.classes import ClassAxis, class_axes

make = helper.make_node
CONV = np.zeros((5, 3, 1, 1), np.float32)
CONSTANTS = {
    "conv": CONV,
    "up": np.zeros((3, 2, 2, 2), np.float32),
    "gemm": np.zeros((7, 3), np.float32),
    "matmul": np.zeros((3, 7), np.float32),
    "bias": np.zeros((5, 1, 1), np.float32),
    "rows": np.array([0, 5, -1], np.int64),
    "anchors": np.array([0, 2, -1], np.int64),
    "sizes": np.array([0, 5, 16, 16], np.int64),
}
IMAGE = ("N", 3, 8, 8)
ROWS = ("N", 6, 3)
TABLE = ("N", 3)


def chain(*nodes: tuple[str, dict[str, object], tuple[str, ...]]) -> list[onnx.NodeProto]:
    """Nodes that each take the value before and these constants: x → v1 → … → y."""
    made = []
    for index, (op, attributes, others) in enumerate(nodes):
        source = "x" if index == 0 else f"v{index}"
        made.append(make(op, [source, *others], ["y" if index == len(nodes) - 1 else f"v{index + 1}"], **attributes))
    return made


CASES: dict[str, tuple[list[onnx.NodeProto], tuple[object, ...], ClassAxis | None]] = {
    "convolution": (chain(("Conv", {}, ("conv",))), IMAGE, ClassAxis(1, 5)),
    "grouped transposed convolution": (chain(("ConvTranspose", {"group": 3}, ("up",))), IMAGE, ClassAxis(1, 6)),
    "convolution, bias, resize": (
        chain(("Conv", {}, ("conv",)), ("Add", {}, ("bias",)), ("Resize", {"mode": "linear"}, ("", "", "sizes"))),
        IMAGE,
        ClassAxis(1, 5),
    ),
    "channels last": (
        chain(("Conv", {}, ("conv",)), ("Transpose", {"perm": [0, 2, 3, 1]}, ())),
        IMAGE,
        ClassAxis(3, 5),
    ),
    "there and back": (
        chain(
            ("Conv", {}, ("conv",)),
            ("Transpose", {"perm": [0, 2, 3, 1]}, ()),
            ("Relu", {}, ()),
            ("Transpose", {"perm": [0, 3, 1, 2]}, ()),
        ),
        IMAGE,
        ClassAxis(1, 5),
    ),
    "rows of pixels": (
        chain(("Conv", {}, ("conv",)), ("Reshape", {}, ("rows",)), ("Transpose", {"perm": [0, 2, 1]}, ())),
        IMAGE,
        ClassAxis(2, 5),
    ),
    "matrix product": (chain(("MatMul", {}, ("matmul",))), ROWS, ClassAxis(-1, 7)),
    "matrix product, transposed": (
        chain(("MatMul", {}, ("matmul",)), ("Transpose", {"perm": [0, 2, 1]}, ())),
        ROWS,
        ClassAxis(1, 7),
    ),
    "gemm": (chain(("Gemm", {"transB": 1}, ("gemm",))), TABLE, ClassAxis(1, 7)),
    "gemm, not transposed": (chain(("Gemm", {}, ("matmul",))), TABLE, ClassAxis(1, 7)),
    "softmax": (chain(("MatMul", {}, ("matmul",)), ("Softmax", {"axis": 2}, ())), ROWS, ClassAxis(2)),
    "softmax over the last axis": (chain(("Conv", {}, ("conv",)), ("LogSoftmax", {}, ())), IMAGE, ClassAxis(-1)),
    "masks, each its own": (chain(("Conv", {}, ("conv",)), ("Sigmoid", {}, ())), IMAGE, None),
    "pixels": (chain(("Conv", {}, ("conv",)), ("DepthToSpace", {"blocksize": 1}, ())), IMAGE, None),
    "gated": ([make("Conv", ["x", "conv"], ["a"]), make("Mul", ["a", "a"], ["y"])], IMAGE, None),
    "scaled": ([make("Conv", ["x", "conv"], ["a"]), make("Mul", ["a", "bias"], ["y"])], IMAGE, ClassAxis(1, 5)),
    "sum of two": (
        [make("Conv", ["x", "conv"], ["a"]), make("Conv", ["x", "conv"], ["b"]), make("Add", ["a", "b"], ["y"])],
        IMAGE,
        ClassAxis(1, 5),
    ),
    "joined heads": (
        [make("Conv", ["x", "conv"], ["a"]), make("Concat", ["a", "a"], ["y"], axis=2)],
        IMAGE,
        None,
    ),
    "no layer": (chain(("Relu", {}, ())), IMAGE, None),
    "similarities": ([make("MatMul", ["x", "x"], ["y"])], ("N", 4, 4), None),
    "the input itself": ([make("Identity", ["x"], ["z"]), make("Identity", ["x"], ["y"])], IMAGE, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_axis_of_classes(make_model: Callable[..., onnx.ModelProto], name: str) -> None:
    nodes, shape, expected = CASES[name]
    found = class_axes(make_model(nodes, {"x": shape}, {"y": None}, CONSTANTS))
    assert found == ({} if expected is None else {"y": expected})


def test_weights_of_constant_nodes_and_older_softmaxes(make_model: Callable[..., onnx.ModelProto]) -> None:
    constant = make("Constant", [], ["w"], value=onnx.numpy_helper.from_array(CONV))
    nodes = [constant, make("Conv", ["x", "w"], ["y"])]
    assert class_axes(make_model(nodes, {"x": IMAGE}, {"y": None})) == {"y": ClassAxis(1, 5)}
    softmax = [make("Softmax", ["x"], ["y"])]
    assert class_axes(make_model(softmax, {"x": TABLE}, {"y": None}, opset=11)) == {"y": ClassAxis(1)}


def test_several_outputs(make_model: Callable[..., onnx.ModelProto]) -> None:
    nodes = [
        make("Conv", ["x", "conv"], ["classes"]),
        make("Conv", ["x", "conv"], ["b"]),
        make("Sigmoid", ["b"], ["boxes"]),
    ]
    proto = make_model(nodes, {"x": IMAGE}, {"classes": None, "boxes": None}, CONSTANTS)
    assert class_axes(proto) == {"classes": ClassAxis(1, 5)}


@pytest.mark.parametrize(
    ("found", "shape", "axis"),
    [
        (ClassAxis(1, 5), (2, 5, 8, 8), 1),
        (ClassAxis(-1, 7), (2, 6, 7), 2),
        (ClassAxis(-1), (2, 6, 7), 2),
        (ClassAxis(1, 5), (2, 4, 8, 8), None),
        (ClassAxis(1), (2, 1, 8, 8), None),
        (ClassAxis(-1), (7,), None),
        (ClassAxis(3, 5), (2, 5, 8), None),
        (ClassAxis(-3, 5), (5, 8, 8), None),
    ],
    ids=["second", "last", "uncounted", "another count", "one class", "samples", "behind the end", "samples in front"],
)
def test_the_axis_has_to_hold_the_classes(found: ClassAxis, shape: tuple[int, ...], axis: int | None) -> None:
    assert found.of(shape) == axis


def test_a_graph_in_circles_ends(make_model: Callable[..., onnx.ModelProto]) -> None:
    proto = make_model([make("Relu", ["a"], ["b"]), make("Relu", ["b"], ["a"])], {"x": IMAGE}, {"b": None})
    assert class_axes(proto) == {}
