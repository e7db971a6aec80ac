"""The executor against the ONNX standard's own node tests, as onnx ships them."""

from __future__ import annotations

import functools
import re
import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from efrapq.errors import UnsupportedModelError
from efrapq.graph.executor import Executor
from efrapq.graph.ops import OPS, supports
from efrapq.graph.ops_call import DTYPES, as_tensor

# How many node tests pass, as measured with onnx 1.23. Newer releases add tests; none may be lost.
MEASURED = 1073

# Tests of supported operators that the executor declines: a pattern of names, and why.
DECLINED = {
    r"test_batchnorm_.*_training_mode": "training mode: models are exported for inference",
    r"test_training_dropout(_default)?(_mask)?": "random: models are exported for inference",
    r"test_maxpool_with_argmax_.*": "the indices of MaxPool serve only MaxUnpool",
    r"test_(add|sub|div|mod|max|min|(greater|less)(_equal)?)_uint(16|32|64)(_expanded)?": (
        "torch has no such arithmetic on unsigned integers of 16 to 64 bits"
    ),
}


def _element_types(case: Any) -> set[ir.DataType]:
    """Of the inputs, outputs and constants; those that are no tensors count as UNDEFINED."""
    graph = case.model.graph
    kinds = {ir.DataType(v.type.tensor_type.elem_type) for v in (*graph.input, *graph.output)}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                kinds.add(ir.DataType(attribute.t.data_type))
            if node.op_type == "Cast" and attribute.name == "to":
                kinds.add(ir.DataType(attribute.i))
    return kinds


@functools.cache
def _cases() -> dict[str, list[Any]]:
    """The tests made of supported operators on supported types, by operator; functions by what they expand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the generators divide by zero on purpose
        from onnx.backend.test.loader import load_model_tests

        loaded = load_model_tests(kind="node")
    by_op = defaultdict(list)
    for case in loaded:
        nodes = case.model.graph.node
        if all(supports(node.domain, node.op_type) for node in nodes) and _element_types(case) <= DTYPES.keys():
            by_op[nodes[0].op_type if len(nodes) == 1 else "functions"].append(case)
    return by_op


def _declined(case: Any) -> bool:
    return any(re.fullmatch(pattern, case.name) for pattern in DECLINED)


def _tensor(given: Any) -> torch.Tensor:
    """From the TensorProto, array or scalar that a test holds."""
    return as_tensor(ir.from_proto(given) if hasattr(given, "SerializeToString") else ir.tensor(np.asarray(given)))


def _relative_tolerance(case: Any, dtype: torch.dtype) -> float:
    """The test's own, but no less than two steps of a 16-bit float: references round less often on the way."""
    return max(case.rtol, 2 * torch.finfo(dtype).eps) if dtype.is_floating_point else 0


def _check(case: Any) -> None:
    model = ir.from_proto(case.model)
    executor = Executor(model)
    for inputs, expected in case.data_sets:
        feeds = {value.name: _tensor(given) for value, given in zip(model.graph.inputs, inputs, strict=False)}
        results = executor.run(feeds)
        for value, wanted in zip(model.graph.outputs, map(_tensor, expected), strict=True):
            torch.testing.assert_close(
                results[value.name],
                wanted,
                rtol=_relative_tolerance(case, wanted.dtype),
                atol=case.atol if wanted.is_floating_point() else 0,
                equal_nan=True,
                msg=lambda text: f"{case.name}: {text}",
            )


@pytest.mark.parametrize("op_type", [*sorted(name for _, name in OPS), "functions"])
def test_operator_agrees_with_the_node_tests_of_the_standard(op_type: str) -> None:
    for case in _cases()[op_type]:
        if not _declined(case):
            _check(case)


def test_no_fewer_node_tests_pass_than_measured() -> None:
    assert sum(not _declined(case) for cases in _cases().values() for case in cases) >= MEASURED


@pytest.mark.parametrize("pattern", DECLINED)
def test_what_is_declined_is_an_error_and_never_a_wrong_result(pattern: str) -> None:
    cases = [case for cases in _cases().values() for case in cases if re.fullmatch(pattern, case.name)]
    assert cases
    for case in cases:
        with pytest.raises(UnsupportedModelError, match=r"^node '"):
            _check(case)
