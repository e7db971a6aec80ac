"""A defended file written again for other targets: the same codes, in the form that each wants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efrapq.calibration.signature import model_inputs, takes_images
from efrapq.errors import UnsupportedModelError
from efrapq.io import check_output, load_onnx, read_source, write_all
from efrapq.io.npz import MAX_ARRAY_BYTES
from efrapq.writing import beside, data_path, write_checked

if TYPE_CHECKING:
    import onnx

__all__ = ["Exported", "export", "export_all", "exported_name"]


@dataclass(frozen=True)
class Exported:
    """What export() wrote: one file with the same codes as the one it came from. data: as `defend` gives
    them. notes: what its user should know.
    """

    data: bytes
    path: Path
    codes_sha256: str
    target: str
    notes: tuple[str, ...] = ()


def exported_name(model: str | Path, target: str) -> Path:
    """model.int4.onnx → model.int4.TARGET.onnx, beside it."""
    from efrapq.exporters import profile

    return beside(model, profile(target).name)


def export(model: str | Path, output: str | Path, *, target: str) -> Exported:
    """Write a defended file for another target. Not a code changes: the result is read back and compared."""
    return export_all(model, {target: output})[0]


def export_all(model: str | Path, outputs: Mapping[str, str | Path]) -> list[Exported]:
    """One solution, written for several targets. outputs: target → file. All are checked before one is written."""
    from efrapq.exporters import profile, read_quantized, remarks

    for target in outputs:
        profile(target)
    source = read_source(model)
    paths = {target: Path(output) for target, output in outputs.items()}
    for path in paths.values():
        check_output(path, [Path(model)])
    found = load_onnx(source)
    inputs = [source.path, *(source.path.parent / location for location in found.external)]
    for path in paths.values():
        check_output(path, inputs)
    quantized = read_quantized(found.model, found.outside)
    sample = _zeros(found.model, quantized.metadata, source.name)
    written = {target: write_checked(quantized, target, sample, path) for target, path in paths.items()}
    for target, path in paths.items():
        if written[target].external:
            check_output(data_path(path), inputs)
    write_all({place: data for target, path in paths.items() for place, data in written[target].files(path).items()})
    return [
        Exported(written[target].data, path, quantized.digest, target, tuple(remarks(quantized, target)))
        for target, path in paths.items()
    ]


def _zeros(proto: onnx.ModelProto, metadata: Mapping[str, str], name: str) -> tuple[int, ...] | dict[str, NDArray[Any]]:
    """What a quantized file is tried on: the shape of an image, or zeros by input name; dynamic sizes as calibrated,
    or 1.
    """
    from efrapq.exporters.shapes import recorded_inputs, recorded_sizes

    inputs, shapes = model_inputs(proto, name), recorded_inputs(metadata)
    if takes_images(inputs) and not shapes:
        dims, image = inputs[0].dims or (), recorded_sizes(metadata)
        sizes = [1, *image] if len(image) == 3 else [1, 1, 1, 1]
        return tuple(d if isinstance(d, int) else size for d, size in zip(dims, sizes, strict=True))
    feeds: dict[str, NDArray[Any]] = {}
    for given in inputs:
        recorded = shapes.get(given.name, [])
        dims = tuple(recorded) if given.dims is None else given.dims
        sizes = recorded if len(recorded) == len(dims) else [1] * len(dims)
        shape = [d if isinstance(d, int) else size for d, size in zip(dims, sizes, strict=True)]
        if math.prod(shape) * given.dtype.itemsize > MAX_ARRAY_BYTES:
            raise UnsupportedModelError(f"{name}: takes an input {given.words()}, too large to be tried once")
        feeds[given.name] = np.zeros(shape, given.dtype)
    return feeds
