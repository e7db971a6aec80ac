"""Run a float ONNX graph in torch, node by node, on CPU or GPU, differentiably in its float inputs.

Operators in the table (`ops.py`) are torch functions; any other runs through ONNX Runtime as a one-node model.
Float tensors lie on the executor's device, int64 tensors, which describe shapes, axes and indices, on the CPU.
The executor does not touch autograd: wrap calls in `torch.no_grad()` where no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.errors import LimitError, UnsupportedModelError
from efrapq.graph.ops import HOST_INPUTS, OPS, standard_domain, supports
from efrapq.graph.ops_call import Call, Op, as_tensor
from efrapq.graph.ops_fallback import OrtFallback, reads

__all__ = ["Executor", "reads", "supports"]

# Of one value in one run: 8 GiB of float32.
MOST_ELEMENTS = 1 << 31


@dataclass(frozen=True)
class _Plan:
    """The nodes to run in order, each with the names that no later node reads."""

    steps: tuple[tuple[ir.Node, tuple[str, ...]], ...]


class _Constants(Mapping[str, Tensor]):
    """Tensors by name. What the graph reads when it is asked for (`ir.LazyTensor`) is made here at that time, and
    kept until another such is asked for: the chunks of one node need it one after the other.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._made: dict[str, Callable[[], Tensor]] = {}
        self._latest: tuple[str, Tensor] | None = None

    def add(self, name: str, tensor: Tensor | Callable[[], Tensor]) -> None:
        if isinstance(tensor, Tensor):
            self._held[name] = tensor
        else:
            self._made[name] = tensor

    def __getitem__(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # before the next is made: only one is in memory
            self._latest = name, self._made[name]()
        return self._latest[1]

    def __contains__(self, name: object) -> bool:
        return name in self._held or name in self._made

    def __iter__(self) -> Iterator[str]:
        return chain(self._held, self._made)

    def __len__(self) -> int:
        return len(self._held) + len(self._made)


class Executor:
    """A graph ready to run. It reads the model as it is at construction: make a new one after changing it.

    constants: initializers and outputs of Constant nodes by value name; int64 tensors and bool scalars on the CPU,
    all others on the device; what the graph reads when it is asked for is read so here.
    fallback_nodes: the names of the nodes that run through ONNX Runtime, without gradient.
    """

    constants: Mapping[str, Tensor]
    fallback_nodes: tuple[str, ...]

    def __init__(
        self,
        model: ir.Model,
        *,
        device: torch.device | str = "cpu",
        instead: Mapping[tuple[str, str], Op] | None = None,
    ) -> None:
        """instead: operators by (domain, name) that are computed so, and not as the table has them.

        Raises UnsupportedModelError for constants of types that torch does not hold.
        """
        self._graph = model.graph
        self._device = torch.device(device)
        self._instead = instead or {}
        self._opsets = {standard_domain(name): version for name, version in model.opset_imports.items()}
        self._fallback = OrtFallback(model.opset_imports)
        self._plans: dict[tuple[frozenset[str], tuple[str, ...], bool], _Plan] = {}
        self._inputs = {value.name for value in model.graph.inputs}
        self._producers = {value.name: node for node in model.graph for value in node.outputs if value.name}
        self._element_types: dict[str, ir.DataType] = {}
        self._constants = self.constants = _Constants()
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                raise UnsupportedModelError(f"initializer {name!r} has no data")
            self._add_constant(name, value.const_value)
        for node in model.graph:
            if node.op_type == "Constant" and standard_domain(node.domain) == "":
                self._add_constant_node(node)
        self.fallback_nodes = tuple(_name(n) for n in model.graph if not supports(n.domain, n.op_type))

    def run(
        self,
        feeds: Mapping[str, Tensor],
        outputs: Sequence[str] | None = None,
        *,
        overrides: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The values asked for (by default the graph's outputs) by name, from the values fed.

        Only the nodes that the outputs need are run, and a tensor is dropped once no later node reads it. Any value
        may be fed in place of the node that produces it, and any value asked for. `overrides` replace constants.

        Raises ValueError for names that the graph does not have and for inputs that are missing, and
        UnsupportedModelError where a node cannot be run.
        """
        replaced = dict(overrides or {})
        if unknown := sorted(replaced.keys() - self.constants.keys()):
            raise ValueError(f"not constants of the graph: {', '.join(unknown)}")
        if unknown := sorted(feeds.keys() - self._inputs - self._producers.keys() - self.constants.keys()):
            raise ValueError(f"not values of the graph: {', '.join(unknown)}")
        if outputs is None:
            outputs = [value.name for value in self._graph.outputs if value.name]
        values = self._placed(replaced | dict(feeds))
        for _ in self._walk(values, frozenset(feeds), self._plan(frozenset(feeds), tuple(outputs))):
            pass
        return {name: values[name] if name in values else self.constants[name] for name in outputs}

    def visit(self, feeds: Mapping[str, Tensor], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The values of these names, one after the other as they are computed: none is kept for longer than the nodes
        that read it need. Raises as `run` does.
        """
        wanted = set(names)
        values = self._placed(feeds)
        yield from ((name, value) for name, value in values.items() if name in wanted)
        fed = frozenset(feeds)
        for node in self._walk(values, fed, self._plan(fed, tuple(names), keep=False)):
            for output in node.outputs:
                if output.name in wanted and output.name not in fed:
                    yield str(output.name), values[str(output.name)]

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._place(tensor) for name, tensor in tensors.items()}

    def _walk(self, values: dict[str, Tensor], fed: frozenset[str], plan: _Plan) -> Iterator[ir.Node]:
        """Run the plan's nodes on `values`, which grow by what is computed and lose what is not needed any more."""

        def value_of(value: ir.Value | None) -> Tensor | None:
            if value is None:
                return None
            name = value.name or ""
            return values[name] if name in values else self.constants[name]

        for node, finished in plan.steps:
            results = self.run_node(node, [value_of(value) for value in reads(node)])
            for value, result in zip(node.outputs, results, strict=False):
                if value.name and value.name not in fed:
                    values[value.name] = result
            yield node
            for name in finished:
                values.pop(name, None)

    def run_node(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The outputs of one node, of this graph or with its opsets. inputs: a value for each of `reads(node)`, which
        are its inputs (None: left out) and what its subgraphs read from outside.

        Raises UnsupportedModelError with the node's name and operator where the operator declines or fails, LimitError
        for a result past MOST_ELEMENTS. A full or failing GPU is none of the model's making: those errors of torch pass
        through.
        """
        try:
            results = self._results(node, inputs)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as exc:  # ONNX Runtime's errors have no narrower base
            raise UnsupportedModelError(f"node {_name(node)!r} ({_operator(node)}) cannot be run: {exc}") from exc
        if len(results) < (asked := _count_outputs(node)):
            raise UnsupportedModelError(
                f"node {_name(node)!r} ({_operator(node)}) has {asked} outputs; only {len(results)} are supported"
            )
        # Seen before anybody copies it: what Expand makes takes no memory yet.
        if (most := max((result.numel() for result in results), default=0)) > MOST_ELEMENTS:
            raise LimitError(
                f"node {_name(node)!r} ({_operator(node)}) makes {most:,} elements, over the limit of "
                f"{MOST_ELEMENTS:,}; use a smaller model or smaller inputs"
            )
        return results

    def _results(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        key = (standard_domain(node.domain), node.op_type)
        op = self._instead.get(key) or OPS.get(key)
        if op is None:
            return self._fallback.run(node, inputs)
        if self._device.type != "cpu":
            inputs = self._gathered(inputs, HOST_INPUTS.get(key, frozenset()))
        call = Call(
            attributes=node.attributes,
            opset=self._opsets.get(key[0], 1) if node.version is None else node.version,
            outputs=_count_outputs(node),
            device=self._device,
            input_types=tuple(self._element_type(value) for value in node.inputs),
        )
        result = op(call, *inputs)
        return (result,) if isinstance(result, Tensor) else result

    def _gathered(self, inputs: Sequence[Tensor | None], host: frozenset[int]) -> Sequence[Tensor | None]:
        """The inputs on the executor's device if any data input lies there; host inputs stay where they are."""
        data = [t for i, t in enumerate(inputs) if t is not None and i not in host]
        if not any(t.device.type == self._device.type for t in data):
            return inputs
        return [t if t is None or i in host else t.to(self._device) for i, t in enumerate(inputs)]

    def _plan(self, fed: frozenset[str], wanted: tuple[str, ...], *, keep: bool = True) -> _Plan:
        """keep: whether what is wanted stays to the end."""
        if (fed, wanted, keep) not in self._plans:
            self._plans[fed, wanted, keep] = self._make_plan(fed, wanted, keep)
        return self._plans[fed, wanted, keep]

    def _make_plan(self, fed: frozenset[str], wanted: tuple[str, ...], keep: bool) -> _Plan:
        known = fed | self.constants.keys()
        needed: set[ir.Node] = set()
        pending = list(wanted)
        while pending:
            name = pending.pop()
            if name in known:
                continue
            if name not in self._producers:
                problem = "is not fed" if name in self._inputs else "is not a value of the graph"
                raise ValueError(f"{name!r} {problem}")
            node = self._producers[name]
            if node not in needed:
                needed.add(node)
                pending.extend(value.name or "" for value in reads(node) if value is not None)
        steps: list[tuple[ir.Node, tuple[str, ...]]] = []
        read_later = set(wanted) if keep else set()
        for node in reversed([node for node in self._graph if node in needed]):
            touched = dict.fromkeys(v.name for v in (*reads(node), *node.outputs) if v is not None and v.name)
            steps.append((node, tuple(name for name in touched if name not in read_later)))
            read_later.update(touched)
        return _Plan(tuple(reversed(steps)))

    def _add_constant(self, name: str, constant: ir.TensorProtocol) -> None:
        def make() -> Tensor:
            try:
                return self._place(as_tensor(constant))
            except ValueError as exc:
                raise UnsupportedModelError(f"initializer {name!r}: {exc}") from exc

        self._constants.add(name, make if isinstance(constant, ir.LazyTensor) else make())
        self._element_types[name] = constant.dtype

    def _add_constant_node(self, node: ir.Node) -> None:
        name = node.outputs[0].name or ""
        self._constants.add(name, self._place(self.run_node(node, ())[0]))
        if "value" in node.attributes:
            self._element_types[name] = node.attributes["value"].as_tensor().dtype

    def _place(self, tensor: Tensor) -> Tensor:
        on_host = tensor.dtype == torch.int64 or (tensor.dtype == torch.bool and tensor.dim() == 0)
        return tensor if on_host else tensor.to(self._device)

    def _element_type(self, value: ir.Value | None) -> ir.DataType | None:
        if value is None:
            return None
        return self._element_types.get(value.name or "", value.dtype)


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if standard_domain(node.domain) else node.op_type


def _name(node: ir.Node) -> str:
    """The node's name, or its first output's where it has none."""
    return node.name or next((value.name for value in node.outputs if value.name), "")


def _count_outputs(node: ir.Node) -> int:
    """How many outputs are asked for, trailing unnamed ones left out."""
    return max((i + 1 for i, value in enumerate(node.outputs) if value.name), default=0)
