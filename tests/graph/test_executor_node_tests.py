"""The executor against the ONNX standard's own node tests, as onnx ships them.

Of the 1884 tests of onnx 1.23, 1217 are made of operators in the table: 1073 pass, 44 are declined (`DECLINED`) and
100 are on types that torch does not hold here (float8, float4, strings, sequences). Of the other 667, which go to ONNX
Runtime, 452 pass within its own precision or a stated difference, 164 are refused because the runtime has no such
operator, type or opset, and 51 are on types that it cannot be given here.
"""

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

# How many tests of operators outside of the table pass through ONNX Runtime 1.31, training losses left out.
MEASURED_FALLBACK = 361

# Where ONNX Runtime, which runs what is exported, and the standard's reference differ.
RUNTIME_DIFFERS = {
    r"test_resize_downsample_scales_(linear|cubic)_align_corners": "the runtime counts whole output pixels",
    r"test_maxunpool_export_with_output_shape": "the runtime reads the indices against the shape it was given",
    r"test_attention_4d_with_past_and_present_qk_matmul_bias_[34]d_mask_causal": (
        "the runtime masks with the lowest float, the reference with minus infinity"
    ),
}

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
def _loaded() -> list[Any]:
    """All tests on supported element types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the generators divide by zero on purpose
        from onnx.backend.test.loader import load_model_tests

        return [case for case in load_model_tests(kind="node") if _element_types(case) <= DTYPES.keys()]


def _in_table(case: Any) -> bool:
    return all(supports(node.domain, node.op_type) for node in case.model.graph.node)


@functools.cache
def _cases() -> dict[str, list[Any]]:
    """The tests made of operators in the table, by operator; functions by what they expand."""
    by_op = defaultdict(list)
    for case in filter(_in_table, _loaded()):
        nodes = case.model.graph.node
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


def _check(case: Any, precision: float = 0) -> None:
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
                atol=max(case.atol, precision) if wanted.is_floating_point() else 0,
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


def test_what_the_table_lacks_agrees_in_onnx_runtime_or_is_refused() -> None:
    passed = 0
    for case in _loaded():
        losses = any(node.op_type.endswith("Loss") for node in case.model.graph.node)
        if losses or _in_table(case) or any(re.fullmatch(pattern, case.name) for pattern in RUNTIME_DIFFERS):
            continue
        try:
            _check(case, precision=3e-4)
        except UnsupportedModelError as exc:
            assert str(exc).startswith("node '")  # noqa: PT017
        else:
            passed += 1
    assert passed >= MEASURED_FALLBACK
