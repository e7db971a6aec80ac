"""What a model takes, read from its graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from efrapq.calibration.signature import (
    ModelInput,
    fixed_batch,
    layout_words,
    model_inputs,
    sample_axes,
    signature_words,
    takes_images,
)
from efrapq.errors import UnsupportedModelError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)


def proto(*values: onnx.ValueInfoProto, constants: tuple[str, ...] = ()) -> onnx.ModelProto:
    held = [helper.make_tensor(name, TensorProto.FLOAT, [1], [0.0]) for name in constants]
    return helper.make_model(helper.make_graph([], "g", list(values), [], held))


def tensor(name: str, kind: int, dims: list[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def test_inputs_with_types_sizes_and_names() -> None:
    found = model_inputs(
        proto(
            tensor("ids", TensorProto.INT64, ["N", 128]),
            tensor("x", TensorProto.FLOAT, [None, 0, 3]),
            tensor("rate", TensorProto.INT32, []),
            tensor("mask", TensorProto.BOOL, None),
            tensor("w", TensorProto.FLOAT, [1]),
            constants=("w",),
        ),
        "m",
    )
    assert found == [
        ModelInput("ids", I64, ("N", 128)),
        ModelInput("x", F32, (None, None, 3)),  # 0 stands for a dynamic size in some exporters' files
        ModelInput("rate", np.dtype(np.int32), ()),
        ModelInput("mask", np.dtype(np.bool_), None),
    ]
    assert signature_words(found) == (
        "'ids' int64 (N, 128), 'x' float32 (any, any, 3), 'rate' int32 (), 'mask' bool of any shape"
    )


def test_names_are_made_fit_to_be_shown() -> None:
    (found,) = model_inputs(proto(tensor("a\x1b[31m", TensorProto.FLOAT, ["n\x1b", 1])), "m")
    assert found.words() == r"'a\x1b[31m' float32 (n\x1b, 1)"
    many = [found] * 50
    assert signature_words(many).count("float32") == 10


def test_half_precision() -> None:
    """NumPy has no bfloat16: such a model is quantized as one that takes float32."""
    found = model_inputs(proto(tensor("a", TensorProto.FLOAT16, [1]), tensor("b", TensorProto.BFLOAT16, [1])), "m")
    assert [given.dtype for given in found] == [np.float16, np.float32]


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.INT4, TensorProto.COMPLEX64])
def test_types_that_no_array_has(kind: int) -> None:
    with pytest.raises(UnsupportedModelError, match="m: its input 'a' is not a tensor of float, integer or bool"):
        model_inputs(proto(tensor("a", kind, [1])), "m")


def test_a_sequence_is_no_tensor() -> None:
    value = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [1])
    with pytest.raises(UnsupportedModelError, match="its input 's' is not a tensor"):
        model_inputs(proto(value), "m")


def test_no_inputs() -> None:
    with pytest.raises(UnsupportedModelError, match="m: has no inputs"):
        model_inputs(proto(tensor("w", TensorProto.FLOAT, [1]), constants=("w",)), "m")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([ModelInput("x", F32, ("N", 3, 8, 8))], True),
        ([ModelInput("x", F32, (None, None, None, None))], True),
        ([ModelInput("x", F32, ("N", 3, 8))], False),
        ([ModelInput("x", F32, None)], False),
        ([ModelInput("x", np.dtype(np.uint8), ("N", 3, 8, 8))], False),
        ([ModelInput("x", F32, ("N", 3, 8, 8)), ModelInput("y", F32, ())], False),
    ],
)
def test_images(inputs: list[ModelInput], expected: bool) -> None:
    assert takes_images(inputs) is expected


Dims = dict[str, tuple[int | str | None, ...] | None]
AXES: dict[str, tuple[Dims, int | None, dict[str, int]]] = {
    # dimensions by input, the fixed batch, and the axis of samples of the inputs that have one
    "dynamic": ({"ids": ("N", "T"), "mask": ("N", "T")}, None, {"ids": 0, "mask": 0}),
    "scalar": ({"x": ("N", 512), "rate": ()}, None, {"x": 0}),
    "scalar only": ({"rate": ()}, None, {}),
    "unknown rank": ({"x": None, "y": (4, 3)}, None, {"x": 0}),
    "fixed": ({"x": (8, 5), "y": (8, "T")}, 8, {"x": 0, "y": 0}),
    "fixed, and a state": ({"x": (1, 512), "y": (1, 3), "state": (2, 1, 128)}, 1, {"x": 0, "y": 0}),
    "a tie: the first one decides": ({"x": (1, 512), "state": (2, 1, 128)}, 1, {"x": 0}),
    "another tie": ({"state": (2, 1, 128), "x": (1, 512)}, 2, {"state": 0}),
    # The batch behind the first axis.
    "one name": ({"x": ("N", 512), "state": (2, "N", 128)}, None, {"x": 0, "state": 1}),
    "the state in front": ({"state": (2, "N", 128), "x": ("N", 512)}, None, {"x": 0, "state": 1}),
    "no names": ({"x": (None, None), "state": (2, None, 128)}, None, {"x": 0, "state": 1}),
    "the only dynamic one": ({"x": ("N", 512), "state": (2, None, 128)}, None, {"x": 0, "state": 1}),
    "the only name": ({"x": (None, None), "state": (2, "N", 128)}, None, {"x": 0, "state": 1}),
    "last axis": ({"x": ("N", 512), "state": (128, "N")}, None, {"x": 0, "state": 1}),
    "by name among several": ({"x": ("N", "T"), "past": (12, "N", 4, "P", 64)}, None, {"x": 0, "past": 1}),
    "unknown rank beside": ({"x": None, "state": (2, None, 128)}, None, {"x": 0, "state": 1}),
    # What the names contradict, or leave open.
    "another name": ({"x": ("N", 512), "table": (4, "L", 8)}, None, {"x": 0}),
    "a name from elsewhere": ({"x": (None, "T"), "table": (4, "T")}, None, {"x": 0}),
    "two without a name": ({"x": ("N", 512), "past": (12, None, 4, None)}, None, {"x": 0}),
    "the name twice": ({"x": ("N", 512), "pairs": (2, "N", "N")}, None, {"x": 0}),
    "a fixed batch beside": ({"x": (1, 512), "state": (2, "N", 128)}, 1, {"x": 0}),
    "no input with samples in front": ({"x": (16, "N", 64)}, 16, {"x": 0}),
}


@pytest.mark.parametrize(("dims", "batch", "axes"), AXES.values(), ids=AXES.keys())
def test_which_axes_count_samples(dims: Dims, batch: int | None, axes: dict[str, int]) -> None:
    inputs = [ModelInput(name, F32, d) for name, d in dims.items()]
    assert fixed_batch(inputs) == batch
    assert sample_axes(inputs) == dict.fromkeys(dims) | axes


def test_the_layout_in_words() -> None:
    inputs = [ModelInput("x", F32, ("N", 512)), ModelInput("rate", I64, ())]
    assert layout_words(inputs) == "first axis the samples: 'x' float32 (N, 512), 'rate' int64 ()"
    inputs.insert(1, ModelInput("state", F32, (2, "N", 8)))
    assert layout_words(inputs) == (
        "first axis the samples (of 'state' axis 1): 'x' float32 (N, 512), 'state' float32 (2, N, 8), 'rate' int64 ()"
    )
