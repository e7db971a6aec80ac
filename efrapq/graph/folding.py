"""Constant folding of a stranger's graph: bounded in memory and time.

onnxsim computes whatever depends on constants only, and a few bytes can ask for any amount: ConstantOfShape of 2⁴⁰, a
Loop whose number of trips is a product. Where inference knows the sizes of all that will be folded, they are looked at
first. Where it does not, or the graph has subgraphs, onnxsim runs in a process of its own, under limits.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from efrapq.errors import LimitError, UnsupportedModelError
from efrapq.graph import simplify_child
from efrapq.graph.dialect import all_graphs
from efrapq.graph.simplify_child import FAILED, TOO_LARGE, run_onnxsim
from efrapq.io import printable

if TYPE_CHECKING:
    import onnx

__all__ = ["fold_constants"]

# Elements of one folded constant, where the model itself does not hold a quarter as many.
MOST_ELEMENTS = 1 << 28
# Of a Range, whose numbers onnxsim keeps in a form that takes many bytes for each.
MOST_NUMBERS = 1 << 20
# For a process of its own: bytes beside eight times the model's, seconds of CPU.
MEMORY, SECONDS = 4 << 30, 300
# Bytes of an initializer whose values inference is not given.
_LARGE = 4096


def fold_constants(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnxsim simplifies it: constants folded, shapes inferred, dead code gone.

    Raises LimitError where that takes more than anybody waits for, UnsupportedModelError where onnxsim fails.
    """
    try:
        simplified, ok = run_onnxsim(proto) if _is_bounded(proto) else _apart(proto)
    except LimitError:
        raise
    except Exception as exc:
        raise UnsupportedModelError(f"onnxsim could not simplify the model: {printable(exc, 400)}") from exc
    if not ok:
        raise UnsupportedModelError("onnxsim changed what the model computes; please report the model")
    return simplified


def _is_bounded(proto: onnx.ModelProto) -> bool:
    """Whether the sizes of all that will be folded are known; LimitError if one is too large."""
    graph = proto.graph
    if len(list(all_graphs(graph))) > 1:
        return False
    fed = {value.name for value in graph.input}
    known = {tensor.name for tensor in graph.initializer} - fed
    folded: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type in ("Shape", "Size") or (node.input and known.issuperset(filter(None, node.input))):
            folded.append(node)
        elif node.op_type != "Constant":
            continue
        known.update(node.output)
    if not folded:
        return True
    sizes = _sizes(proto)
    most = max(MOST_ELEMENTS, 4 * sum(math.prod(tensor.dims) for tensor in graph.initializer))
    total = 0
    for node in folded:
        for name in filter(None, node.output):
            if name not in sizes:
                return False
            if sizes[name] > most:
                raise LimitError(
                    f"node {printable(node.name or name)} ({printable(node.op_type)}) makes a constant of "
                    f"{sizes[name]:,} elements; the limit is {most:,}: export the model without it"
                )
            if node.op_type == "Range" and sizes[name] > MOST_NUMBERS:
                return False
            total += sizes[name]
    return bool(total <= 4 * most)


def _sizes(proto: onnx.ModelProto) -> dict[str, int]:
    """Elements of each value whose shape inference knows."""
    import onnx
    from onnx import shape_inference

    light = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.output.extend(proto.graph.output)
    graph.input.extend(proto.graph.input)
    fed = {value.name for value in graph.input}
    for tensor in proto.graph.initializer:
        if tensor.ByteSize() <= _LARGE:
            graph.initializer.append(tensor)
        elif tensor.name not in fed:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    # Without data propagation, which would itself compute what it is asked for: a Range, number by number.
    inferred = shape_inference.infer_shapes(light).graph
    found = {}
    for value in [*inferred.value_info, *inferred.output]:
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            if all(dim.HasField("dim_value") for dim in dims):
                found[value.name] = math.prod(dim.dim_value for dim in dims)
    return found


def _apart(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """onnxsim in a process of its own. Raises LimitError past its limits, RuntimeError where it fails otherwise."""
    import onnx

    data = proto.SerializeToString()
    command = [sys.executable, "-P", simplify_child.__file__, str(MEMORY + 8 * len(data)), str(SECONDS)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=4 * SECONDS)
    except subprocess.TimeoutExpired:
        raise LimitError(_too_long()) from None
    if done.returncode == 0:
        return onnx.ModelProto.FromString(done.stdout[1:]), bool(done.stdout[0])
    reason = printable(done.stderr.decode("utf-8", "replace").strip(), 400)
    if done.returncode == FAILED:
        raise RuntimeError(reason)
    if done.returncode == -getattr(signal, "SIGXCPU", 0):
        raise LimitError(_too_long())
    if done.returncode == TOO_LARGE:
        raise LimitError(
            f"what is constant in the model takes more than {MEMORY >> 30} GiB to compute; export it with constants "
            "folded"
        )
    if done.returncode == -getattr(signal, "SIGKILL", 0):
        raise LimitError(
            "computing what is constant in the model was killed, as systems do that run out of memory; free some, or "
            "export it with constants folded"
        )
    raise RuntimeError(f"it ended with exit code {done.returncode}: {reason}")


def _too_long() -> str:
    return f"what is constant in the model takes more than {SECONDS} s to compute; export it with constants folded"
