"""A quantized model as files of one target: exported, checked, loaded and run once before anything is in its place."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from efrapq.errors import InputError, OutputError, UnsupportedModelError, UsageError
from efrapq.io import data_as_inputs, load_onnx, printable, read_source
from efrapq.io.onnx_data import OnnxParts

if TYPE_CHECKING:
    from efrapq.graph.quantized import QuantizedModel

__all__ = ["Written", "beside", "data_path", "write_checked"]

# What an exported model is tried on: arrays by input name, or the shape of one float input.
Sample = tuple[int, ...] | Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Written:
    """data: the bytes of the .onnx file. size: how many, with those of its external data. external: location →
    SHA-256 of the file of these, where it has one: past 2 GiB, which one file cannot hold.
    """

    data: bytes
    size: int
    external: dict[str, str] = field(default_factory=dict)
    _parts: OnnxParts | None = None

    def files(self, path: Path) -> dict[str | Path, bytes | Iterator[bytes | memoryview]]:
        """What goes where, in the order in which it may appear: a model that is there finds its data."""
        if self._parts is None:
            return {path: self.data}
        return {data_path(path): self._parts.data(), path: self.data}


def beside(model: str | Path, word: str) -> Path:
    """model.pt → model.WORD.onnx, in its folder."""
    path = Path(model)
    if not path.name or path.is_dir():
        raise InputError(f"{printable(path)}: is a folder, not a model file")
    return path.with_name(f"{path.stem}.{word}.onnx")


def data_path(path: Path) -> Path:
    """Where the external data of an output go, if it has any."""
    return path.with_name(f"{path.name}.data")


def write_checked(quantized: QuantizedModel, target: str, sample: Sample, path: Path | None) -> Written:
    """Export, lint, read back, compare, load and run once: only then is it done.

    path: where the file is to go, whose name one of external data takes over. Raises UnsupportedModelError where a
    check fails, UsageError for a model that needs external data and has no path.
    """
    import onnx

    from efrapq.exporters import export_parts, lint, read_quantized

    parts = export_parts(quantized, target)
    violations = lint(parts.graph, target)
    if violations:
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        raise UnsupportedModelError(f"{target} would not take this model: {violations[0]}{more}")
    try:
        onnx.checker.check_model(data_as_inputs(parts.graph))
    except onnx.checker.ValidationError as exc:
        reason = printable((str(exc).splitlines() or [""])[0])
        raise UnsupportedModelError(f"the {target} form of this model is not valid ONNX ({reason})") from exc
    if parts.outside:
        return _large(parts, quantized.digest, target, sample, path)
    data = bytes(parts.graph.SerializeToString(deterministic=True))
    del parts  # of a large model, each of these is large
    _require_digest(read_quantized(onnx.load_model_from_string(data)), quantized.digest, target)
    gc.collect()  # graphs are cycles, and these hold all codes
    _try_once(data, sample, target)
    return Written(data, len(data))


def _large(parts: OnnxParts, digest: str, target: str, sample: Sample, path: Path | None) -> Written:
    """The same for a model with external data: written to temporary files and read from there as any model is."""
    from efrapq.exporters import read_quantized

    if path is None:
        raise UsageError("the quantized model is past 2 GiB and needs a file of external data: give an output path")
    with tempfile.TemporaryDirectory(prefix="efrapq-") as folder:
        try:
            tried = parts.write(Path(folder) / "model.onnx", "model.data")
        except OSError as exc:
            raise OutputError(
                f"{printable(tempfile.gettempdir())}: the model cannot be written there to be checked "
                f"({exc.strerror or exc}); point TMPDIR elsewhere"
            ) from exc
        found = load_onnx(read_source(tried))
        _require_digest(read_quantized(found.model, found.outside), digest, target)
        gc.collect()
        _try_once(tried, sample, target)
    location = data_path(path).name
    data = parts.located(location).SerializeToString(deterministic=True)
    return Written(data, len(data) + found.external_bytes, {location: found.external["model.data"]}, parts)


def _require_digest(found: QuantizedModel, digest: str, target: str) -> None:
    if found.digest != digest:
        raise UnsupportedModelError(
            f"the {target} file does not read back as the codes that were solved; please report this"
        )


def _try_once(model: bytes | Path, sample: Sample, target: str) -> None:
    from efrapq.verification.session import open_session, try_run

    if isinstance(sample, tuple):
        try_run(model, sample)
        return
    session = open_session(model, keep_graph=False)
    try:
        session.raw.run(None, dict(sample))
    except Exception as exc:  # the runtime has no one class for what can go wrong inside a model
        reason = printable((str(exc).strip().splitlines() or [type(exc).__name__])[0], 400)
        raise UnsupportedModelError(f"ONNX Runtime does not run the {target} form of this model: {reason}") from exc
