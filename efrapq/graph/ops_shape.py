"""Shapes, indexing, layout and constants.

Inputs that describe shapes, axes, positions or repetitions are int64 tensors on the CPU; their numbers are read,
and what they describe is done to the data where it lies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from efrapq.graph.ops_call import Call, Op, as_tensor, ints, normalized

__all__ = ["SHAPE_OPS"]


# --- shapes -----------------------------------------------------------------------------------------------


def _shape(call: Call, x: Tensor) -> Tensor:
    start, end = call.integer("start", 0), call.integer("end", x.dim())
    return torch.tensor(tuple(x.shape)[start:end], dtype=torch.int64)


def _size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    sizes = list(ints(shape))
    if not call.flag("allowzero"):  # 0 stands for "as in the input"
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    if -1 in sizes and x.numel() == 0:  # torch cannot tell what -1 is when another size is 0
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = 0 if known else math.prod(x.shape) // max(known, 1)
    return x.reshape(sizes)


def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.integer("axis", 1)
    axis = axis if axis == x.dim() else normalized(axis, x.dim())
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = call.axes(given, input_since=13)
    if axes is None:
        return x.squeeze()
    if any(x.shape[axis] != 1 for axis in axes):
        raise ValueError(f"axes {axes} of shape {tuple(x.shape)} are not all of size 1")
    return x.squeeze(axes)


def _unsqueeze(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = call.axes(given, input_since=13)
    if axes is None:
        raise ValueError("no axes are given")
    rank = x.dim() + len(axes)
    for axis in sorted(normalized(axis, rank) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.integers("perm") or tuple(reversed(range(x.dim()))))


def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    # Broadcasting goes both ways: a size of 1 in the shape keeps the input's.
    return x.expand(torch.broadcast_shapes(x.shape, ints(shape)))  # type: ignore[no-untyped-call]


def _tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(ints(repeats))


def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    block = call.required("blocksize").as_int()
    n, c, h, w = x.shape
    if call.text("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    block = call.required("blocksize").as_int()
    n, c, h, w = x.shape
    if call.text("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, block)
    x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block**2, h // block, w // block)


# --- joining and taking apart -----------------------------------------------------------------------------


def _concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, call.required("axis").as_int())


def _split(call: Call, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = normalized(call.integer("axis", 0), x.dim())
    sizes = call.integers("split") if call.opset < 13 else None if given is None else ints(given)
    if sizes is None:
        # Parts of equal size; only the last may be smaller (opset 18).
        parts = call.integer("num_outputs", call.outputs)
        part, total = math.ceil(x.shape[axis] / parts), x.shape[axis]
        sizes = tuple(max(min(part, total - i * part), 0) for i in range(parts))
    return torch.split_with_sizes(x, sizes, axis)


def _slice(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Attributes before opset 10, inputs since. Positions past either end are clamped, as in NumPy."""
    first: tuple[int, ...]
    last: tuple[int, ...]
    if call.opset < 10:
        first, last = tuple(call.required("starts").as_ints()), tuple(call.required("ends").as_ints())
        along = call.integers("axes")
    elif starts is None or ends is None:
        raise ValueError("starts or ends are missing")
    else:
        first, last, along = ints(starts), ints(ends), None if axes is None else ints(axes)
    stride = (1,) * len(first) if steps is None else ints(steps)
    for axis, start, end, step in zip(along or range(len(first)), first, last, stride, strict=True):
        axis = normalized(axis, x.dim())
        positions = _sliced_positions(start, end, step, x.shape[axis])
        if step > 0:  # a view
            stop = max(positions.start, positions.stop)
            x = x[(slice(None),) * axis + (slice(positions.start, stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(positions, dtype=torch.int64, device=x.device))
    return x


def _sliced_positions(start: int, end: int, step: int, size: int) -> range:
    lowest, highest = (0, size) if step > 0 else (-1, size - 1)
    start, end = (position + size if position < 0 else position for position in (start, end))
    return range(min(max(start, 0), highest), min(max(end, lowest), highest), step)


def _gather(call: Call, data: Tensor, indices: Tensor) -> Tensor:
    axis = normalized(call.integer("axis", 0), data.dim())
    flat = indices.reshape(-1).long()
    taken = data.index_select(axis, torch.where(flat < 0, flat + data.shape[axis], flat))
    return taken.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


def _gather_elements(call: Call, data: Tensor, indices: Tensor) -> Tensor:
    axis = normalized(call.integer("axis", 0), data.dim())
    indices = indices.long()
    return data.gather(axis, torch.where(indices < 0, indices + data.shape[axis], indices))


def _where(call: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


# --- padding ----------------------------------------------------------------------------------------------


def _pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Attributes before opset 11, inputs since. Negative amounts crop."""
    rank = x.dim()
    amounts = call.required("pads").as_ints() if call.opset < 11 else () if pads is None else ints(pads)
    along = range(rank) if axes is None else [normalized(axis, rank) for axis in ints(axes)]
    begin, end = [0] * rank, [0] * rank
    for axis, b, e in zip(along, amounts[: len(along)], amounts[len(along) :], strict=True):
        begin[axis], end[axis] = b, e

    mode = call.text("mode", "constant")
    if mode == "constant":
        fill = call.real("value", 0.0) if call.opset < 11 else 0 if value is None else value.item()
        pairs = itertools.chain.from_iterable(zip(reversed(begin), reversed(end), strict=True))
        return F.pad(x, list(pairs), value=fill)
    if mode not in _PADDED_POSITION:
        raise ValueError(f"padding mode {mode!r} is not supported")
    for axis in (axis for axis in range(rank) if begin[axis] or end[axis]):
        size = x.shape[axis]
        positions = [_PADDED_POSITION[mode](i, size) for i in range(-begin[axis], size + end[axis])]
        x = x.index_select(axis, torch.tensor(positions, dtype=torch.int64, device=x.device))
    return x


def _reflected(position: int, size: int) -> int:
    if size == 1:
        return 0
    period = 2 * (size - 1)
    return min(position % period, period - position % period)


# Padding mode → which of `size` elements stands at a position that may lie outside of them.
_PADDED_POSITION: dict[str, Callable[[int, int], int]] = {
    "edge": lambda position, size: min(max(position, 0), size - 1),
    "reflect": _reflected,
    "wrap": lambda position, size: position % size,
}


# --- constants and what passes through --------------------------------------------------------------------


def _constant(call: Call) -> Tensor:
    ((name, attribute),) = call.attributes.items()
    if name == "value":
        return as_tensor(attribute.as_tensor())
    if name in ("value_int", "value_ints"):
        return torch.tensor(attribute.value, dtype=torch.int64)
    if name in ("value_float", "value_floats"):
        return torch.tensor(attribute.value, dtype=torch.float32)
    raise ValueError(f"constants given by {name} are not supported")


def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    fill = as_tensor(call.required("value").as_tensor()) if "value" in call.attributes else torch.zeros(1)
    fill = fill.to(torch.device("cpu") if fill.dtype == torch.int64 else call.device)
    return fill.reshape(()).repeat(ints(shape))


def _range(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = start.item(), limit.item(), delta.item()
    count = max(math.ceil((last - first) / step), 0)
    # start + i · delta, as the specification defines each element
    steps = torch.arange(count, device=start.device)
    return start + steps.to(start.dtype) * delta


def _identity(call: Call, x: Tensor) -> Tensor:
    return x


def _dropout(call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> tuple[Tensor, ...]:
    if training is not None and bool(training) and (ratio is None or ratio.item() != 0):
        raise ValueError("it is in training mode; export the model in evaluation mode")
    if call.outputs == 1:
        return (x,)
    return x, torch.ones_like(x, dtype=torch.bool)


SHAPE_OPS: dict[str, Op] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Identity": _identity,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
