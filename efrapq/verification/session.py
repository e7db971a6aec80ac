"""ONNX Runtime sessions as users run them: default optimizations, and the optimized graph kept for inspection."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import OutputError, UnsupportedModelError
from efrapq.io.onnx_data import DataSource, OnnxParts
from efrapq.io.text import printable

if TYPE_CHECKING:
    import onnx

__all__ = [
    "LARGE",
    "Session",
    "feeds_latency",
    "interleaved_latency",
    "open_model",
    "open_session",
    "shape_words",
    "try_run",
]

# Bytes of a model from which on the optimized graph is kept without its weights.
LARGE = 256 << 20


@dataclass(frozen=True)
class Session:
    """One loaded model. kept: the graph as the runtime rewrote it, where it was asked for; of a large model without its
    weights. What speaks of *the* input is for models with one float input; `run` is for any.
    """

    raw: Any
    kept: onnx.ModelProto | None
    provider: str

    @property
    def optimized(self) -> onnx.ModelProto:
        """`kept`, of a session that was opened to look at it."""
        assert self.kept is not None
        return self.kept

    @property
    def input_name(self) -> str:
        return str(self.raw.get_inputs()[0].name)

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """(N, C, H, W), None where dynamic."""
        return tuple(d if isinstance(d, int) else None for d in self.raw.get_inputs()[0].shape)

    def require_images(self, name: str) -> None:
        """UnsupportedModelError unless the model takes one batch of images and nothing else."""
        inputs = self.raw.get_inputs()
        if len(inputs) != 1:
            raise UnsupportedModelError(f"{name}: has {len(inputs)} inputs; models with one image input are supported")
        shape = self.input_shape
        if len(shape) != 4 or any(d is not None and d < 1 for d in shape):
            raise UnsupportedModelError(f"{name}: its input is not a batch of images (N, C, H, W)")

    @cached_property
    def guard(self) -> int | None:
        """The position of the output that counts what was clipped, of a file that has one (`exporters.guard`)."""
        from efrapq.exporters.guard import guard_position

        names = [output.name for output in self.raw.get_outputs()]
        return guard_position(self.raw.get_modelmeta().custom_metadata_map, names)

    @property
    def outputs(self) -> list[Any]:
        """The runtime's outputs of the model, without that one."""
        guard = self.guard
        return [output for i, output in enumerate(self.raw.get_outputs()) if i != guard]

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first output for a batch of inputs, which a model of float16 gets and gives in that. A model with a fixed
        batch is fed in pieces, padded at the end.

        Raises UnsupportedModelError if the runtime does not run the model on them.
        """
        return self.answers(x)[0]

    def answers(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """The first output, and for each sample whether something was clipped; None of a file that does not say."""
        fixed = self._fixed_batch
        if fixed is None or fixed == len(x):
            return self._run(x)
        parts = []
        for start in range(0, len(x), fixed):
            piece = x[start : start + fixed]
            padded = np.concatenate([piece, np.repeat(piece[-1:], fixed - len(piece), 0)])
            parts.append([None if found is None else found[: len(piece)] for found in self._run(padded)])
        logits, clipped = zip(*parts, strict=True)
        return np.concatenate(logits), None if clipped[0] is None else np.concatenate(clipped)

    def images(self, x: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """What `run` takes for a batch of images: in the type that the model takes them in, which float16 may be."""
        half = self.raw.get_inputs()[0].type == "tensor(float16)"
        return {self.input_name: x.astype(np.float16) if half else x}

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[int] = ()) -> list[Any]:
        """The outputs at these positions, or else all, for one run; feeds: input name → array. Tensors are arrays.

        Raises UnsupportedModelError if the runtime does not run the model on them.
        """
        names = [self.raw.get_outputs()[index].name for index in outputs]
        try:
            return list(self.raw.run(names or None, dict(feeds)))
        except Exception as exc:  # the runtime has no one class for what can go wrong inside a model
            given = ", ".join(f"'{printable(name)}' {shape_words(array.shape)}" for name, array in feeds.items())
            raise UnsupportedModelError(
                f"ONNX Runtime does not run the model on inputs of {given}: {_first_line(exc)}"
            ) from exc

    def images_run(self, count: int) -> int:
        """How many images the model works through when it is given so many: with a fixed batch, whole batches."""
        fixed = self._fixed_batch
        return count if fixed is None else -(-count // fixed) * fixed

    @property
    def _fixed_batch(self) -> int | None:
        return self.input_shape[0] if self.input_shape else None

    def _run(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        try:
            outputs = self.raw.run(None, self.images(x))
        except Exception as exc:  # the runtime has no one class for what can go wrong inside a model
            raise UnsupportedModelError(
                f"ONNX Runtime does not run the model on an input of {shape_words(x.shape)}: {_first_line(exc)}"
            ) from exc
        found = np.atleast_1d(np.asarray(outputs[0]))
        guard = self.guard
        clipped = None if guard is None else np.atleast_1d(np.asarray(outputs[guard])) > 0
        return found.astype(np.float32) if found.dtype == np.float16 else found, clipped


def open_model(
    proto: onnx.ModelProto, outside: Mapping[str, DataSource], *, threads: int = 0, keep_graph: bool = True
) -> Session:
    """Load a model of which some initializers are not in the proto. They are written to temporary files for it, so
    that the runtime reads what was hashed and nothing else; the files are gone when it has loaded them. The rest as
    `open_session` takes it.

    Raises UnsupportedModelError if it does not load, OutputError if there is no room for the files.
    """
    if not outside:
        return open_session(proto.SerializeToString(), threads=threads, keep_graph=keep_graph)
    # Windows does not remove a file that the runtime has mapped.
    with tempfile.TemporaryDirectory(prefix="efrapq-", ignore_cleanup_errors=os.name == "nt") as folder:
        try:
            path = OnnxParts(proto, outside).write(Path(folder) / "model.onnx", "model.data")
        except OSError as exc:
            raise OutputError(
                f"{printable(tempfile.gettempdir())}: the model's weights cannot be written there for ONNX Runtime "
                f"({exc.strerror or exc}); point TMPDIR elsewhere"
            ) from exc
        return open_session(path, threads=threads, keep_graph=keep_graph)


def open_session(
    model: bytes | Path, *, threads: int = 0, provider: str = "CPUExecutionProvider", keep_graph: bool = True
) -> Session:
    """Load a model's bytes, or the file of one with external data. threads: 0 lets the runtime choose. keep_graph:
    whether the optimized graph is wanted, for which the runtime writes out all of the model once more.

    Raises UnsupportedModelError if it does not load.
    """
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="efrapq-") as folder:
        path = Path(folder) / "optimized.onnx"
        if keep_graph:
            options.optimized_model_filepath = str(path)
            if isinstance(model, Path) or len(model) > LARGE:
                # The weights are not wanted of it, and one file may not hold them.
                outside = "session.optimized_model_external_initializers"
                options.add_session_config_entry(f"{outside}_file_name", "data")
                options.add_session_config_entry(f"{outside}_min_size_in_bytes", "65536")
        try:
            raw = ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=[provider])
        except Exception as exc:
            raise UnsupportedModelError(f"ONNX Runtime does not load the model: {_first_line(exc)}") from exc
        kept = onnx.load(path, load_external_data=False) if keep_graph else None
    return Session(raw, kept, str(raw.get_providers()[0]))


def try_run(model: bytes | Path, shape: tuple[int, ...]) -> None:
    """Load the model and run it once on zeros of this shape; UnsupportedModelError if either fails."""
    open_session(model, keep_graph=False).logits(np.zeros(shape, np.float32))


def interleaved_latency(
    sessions: dict[str, Session], x: NDArray[np.float32], *, rounds: int = 30, warmup: int = 5
) -> dict[str, float]:
    """Median milliseconds for one image of the same input, the sessions taking turns so that drift hits all alike.

    A model with a fixed batch works through whole batches whatever it is given: its time is shared among them.
    """
    runs = {name: partial(session.logits, x) for name, session in sessions.items()}
    medians = _interleaved(runs, rounds, warmup)
    return {name: median / sessions[name].images_run(len(x)) for name, median in medians.items()}


def feeds_latency(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, NDArray[Any]],
    samples: int,
    *,
    rounds: int = 30,
    warmup: int = 5,
) -> dict[str, float]:
    """The same for inputs by name: median milliseconds for one of the `samples` in the feeds."""
    runs = {name: partial(session.run, feeds) for name, session in sessions.items()}
    return {name: median / samples for name, median in _interleaved(runs, rounds, warmup).items()}


def _interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, float]:
    """Median milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if i >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: 1000 * float(np.median(t)) for name, t in times.items()}


def shape_words(shape: tuple[int | None, ...]) -> str:
    """A shape as messages show it: 100×3×32×32."""
    return "×".join("any" if d is None else str(d) for d in shape) or "a single number"


def _first_line(exc: Exception) -> str:
    # The runtime quotes names out of the model, and the model is somebody else's.
    return printable((str(exc).strip().splitlines() or [type(exc).__name__])[0], 400)
