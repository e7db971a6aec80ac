"""inspect(): what a model file holds, float or quantized, before anything is done to it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from efrapq.errors import UnsupportedModelError
from efrapq.io import is_quantized
from efrapq.loading import FloatModel, load

__all__ = ["INSPECT_SCHEMA", "inspect"]

INSPECT_SCHEMA = "efrapq.inspect/1"
MAX_PROTOBUF_BYTES = (1 << 31) - 1


def inspect(
    model: str | Path,
    *,
    arch: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Describe a file: schema efrapq.inspect/1. Raises InputError if it cannot be read."""
    from efrapq.verification.cost import weight_bytes

    source = load(model, arch=arch, input_shape=input_shape, trust_pickle=trust_pickle)
    quantized = is_quantized(source.proto)
    found: dict[str, Any] = {
        "schema": INSPECT_SCHEMA,
        "path": str(model),
        "sha256": source.sha256,
        "bytes": source.size,
        "format": source.format,
        "kind": "quantized" if quantized else "float",
        "architecture": source.architecture,
        "opset": next((o.version for o in source.proto.opset_import if o.domain in ("", "ai.onnx")), None),
        "metadata": {p.key: p.value for p in source.proto.metadata_props},
        "kernels": None,
        "weight_bytes": weight_bytes(source.proto),
        "activation_peak_bytes": None,
        "notes": list(source.notes),
    }
    if quantized:
        found.update(_quantized(source, found["notes"]))
    else:
        found.update(_float(source))
    found.update(_kernels(source, found["notes"], input_shape))
    found["parameters"] = sum(int(np.prod(layer["shape"])) for layer in found["layers"])
    return found


def _quantized(source: FloatModel, notes: list[str]) -> dict[str, Any]:
    """What a quantized file holds. Other tools write forms that do not read back as codes: that is worth a note, and
    the rest is still told.
    """
    from efrapq.exporters import read_quantized
    from efrapq.exporters.saturation import advice, saturating_layers
    from efrapq.graph.amplified import amplified_words, amplifying_layers

    found: dict[str, Any] = {"layers": [], "float": [], "codes_sha256": None, "saturation": None, "amplified": None}
    try:
        model = read_quantized(source.proto, source.outside)
    except UnsupportedModelError as exc:
        notes.append(f"layers are not read back: {exc}")
    else:
        found["codes_sha256"] = model.digest
        found["layers"] = [
            {
                "name": layer.name,
                "op_type": layer.op_type,
                "shape": list(model.weights[layer.name].shape),
                "bits": model.weights[layer.name].bits,
                "integer": layer.integer and layer.input in model.activations,
            }
            for layer in model.layers
        ]
        saturating = saturating_layers(model, as_stored=True)
        found["saturation"] = [asdict(s) for s in saturating]
        if saturating:
            notes.append(advice(saturating, len(model.layers)))
        amplifying = amplifying_layers(model)
        found["amplified"] = [asdict(layer) for layer in amplifying]
        if amplifying:
            notes.append(amplified_words(amplifying))
    return found


def _kernels(source: FloatModel, notes: list[str], input_shape: tuple[int, int, int] | None) -> dict[str, Any]:
    """What ONNX Runtime makes of the file; a note where it does not load it."""
    from efrapq.exporters.shapes import recorded_inputs, recorded_sizes
    from efrapq.verification.advice import loading_advice
    from efrapq.verification.cost import activation_peak
    from efrapq.verification.kernels import report_kernels
    from efrapq.verification.session import open_model
    from efrapq.verification.shapes import graph_shapes

    proto = source.proto
    if proto.ByteSize() >= MAX_PROTOBUF_BYTES:
        notes.append("kernels are not known: the model is too large to hand to ONNX Runtime in one piece (2 GiB)")
        return {}
    try:
        optimized = open_model(proto, source.outside).optimized
    except UnsupportedModelError as exc:
        notes.append(f"kernels are not known: {exc}. {loading_advice(proto, str(exc))}")
        return {}
    metadata = {p.key: p.value for p in proto.metadata_props}
    first = next((v.name for v in proto.graph.input), "")
    sizes = {first: [1, *(input_shape or recorded_sizes(metadata))]} | recorded_inputs(metadata)
    shapes = graph_shapes(proto, optimized, sizes)
    return {
        "kernels": asdict(report_kernels(optimized, shapes)),
        "activation_peak_bytes": activation_peak(optimized, shapes),
    }


def _float(source: FloatModel) -> dict[str, Any]:
    from efrapq.graph.layers import find_layers, weight_array
    from efrapq.graph.prepare import prepare

    graph = prepare(source.proto, source.outside).graph
    layers, skipped = find_layers(graph)
    rows = []
    weights = hashlib.sha256()
    for layer in layers:
        array = weight_array(graph, layer)
        weights.update(array.tobytes())
        rows.append(
            {
                "name": layer.name,
                "op_type": layer.op_type,
                "shape": list(array.shape),
                "bits": 32,
                "integer": layer.integer,
            }
        )
    left = [{"node": s.node_name, "op_type": s.op_type, "reason": s.reason} for s in skipped]
    return {"layers": rows, "float": left, "folded_weights_sha256": weights.hexdigest()}
