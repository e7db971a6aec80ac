"""Fixing dynamic sizes, for targets that compile one shape."""

from __future__ import annotations

import json

import onnx
from onnx import shape_inference

__all__ = ["fix_shapes", "recorded_sizes"]


def fix_shapes(proto: onnx.ModelProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """The file with a batch of 1, and its other dynamic sizes as the calibration inputs were, where that is recorded.

    What stays dynamic is left for `lint` to name.
    """
    recorded = recorded_sizes(metadata)
    fixed: dict[str, int] = {}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = [1, *recorded] if len(recorded) == len(dims) - 1 else [1]
        for dim, size in zip(dims, sizes, strict=False):
            if dim.dim_value < 1:
                fixed.setdefault(dim.dim_param, size)
                dim.dim_value = size
    fixed.pop("", None)
    for value in [*proto.graph.output, *proto.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in fixed:
                dim.dim_value = fixed[dim.dim_param]
    inferred: onnx.ModelProto = shape_inference.infer_shapes(proto)
    return inferred


def recorded_sizes(metadata: dict[str, str]) -> list[int]:
    """(C, H, W) of the calibration inputs as the file records them; empty where it does not say."""
    try:
        found = json.loads(metadata.get("efrapq.calibration", "{}")).get("input")
    except (ValueError, AttributeError, RecursionError):
        return []
    return found if isinstance(found, list) and all(isinstance(d, int) and 0 < d < 10_000 for d in found) else []
