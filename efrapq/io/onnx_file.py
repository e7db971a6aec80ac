"""ONNX models from outside: parsed, proven consistent, and whole in memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from efrapq.errors import (
    AlreadyQuantizedError,
    BadWeightsError,
    CorruptFileError,
    LimitError,
    UnsupportedFileError,
    UnsupportedModelError,
)
from efrapq.io.external import External, FileTensor, data_as_inputs, in_own_file, take_external
from efrapq.io.limits import Limits
from efrapq.io.onnx_inline import Place, without_weights
from efrapq.io.onnx_tensor import check_length, check_stored, non_finite
from efrapq.io.onnx_walk import STANDARD_DOMAINS, Contents, check_functions, survey
from efrapq.io.sniff import Format
from efrapq.io.source import Source
from efrapq.io.text import listing, printable

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxFile", "is_quantized", "load_onnx", "refuse_quantized"]

_AGAIN = "export the model again"

# Every operator that takes or makes quantized values starts like one of these.
_QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantize",
    "QLinear",
    "QOrdered",
    "QAttention",
    "QEmbed",
    "QGemm",
    "QMoE",
    "ConvInteger",
    "ConvTransposeInteger",
    "MatMulInteger",
    "MatMulBnb4",
    "MatMulFpQ4",
    "MatMulNBits",
    "QuantizeBFP",
    "DequantizeBFP",
    "GatherBlockQuantized",
)

# Operators for which infinity is a meaningful constant: masks, bounds and padding.
_TAKES_INFINITY = frozenset({"Where", "Clip", "Max", "Min", "Pad", "Equal", "Less", "Greater"})


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model with nothing left outside it but what is in `outside`."""

    model: onnx.ModelProto
    external: dict[str, str]
    """Location → SHA-256 of the external data files."""
    external_bytes: int = 0
    """The size of these files."""
    outside: dict[str, FileTensor] = field(default_factory=dict)
    """Initializers of `model` whose data stay in their files, by name; see `efrapq.io.external`."""


def load_onnx(source: Source, *, limits: Limits | None = None, allow_domains: Collection[str] = ()) -> OnnxFile:
    """Return the ONNX model in `source`, with its external data read into it. If the model is too large for that, its
    large initializers stay in their files, be that one of external data or `source` itself.

    Operators of domains other than ONNX's and com.microsoft's are refused unless a function of the model or
    `allow_domains` covers them. The model may hold quantized operators; see `refuse_quantized`.

    Raises CorruptFileError for what is not a consistent model, UnsafeFileError for external data outside the model's
    directory, LimitError for a model too large or too deep, UnsupportedModelError for custom operators and models
    that compute nothing, BadWeightsError for NaN or infinity in weights, UnsupportedFileError for other files.
    """
    limits = limits or Limits()
    name = source.name
    if source.format is not Format.ONNX:
        raise UnsupportedFileError(f"{name}: a {source.format} file, not an ONNX model; give an .onnx file")
    model, places = _parse(source, limits)
    _check_outline(model, name)
    contents = survey(model, name, limits)
    _use_short_domain(model, contents)
    check_functions(contents, name, allow_domains, limits)
    _check_names(contents, name)
    _check_shapes(contents, name, limits)
    external = _check_tensors(contents, places, source, limits)
    if model.ByteSize() > limits.max_onnx_bytes:
        raise LimitError(f"{name}: over the limit of {limits.max_onnx_bytes:,} bytes; use a smaller model")
    _run_checker(data_as_inputs(model), name)
    _require_finite(contents, external.outside, name)
    return OnnxFile(model, external.files, external.size, external.outside)


def is_quantized(model: onnx.ModelProto) -> bool:
    """Return whether any node of `model`, in subgraphs and functions too, quantizes or computes on integers codes."""
    return _first_quantized(model) is not None


def refuse_quantized(model: onnx.ModelProto, name: str) -> None:
    """Raise AlreadyQuantizedError, naming a node, if `is_quantized(model)`; `name` is the file in the message."""
    place = _first_quantized(model)
    if place is not None:
        raise AlreadyQuantizedError(f"{name}: already quantized ({place}); give the float model it was made from")


def _first_quantized(model: onnx.ModelProto) -> str | None:
    contents = survey(model, "the model", Limits())
    for node, where in contents.nodes:
        if node.op_type.startswith(_QUANTIZED) and node.domain in STANDARD_DOMAINS:
            return where
    return None


def _parse(source: Source, limits: Limits) -> tuple[onnx.ModelProto, dict[int, Place]]:
    """The model, and the places in its file of the initializers that are not in it, by their position."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if len(source.data) > limits.max_onnx_bytes:
        raise LimitError(f"{source.name}: over the limit of {limits.max_onnx_bytes:,} bytes; use a smaller model")
    data, places = source.data, dict[int, Place]()
    if len(data) > limits.max_inline_bytes:
        data, places = without_weights(data, limits.min_outside_bytes)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise CorruptFileError(
            f"{source.name}: not a complete ONNX model (cut off, damaged, or nested too deep); "
            f"copy or download it again"
        ) from None
    # Fields that this version of ONNX does not know would be passed on, unchecked, to a runtime that may know them.
    model.DiscardUnknownFields()
    return model, places


def _check_outline(model: Any, name: str) -> None:
    if not model.HasField("graph") or not model.ir_version or not (model.opset_import or model.ir_version < 3):
        raise CorruptFileError(f"{name}: not a complete ONNX model (no graph, version or opset); {_AGAIN}")
    if not model.graph.node:
        raise UnsupportedModelError(f"{name}: the graph has no nodes, so there is nothing to quantize; {_AGAIN}")
    if not model.graph.output:
        raise UnsupportedModelError(f"{name}: the graph has no outputs; {_AGAIN}")


def _use_short_domain(model: Any, contents: Contents) -> None:
    """Call the standard's operators by one name: "ai.onnx" is another for "", which not every reader knows."""
    for imports in (model.opset_import, *(function.opset_import for function in model.functions)):
        known = any(entry.domain == "" for entry in imports)
        for entry in [entry for entry in imports if entry.domain == "ai.onnx"]:
            if known:
                imports.remove(entry)
            entry.domain = ""
    for node, _ in contents.nodes:
        if node.domain == "ai.onnx":
            node.domain = ""


def _check_names(contents: Contents, name: str) -> None:
    for graph, place in contents.graphs:
        names = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
        if "" in names:
            raise CorruptFileError(f"{name}: an initializer without a name in {place}; {_AGAIN}")
        twice = [key for key, count in Counter(names).items() if count > 1]
        if twice:
            raise CorruptFileError(f"{name}: initializers defined twice in {place}: {listing(twice)}; {_AGAIN}")


def _check_shapes(contents: Contents, name: str, limits: Limits) -> None:
    for graph, _ in contents.graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.WhichOneof("value") == "tensor_type":
                for dim in value.type.tensor_type.shape.dim:
                    if dim.dim_value == -1:  # an unknown size, as PaddlePaddle's exporter writes it
                        dim.ClearField("dim_value")
                dims = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
                _check_dims(dims, f"value '{printable(value.name)}'", name, limits)
    for sparse, where in contents.sparse:
        _check_dims(list(sparse.dims), where, name, limits)


def _check_dims(dims: list[int], where: str, name: str, limits: Limits) -> None:
    if any(d < 0 for d in dims):
        raise CorruptFileError(f"{name}: {where} has a negative dimension; name the dimension or give its size")
    if math.prod(d or 1 for d in dims) > limits.max_tensor_elements:
        raise LimitError(f"{name}: {where} has too many elements; use a smaller model")


def _check_tensors(contents: Contents, places: dict[int, Place], source: Source, limits: Limits) -> External:
    import onnx

    own_file = {id(contents.initializers[index]): place for index, place in places.items()}
    view, inside, outside = memoryview(source.data), {}, []
    for tensor, where in contents.tensors:
        if (place := own_file.get(id(tensor))) is not None:
            tensor.ClearField("external_data")
            check_length(tensor, place.length, where, source.name, limits)
            data = view[place.offset : place.offset + place.length]
            inside[tensor.name] = in_own_file(tensor, place.offset, data, where, source.path, source.name)
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            outside.append((tensor, where))
        else:
            # Left in place, these would come to life in a reader that looks at them first.
            tensor.ClearField("external_data")
            check_stored(tensor, where, source.name, limits)
    own = {id(tensor) for tensor in contents.initializers}
    in_memory = len(source.data) - sum(place.length for place in places.values())
    external = take_external(outside, lambda t: id(t) in own, source.path, in_memory, source.name, limits)
    for tensor, where in outside:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            check_stored(tensor, where, source.name, limits)
    return replace(external, outside=inside | external.outside)


def _run_checker(model: onnx.ModelProto, name: str) -> None:
    import onnx.checker

    try:
        # Operators of com.microsoft have no schema here; the checker passes them if the model imports the domain.
        onnx.checker.check_model(model, full_check=False)
    except (onnx.checker.ValidationError, ValueError, RuntimeError, UnicodeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CorruptFileError(f"{name}: not a valid ONNX model ({printable(lines[0])}); {_AGAIN}") from None


def _require_finite(contents: Contents, outside: dict[str, FileTensor], name: str) -> None:
    import onnx

    users: dict[str, set[str]] = {}
    for node, _ in contents.nodes:
        for value in node.input:
            users.setdefault(value, set()).add(node.op_type)
    bad = []
    for key, tensor in _constants(contents):
        data = outside[key].read() if tensor.data_location == onnx.TensorProto.EXTERNAL else None
        worst = non_finite(tensor, data)
        if worst == "NaN" or (worst and not users.get(key, set()) <= _TAKES_INFINITY):
            bad.append(key)
    if bad:
        raise BadWeightsError(f"{name}: NaN or infinity in {listing(bad)}; get weights from before the training broke")


def _constants(contents: Contents) -> Iterator[tuple[str, Any]]:
    """Yield the name of the value and the tensor of every initializer and Constant node."""
    for graph, _ in contents.graphs:
        for tensor in graph.initializer:
            yield tensor.name, tensor
        for sparse in graph.sparse_initializer:
            yield sparse.values.name, sparse.values
    for node, _ in contents.nodes:
        if node.op_type == "Constant" and node.output:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield node.output[0], attribute.t
