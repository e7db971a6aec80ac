"""A quantized file beside what it was made from: its evidence, its float model, and its preprocessing."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efrapq.errors import DataError, InputError, LimitError
from efrapq.io import OnnxFile, Source, printable, read_source
from efrapq.io.source import read_fd
from efrapq.loading import PREPROCESS_KEY, FloatModel, effective_preprocess, image_input, load
from efrapq.preprocess import Preprocess, PreprocessOverride
from efrapq.progress import Reporter
from efrapq.report.evidence import EVIDENCE_SCHEMA

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Subject"]

MAX_EVIDENCE_BYTES = 16 << 20


class Subject:
    """One quantized file. source: its float model, once `find_float` has found it. recorded: the evidence beside the
    file; evidence: the parts of it that are read here, of the kind that they must be. notes: what was said on the way.
    """

    def __init__(self, source: Source, found: OnnxFile, reporter: Reporter) -> None:
        self.name = source.name
        self.path = source.path
        self.sha256 = source.sha256
        self.found = found
        self.proto = found.model
        self.metadata = {p.key: p.value for p in found.model.metadata_props}
        self.input_shape = image_input(found.model)
        self.reporter = reporter
        self.notes: list[str] = []
        self.source: FloatModel | None = None
        self.recorded = self._read_evidence()
        self.evidence = {key: value for key, value in self.recorded.items() if isinstance(value, dict)}

    def note(self, text: str) -> None:
        """Say it, and keep it."""
        text = printable(text, 1000)  # parts of it may come from the file
        self.notes.append(text)
        self.reporter.warn(text)

    # The float reference.

    def find_float(
        self,
        float_model: str | Path | None,
        arch: str | None,
        input_shape: tuple[int, int, int] | None,
        trust_pickle: bool,
    ) -> None:
        """Load the model that the file was made from: the one given, or else the one that the evidence names, if it is
        still there. Raises InputError if it is another.
        """
        wanted = self.metadata.get("efrapq.source.sha256")
        path = Path(float_model) if float_model is not None else self._recorded_float(wanted)
        if path is None:
            self.note("no float model to compare with: pass --float with the model that was defended")
            return
        self.source = load(path, arch=arch, input_shape=input_shape or self._own_image(arch), trust_pickle=trust_pickle)
        if wanted and self.source.sha256 != wanted:
            raise InputError(
                f"{self.source.name}: is not the model that {self.name} was made from (its SHA-256 differs); "
                "pass the right one with --float"
            )
        recorded = self.evidence.get("input", {})
        external = recorded.get("external", self.source.external)
        if recorded.get("sha256") == self.source.sha256 and external != self.source.external:
            raise InputError(
                f"{self.source.name}: its external data are not those that {self.name} was made from (their SHA-256 "
                "differ from the evidence); pass the right model with --float"
            )

    def reference(self) -> ir.Model:
        """The float model's graph, prepared, its channels scaled as the file's are. Once `find_float` has found it."""
        from efrapq.graph.equalize import EQUALIZED_KEY, equalize, exponents_from_json
        from efrapq.graph.prepare import prepare

        assert self.source is not None
        model = prepare(self.source.proto, self.source.outside)
        if EQUALIZED_KEY in self.metadata:
            equalize(model, exponents_from_json(self.metadata[EQUALIZED_KEY]))
        return model

    def _own_image(self, arch: str | None) -> tuple[int, int, int] | None:
        """(C, H, W) of the file, for a network of the user's own, which does not say what it takes; None if dynamic."""
        if arch is None or ":" not in arch or len(self.input_shape) != 4:
            return None
        _, channels, height, width = self.input_shape
        return (channels, height, width) if channels and height and width else None

    def _recorded_float(self, wanted: str | None) -> Path | None:
        """The defended model's path, from the evidence beside the file, if it is still that model."""
        recorded = self.evidence.get("input", {}).get("path")
        if not wanted or not isinstance(recorded, str):
            return None
        for path in (Path(recorded), self.path.parent / Path(recorded).name):
            try:
                if read_source(path).sha256 == wanted:
                    return path
            except InputError:
                continue  # the evidence is a hint, from whoever wrote it
        return None

    def _read_evidence(self) -> dict[str, Any]:
        """The evidence beside the file; empty where there is none that can be read."""
        path = self.path.with_suffix(".json")
        try:
            document = json.loads(_read_evidence_file(path))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError, InputError):
            document = None
        if not isinstance(document, dict) or document.get("schema") != EVIDENCE_SCHEMA:
            self.note(f"{printable(path)}: is not efrapq evidence, ignored")
            return {}
        return document

    def preprocess(self, given: Preprocess | PreprocessOverride | None) -> Preprocess:
        """What the user gave over what the file records, or else the float model's record."""
        effective, known = effective_preprocess(given, self._recorded_preprocess(given))
        if not known:
            self.note(
                "no preprocessing is recorded: pixels are scaled to 0–1; pass --mean and --std if the model wants more"
            )
        return effective or Preprocess()

    def _recorded_preprocess(self, given: Preprocess | PreprocessOverride | None) -> Preprocess | None:
        if PREPROCESS_KEY in self.metadata:
            try:
                return Preprocess.from_json(self.metadata[PREPROCESS_KEY])
            except DataError:
                if given is None or (isinstance(given, PreprocessOverride) and not given.says_colours):
                    raise
                self.note("the file's preprocessing record is unreadable: what was given is used instead")
        return self.source.preprocess if self.source is not None else None


def _read_evidence_file(path: Path) -> bytes:
    """Whatever lies beside a file from outside is from outside too. Raises OSError, ValueError or InputError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_EVIDENCE_BYTES:
        raise LimitError(f"{printable(path)}: is no evidence file")
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    return read_fd(fd, printable(path), MAX_EVIDENCE_BYTES)
