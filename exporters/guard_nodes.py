"""The nodes behind a guard's output: the largest and the smallest code of each sample, held against the grids' ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.exporters.guard import Watched

__all__ = ["Emitter", "guard_nodes"]

# From this opset on reductions take their axes as an input.
AXES_ARE_INPUTS = 18


class Emitter(Protocol):
    """What writes nodes and initializers into a graph, under names that are free."""

    opset: int

    def constant(self, name: str, data: NDArray[np.int32] | NDArray[np.int64]) -> ir.Value: ...

    def emit(
        self, op: str, inputs: list[ir.Value], wanted: str, dtype: ir.DataType, **attributes: int | list[int]
    ) -> ir.Value: ...


def guard_nodes(
    emitter: Emitter, output: str, found: Sequence[tuple[ir.Value, Watched]], lowest: int, highest: int
) -> ir.Value:
    """(N,) int64: at how many ends of their grids each sample has codes. found: codes, (N, …), and what is watched of
    them. lowest, highest: the codes at the ends.
    """
    highs = [(codes, watched.rank) for codes, watched in found if watched.high]
    lows = [(codes, watched.rank) for codes, watched in found if watched.low]
    nodes = _Nodes(emitter)
    reached = [nodes.reached("ReduceMax", highest, highs)] if highs else []
    reached += [nodes.reached("ReduceMin", lowest, lows)] if lows else []
    both = nodes.joined(reached, "efrapq.reached", ir.DataType.INT64)
    along = emitter.constant("efrapq.axes_1", np.array([1], np.int64))
    return emitter.emit("ReduceSum", [both, along], output, ir.DataType.INT64, keepdims=0)


class _Nodes:
    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter
        # By the number of axes, those behind the first.
        self.axes: dict[int, ir.Value] = {}

    def reached(self, reduce: str, level: int, found: Sequence[tuple[ir.Value, int]]) -> ir.Value:
        """(N, values) int64: 1 where a value of a sample has the code `level` somewhere. found: codes and ranks."""
        word, dtype = f"efrapq.{reduce.lower()}", _type(found[0][0])
        parts = []
        for rank in sorted({rank for _, rank in found}):
            ends = [self._extreme(reduce, codes, rank) for codes, at in found if at == rank]
            joined = self.joined(ends, f"{word}_{rank}", dtype)
            parts.append(self.emitter.emit("Flatten", [joined], f"{word}_{rank}_flat", dtype, axis=1))
        extremes = self.joined(parts, word, dtype)
        # In int32, which any runtime compares.
        wide = self.emitter.emit("Cast", [extremes], f"{word}_int32", ir.DataType.INT32, to=int(ir.DataType.INT32))
        end = self.emitter.constant(f"{word}_end", np.array(level, np.int32))
        equal = self.emitter.emit("Equal", [wide, end], f"{word}_reached", ir.DataType.BOOL)
        return self.emitter.emit("Cast", [equal], f"{word}_count", ir.DataType.INT64, to=int(ir.DataType.INT64))

    def joined(self, parts: list[ir.Value], name: str, dtype: ir.DataType) -> ir.Value:
        """Along the second axis."""
        return parts[0] if len(parts) == 1 else self.emitter.emit("Concat", parts, name, dtype, axis=1)

    def _extreme(self, reduce: str, codes: ir.Value, rank: int) -> ir.Value:
        """(N, 1, …): the largest or the smallest code of each sample."""
        name, axes = f"{codes.name}.{reduce.removeprefix('Reduce').lower()}", list(range(1, rank))
        if self.emitter.opset < AXES_ARE_INPUTS:
            return self.emitter.emit(reduce, [codes], name, _type(codes), axes=axes, keepdims=1)
        if rank not in self.axes:
            self.axes[rank] = self.emitter.constant(f"efrapq.axes_of_{rank}", np.array(axes, np.int64))
        return self.emitter.emit(reduce, [codes, self.axes[rank]], name, _type(codes), keepdims=1)


def _type(codes: ir.Value) -> ir.DataType:
    assert codes.dtype is not None
    return codes.dtype
