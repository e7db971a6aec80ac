"""What ONNX lets a file say in several ways, said in the one that the tools after this understand.

Functions of the model are put in place of their calls. Initializers are constants: before IR version 4 each was listed
as an input too, and later that made it a default, which a weight no longer is once it is codes. Sparse ones are dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from efrapq.errors import UnsupportedModelError
from efrapq.io.text import printable

if TYPE_CHECKING:
    import onnx

__all__ = ["all_graphs", "plain_dialect"]

# The first IR version in which an initializer need not be an input.
FIRST_WITH_CONSTANTS = 4


def plain_dialect(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in plain words; the proto is not modified. Raises UnsupportedModelError for functions that cannot be
    put in place."""
    import onnx

    if not _is_plain(proto):
        proto = _inlined(proto) if proto.functions else onnx.ModelProto.FromString(proto.SerializeToString())
        for graph in all_graphs(proto.graph):
            _make_dense(graph)
        constants = {tensor.name for tensor in proto.graph.initializer}
        kept = [value for value in proto.graph.input if value.name not in constants]
        del proto.graph.input[:]
        proto.graph.input.extend(kept)
        proto.ir_version = max(proto.ir_version, FIRST_WITH_CONSTANTS)
    return proto


def _is_plain(proto: onnx.ModelProto) -> bool:
    constants = {tensor.name for tensor in proto.graph.initializer}
    return (
        proto.ir_version >= FIRST_WITH_CONSTANTS
        and not proto.functions
        and not any(value.name in constants for value in proto.graph.input)
        and not any(graph.sparse_initializer for graph in all_graphs(proto.graph))
    )


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all below it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from all_graphs(inner)


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnx import inliner

    try:
        inlined: onnx.ModelProto = inliner.inline_local_functions(proto, convert_version=True)
    except (RuntimeError, ValueError) as exc:
        reason = printable((str(exc).strip().splitlines() or [type(exc).__name__])[0])
        raise UnsupportedModelError(
            f"the model's functions could not be put in place of their calls ({reason}); export it without functions"
        ) from exc
    return inlined


def _make_dense(graph: onnx.GraphProto) -> None:
    from onnx import numpy_helper

    for sparse in graph.sparse_initializer:
        values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        shape = tuple(sparse.dims)
        if places.ndim == 2:  # one row of coordinates a value
            places = np.ravel_multi_index(tuple(places.T), shape)
        dense = np.zeros(prod(shape), values.dtype)
        dense[places] = values
        graph.initializer.append(numpy_helper.from_array(dense.reshape(shape), sparse.values.name))
    del graph.sparse_initializer[:]
