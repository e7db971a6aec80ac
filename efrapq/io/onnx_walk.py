"""Every node and every tensor of an ONNX model, wherever it hides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from efrapq.errors import CorruptFileError, LimitError, UnsupportedModelError
from efrapq.io.limits import Limits
from efrapq.io.text import listing, printable

if TYPE_CHECKING:
    import onnx

__all__ = ["Contents", "FunctionKey", "check_functions", "survey"]

# Of ONNX Runtime's rewritten graphs: their weights are in blocks for one kind of CPU.
NCHWC = "com.microsoft.nchwc"
STANDARD_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""Operators that ONNX Runtime has without any other library."""


class FunctionKey(NamedTuple):
    """What a node names to call a function of the model."""

    domain: str
    name: str
    overload: str


@dataclass
class Contents:
    """What `survey` found. Each thing comes with the place it was found at, in words fit to be shown."""

    nodes: list[tuple[onnx.NodeProto, str]] = field(default_factory=list)
    tensors: list[tuple[onnx.TensorProto, str]] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    """Those of `tensors` that are initializers of the model's own graph, the same objects."""
    sparse: list[tuple[onnx.SparseTensorProto, str]] = field(default_factory=list)
    graphs: list[tuple[onnx.GraphProto, str]] = field(default_factory=list)
    calls: dict[FunctionKey | None, list[tuple[FunctionKey, int]]] = field(default_factory=dict)
    """What each node of a function (None: of the model) calls, and how deep in subgraphs the node is."""


class _Step(NamedTuple):
    graph: Any
    place: str
    depth: int
    owner: FunctionKey | None
    outermost: bool = False


def survey(model: onnx.ModelProto, name: str, limits: Limits) -> Contents:
    """Collect the nodes, tensors and graphs of `model`: subgraphs, attributes, functions and training graphs.

    Raises LimitError for too many nodes or subgraphs nested too deep, CorruptFileError for two functions of one name.
    """
    found = Contents()
    pending = [_Step(model.graph, "the graph", 1, None, outermost=True)]
    for info in model.training_info:
        pending += [
            _Step(info.initialization, "training info", 1, None),
            _Step(info.algorithm, "training info", 1, None),
        ]
    found.calls[None] = []
    for function in model.functions:
        key = function_key(function)
        if key in found.calls:
            raise CorruptFileError(f"{name}: function {listing([key.name])} is defined twice; export the model again")
        found.calls[key] = []
        pending.append(_Step(function, f"function '{printable(key.name)}'", 1, key))
    while pending:
        step = pending.pop()
        if step.depth > limits.max_nesting:
            raise LimitError(
                f"{name}: graphs nested deeper than {limits.max_nesting} in {step.place}; simplify the model"
            )
        pending += _visit(step, found)
        if len(found.nodes) > limits.max_nodes:
            raise LimitError(f"{name}: more than {limits.max_nodes:,} nodes; simplify the model")
    return found


def function_key(function: Any) -> FunctionKey:
    """Return how nodes refer to a FunctionProto, or what function a NodeProto refers to."""
    op = function.op_type if hasattr(function, "op_type") else function.name
    return FunctionKey("" if function.domain == "ai.onnx" else function.domain, op, function.overload)


def _visit(step: _Step, found: Contents) -> list[_Step]:
    """Record what lies directly in a graph or function; return the graphs below it."""
    body, place = step.graph, step.place
    inner: list[_Step] = []
    if hasattr(body, "initializer"):
        found.graphs.append((body, place))
        for tensor in body.initializer:
            found.tensors.append((tensor, f"initializer '{printable(tensor.name)}'"))
            if step.outermost:
                found.initializers.append(tensor)
        for sparse in body.sparse_initializer:
            _add_sparse(sparse, f"sparse initializer '{printable(sparse.values.name)}'", found)
    else:
        for default in body.attribute_proto:
            inner += _visit_attribute(default, f"default '{printable(default.name)}' of {place}", step, found)
    for node in body.node:
        where = f"node '{printable(node.name)}' ({printable(node.op_type)}) in {place}"
        found.nodes.append((node, where))
        found.calls[step.owner].append((function_key(node), step.depth))
        for attribute in node.attribute:
            inner += _visit_attribute(attribute, where, step, found)
    return inner


def _visit_attribute(attribute: Any, where: str, step: _Step, found: Contents) -> Iterable[_Step]:
    # An attribute says in `type` which field counts, but nothing keeps a file from filling the others too.
    tensors = [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
    found.tensors += [(tensor, where) for tensor in tensors]
    sparse = [*attribute.sparse_tensors, *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])]
    for tensor in sparse:
        _add_sparse(tensor, where, found)
    graphs = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
    # The whole chain of places would be long and no clearer than its last link.
    place = f"a subgraph of node {where.removeprefix('node ').partition(' in ')[0]}"
    return [_Step(graph, place, step.depth + 1, step.owner) for graph in graphs]


def _add_sparse(sparse: Any, where: str, found: Contents) -> None:
    found.sparse.append((sparse, where))
    found.tensors += [(sparse.values, where), (sparse.indices, where)]


def check_functions(contents: Contents, name: str, allow_domains: Iterable[str], limits: Limits) -> None:
    """Check what the nodes call: known operators and functions of the model that end.

    Raises UnsupportedModelError for operators of other domains and for functions that redefine a standard
    operator, CorruptFileError for functions that call themselves, LimitError if they call each other too
    deep or expand to too many nodes.
    """
    functions = {key for key in contents.calls if key is not None}
    known = STANDARD_DOMAINS | set(allow_domains)
    custom = {
        f"{node.domain}::{node.op_type}"
        for node, _ in contents.nodes
        if node.domain not in known and function_key(node) not in functions
    }
    if any(operator.startswith(NCHWC) for operator in custom):
        raise UnsupportedModelError(
            f"{name}: was saved by ONNX Runtime after optimizations for one kind of CPU (operators of "
            "com.microsoft.nchwc); give the model that it was made from"
        )
    if custom:
        raise UnsupportedModelError(
            f"{name}: operators that need a custom library: {listing(sorted(custom))}; "
            f"export with standard ONNX operators"
        )
    # Readers differ in whether the function or the operator wins.
    shadowing = [key.name for key in functions if key.domain in STANDARD_DOMAINS]
    if shadowing:
        raise UnsupportedModelError(
            f"{name}: functions that redefine standard operators: {listing(sorted(shadowing))}; inline them"
        )
    extents: dict[FunctionKey, _Extent] = {}
    for key in (None, *sorted(functions)):
        extent = _expanded(key, contents.calls, extents, (), name, limits)
        if extent.nodes > limits.max_nodes:
            raise LimitError(
                f"{name}: {extent.nodes:,} nodes once its functions are expanded; the limit is {limits.max_nodes:,}"
            )
        if extent.depth > limits.max_nesting:
            raise LimitError(_too_deep(name, limits))


class _Extent(NamedTuple):
    nodes: int
    depth: int


def _too_deep(name: str, limits: Limits) -> str:
    return f"{name}: functions and subgraphs nested deeper than {limits.max_nesting}; inline the functions"


def _expanded(
    key: FunctionKey | None,
    calls: dict[FunctionKey | None, list[tuple[FunctionKey, int]]],
    extents: dict[FunctionKey, _Extent],
    chain: tuple[FunctionKey, ...],
    name: str,
    limits: Limits,
) -> _Extent:
    """Return the size of a function (None: of the model) with the functions it calls put in place of the calls."""
    if key is not None:
        if key in chain:
            raise CorruptFileError(f"{name}: functions that call themselves: {listing(k.name for k in chain)}")
        if key in extents:
            return extents[key]
        chain = (*chain, key)
        if len(chain) > limits.max_nesting:
            raise LimitError(_too_deep(name, limits))
    nodes, deepest = 0, 1
    for called, depth in calls[key]:
        inner = _Extent(1, 0) if called not in calls else _expanded(called, calls, extents, chain, name, limits)
        nodes += inner.nodes
        deepest = max(deepest, depth + inner.depth)
    extent = _Extent(nodes, deepest)
    if key is not None:
        extents[key] = extent
    return extent
