"""The factors of equalized channels: how a file records them, and how its float reference gets them again.

A factor is a power of two in steps of an eighth: 2^(k/8), k an int8. The record is the file's own, so that whoever
verifies it holds its codes against the same float weights that they were solved from.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.errors import CorruptFileError
from efrapq.graph.layers import find_layers
from efrapq.graph.spans import find_spans, scale_span

__all__ = ["EQUALIZED_KEY", "STEPS", "Exponents", "combined", "equalize", "exponents_from_json", "exponents_to_json"]

EQUALIZED_KEY = "efrapq.equalized"
# Of one octave.
STEPS = 8
# 2^(k/8): written out, so that no library's last bit decides about a code.
OCTAVE = np.array(
    [
        1.0,
        1.0905077326652577,
        1.189207115002721,
        1.2968395546510096,
        1.4142135623730951,
        1.5422108254079407,
        1.681792830507429,
        1.8340080864093424,
    ]
)

# Name of a span → k of each of its channels, int8.
Exponents = Mapping[str, NDArray[np.int8]]


def equalize(model: ir.Model, exponents: Exponents) -> None:
    """Scale the channels of a prepared model, in place. Raises CorruptFileError for spans that it does not have."""
    found, _ = find_layers(model.graph)
    layers = {layer.name: layer for layer in found}
    spans = {span.name: span for span in find_spans(model.graph, found)}
    if any(name not in spans or k.shape != (spans[name].channels,) for name, k in exponents.items()):
        raise CorruptFileError("the record of equalized channels is not of this float model")
    for name, span in spans.items():
        if name in exponents:
            scale_span(model.graph, layers, span, _factors(exponents[name]))


def combined(one: Exponents, other: Exponents) -> Exponents:
    """The exponents of both, one after another."""
    names = dict.fromkeys([*one, *other])
    sums = {n: sum((e[n].astype(np.int32) for e in (one, other) if n in e), np.zeros(1, np.int32)) for n in names}
    return {name: np.clip(k, -128, 127).astype(np.int8) for name, k in sums.items()}


def _factors(exponents: NDArray[np.int8]) -> NDArray[np.float32]:
    whole, part = np.divmod(exponents.astype(np.int32), STEPS)
    factors: NDArray[np.float64] = np.ldexp(OCTAVE[part], whole)
    return factors.astype(np.float32)


def exponents_to_json(exponents: Exponents) -> str:
    """For the file's metadata."""
    held = {name: base64.b64encode(k.astype(np.int8).tobytes()).decode() for name, k in exponents.items()}
    return json.dumps(held, sort_keys=True)


def exponents_from_json(text: str) -> Exponents:
    """Raises CorruptFileError for text that `exponents_to_json` did not write."""
    try:
        held = json.loads(text)
        return {str(n): np.frombuffer(base64.b64decode(k, validate=True), np.int8) for n, k in held.items()}
    except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error) as exc:
        raise CorruptFileError("the record of equalized channels cannot be read; write the file again") from exc
