"""What a pass has solved so far, on the disk, so that it can go on after it was stopped.

One file a layer, each written whole or not at all, in a folder beside the output; a key over everything that decides
the codes keeps the layers of one run out of another. The streams are computed again on resuming, which is cheap: the
solving is what is saved.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from efrapq.errors import OutputError, UsageError
from efrapq.graph.quantized import QuantizedWeight
from efrapq.io import printable, write_atomic
from efrapq.stream.settings import LayerReport

__all__ = ["Journal"]

KEY = "key.json"
# What `write_atomic` leaves behind when the process is killed in it.
TEMPORARY = re.compile(r"\.efrapq-[0-9a-f]{16}\.tmp")
OURS = re.compile(rf"[0-9a-f]{{16}}\.npz|{re.escape(KEY)}|{TEMPORARY.pattern}")


class Journal:
    """folder: where the layers go; made when the first one is solved. key: of this run."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.resumed = 0

    def resume(self) -> bool:
        """Whether there is a run to continue. Raises UsageError if what lies there is of another run, OutputError if
        it is not a journal."""
        recorded = self._recorded()
        if recorded is None:
            self.restart()
            return False
        if recorded != self.key:
            raise UsageError(
                f"{printable(str(self.folder))}: was begun with another model, other data, settings or versions; "
                "leave out --resume to start again"
            )
        return True

    def restart(self) -> None:
        """Forget what lies there. Raises OutputError if the folder is not a journal."""
        if self.folder.exists():
            if self._recorded() is None and not self._unbegun():
                raise OutputError(f"{printable(str(self.folder))}: is in the way; move it or choose another output")
            self.discard()

    def get(self, name: str, shape: tuple[int, ...]) -> tuple[QuantizedWeight, LayerReport] | None:
        """A layer solved earlier; None if it was not, or if its file does not fit."""
        path = self._path(name)
        try:
            # From memory: np.load leaves a file that it cannot read open.
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                codes, scale, about = file["codes"], file["scale"], json.loads(bytes(file["about"]))
            report = LayerReport(**about["report"] | {"shape": tuple(about["report"]["shape"])})
            weight = QuantizedWeight(codes, scale, int(about["axis"]), report.bits, int(report.block))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile) as exc:
            raise UsageError(f"{printable(str(path))}: is damaged; leave out --resume to start again") from exc
        fits = report.name == name and codes.shape == shape == report.shape and codes.dtype == np.int8
        if not fits or scale.dtype != np.float32 or scale.shape != _scale_shape(weight, shape):
            raise UsageError(f"{printable(str(path))}: is of another layer; leave out --resume to start again")
        self.resumed += 1
        return weight, report

    def put(self, name: str, weight: QuantizedWeight, report: LayerReport) -> None:
        """Keep a solved layer."""
        if self._recorded() is None:
            try:
                self.folder.mkdir(exist_ok=True)
            except OSError as exc:
                raise OutputError(f"{printable(str(self.folder))}: cannot be made ({exc.strerror})") from exc
            write_atomic(self.folder / KEY, json.dumps({"efrapq": "journal/1", "key": self.key}).encode())
        about = json.dumps({"axis": weight.axis, "report": asdict(report)}).encode()
        buffer = io.BytesIO()
        np.savez(buffer, codes=weight.codes, scale=weight.scale, about=np.frombuffer(about, np.uint8))
        write_atomic(self._path(name), buffer.getvalue())

    def holds_layers(self) -> bool:
        """Whether there is anything to go on from."""
        return self._recorded() is not None and any(self.folder.glob("*.npz"))

    def discard(self) -> None:
        """Remove the journal's files, and the folder if nothing else lies in it."""
        if not self.folder.is_dir():
            return
        # The key last: a folder that has it can be discarded again.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == KEY):
            if OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _unbegun(self) -> bool:
        """Whether a run was stopped here before it had written even the key."""
        return self.folder.is_dir() and all(TEMPORARY.fullmatch(path.name) for path in self.folder.iterdir())

    def _path(self, name: str) -> Path:
        # Names come out of the model: anything but a file name.
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"

    def _recorded(self) -> str | None:
        try:
            found = json.loads((self.folder / KEY).read_bytes())
        except (OSError, ValueError):
            return None
        return str(found.get("key")) if isinstance(found, dict) and found.get("efrapq") == "journal/1" else None


def _scale_shape(weight: QuantizedWeight, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a weight's scales must have; None if its axis or its block does not fit."""
    if not 0 <= weight.axis < len(shape):
        return None
    if not weight.block:
        return (shape[weight.axis],)
    if len(shape) != 2 or weight.block < 0 or shape[1 - weight.axis] % weight.block:
        return None
    blocks = shape[1 - weight.axis] // weight.block
    return (blocks, shape[1]) if weight.axis == 1 else (shape[0], blocks)
