"""What a model takes, read from its graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from efrapq.calibration.signature import (
    ModelInput,
    fixed_batch,
    holds_samples,
    model_inputs,
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


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.BFLOAT16, TensorProto.INT4, TensorProto.COMPLEX64])
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


@pytest.mark.parametrize(
    ("dims", "batch", "samples"),
    [
        ({"ids": ("N", "T"), "mask": ("N", "T")}, None, ["ids", "mask"]),
        ({"x": ("N", 512), "state": (2, "N", 128), "rate": ()}, None, ["x"]),
        ({"x": (1, 512), "state": (2, 1, 128), "rate": ()}, 1, ["x"]),  # a tie: the first one decides
        ({"state": (2, 1, 128), "x": (1, 512)}, 2, ["state"]),
        ({"x": (1, 512), "y": (1, 3), "state": (2, 1, 128)}, 1, ["x", "y"]),
        ({"rate": ()}, None, []),
        ({"x": None, "y": (4, 3)}, None, ["x"]),
        ({"x": (8, 5), "y": (8, "T")}, 8, ["x", "y"]),
    ],
    ids=["dynamic", "state and scalar", "tie", "another tie", "most", "scalar only", "unknown rank", "fixed batch"],
)
def test_which_inputs_hold_samples(
    dims: dict[str, tuple[int | str | None, ...] | None], batch: int | None, samples: list[str]
) -> None:
    inputs = [ModelInput(name, F32, d) for name, d in dims.items()]
    assert fixed_batch(inputs) == batch
    assert [i.name for i in inputs if holds_samples(i, batch)] == samples
