"""Fixing dynamic sizes, for targets that compile one shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

import onnx
from onnx import shape_inference

__all__ = ["fix_shapes", "recorded_inputs", "recorded_sizes"]


def fix_shapes(proto: onnx.ModelProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """The file with a batch of 1, and its other dynamic sizes as the calibration inputs were, where that is recorded.

    What stays dynamic is left for `lint` to name.
    """
    recorded, by_name = recorded_sizes(metadata), recorded_inputs(metadata)
    fixed: dict[str, int] = {}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = by_name.get(value.name, [1, *recorded])
        if len(sizes) != len(dims):
            sizes = [1]
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


def recorded_sizes(metadata: Mapping[str, str]) -> list[int]:
    """(C, H, W) of the calibration images as the file records them; empty where it does not say."""
    found = _record(metadata).get("input")
    return found if _are_sizes(found, 10_000) else []


def recorded_inputs(metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """What one run of the network took while it was calibrated on arrays, input name → shape; empty where the file
    does not say.
    """
    found = _record(metadata).get("inputs")
    if not isinstance(found, dict):
        return {}
    return {name: sizes for name, sizes in found.items() if _are_sizes(sizes, 1 << 24)}


def _record(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get("efrapq.calibration", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _are_sizes(found: object, limit: int) -> TypeGuard[list[int]]:
    """Whether it is a list of sizes: the file is somebody else's."""
    return isinstance(found, list) and all(type(d) is int and 0 < d < limit for d in found)
