"""ONNX Runtime sessions as users run them: default optimizations, and the optimized graph kept for inspection."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["Session", "interleaved_latency", "open_session", "try_run"]


@dataclass(frozen=True)
class Session:
    """One loaded model with one float input. optimized: the graph as the runtime rewrote it."""

    raw: Any
    optimized: onnx.ModelProto
    provider: str

    @property
    def input_name(self) -> str:
        return str(self.raw.get_inputs()[0].name)

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """(N, C, H, W), None where dynamic."""
        return tuple(d if isinstance(d, int) else None for d in self.raw.get_inputs()[0].shape)

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first output for a batch of inputs. A model with a fixed batch is fed in pieces, padded at the end."""
        fixed = self.input_shape[0]
        if fixed is None or fixed == len(x):
            return np.asarray(self.raw.run(None, {self.input_name: x})[0])
        parts = []
        for start in range(0, len(x), fixed):
            piece = x[start : start + fixed]
            padded = np.concatenate([piece, np.repeat(piece[-1:], fixed - len(piece), 0)])
            parts.append(np.asarray(self.raw.run(None, {self.input_name: padded})[0])[: len(piece)])
        return np.concatenate(parts)


def open_session(data: bytes, *, threads: int = 0, provider: str = "CPUExecutionProvider") -> Session:
    """Load a model's bytes. threads: 0 lets the runtime choose. UnsupportedModelError if it does not load."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="efrapq-") as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        try:
            raw = ort.InferenceSession(data, options, providers=[provider])
        except Exception as exc:
            raise UnsupportedModelError(f"ONNX Runtime does not load the model: {_first_line(exc)}") from exc
        optimized = onnx.load(path)
    return Session(raw, optimized, str(raw.get_providers()[0]))


def try_run(data: bytes) -> None:
    """Load the model and run it once on zeros; UnsupportedModelError if either fails."""
    session = open_session(data)
    shape = [d if d is not None else 1 if i == 0 else 32 for i, d in enumerate(session.input_shape)]
    try:
        session.logits(np.zeros(shape, np.float32))
    except Exception as exc:
        raise UnsupportedModelError(f"ONNX Runtime does not run the model: {_first_line(exc)}") from exc


def interleaved_latency(
    sessions: dict[str, Session], x: NDArray[np.float32], *, rounds: int = 30, warmup: int = 5
) -> dict[str, float]:
    """Median milliseconds per call on the same input, the sessions taking turns so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(warmup + rounds):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.logits(x)
            if i >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: 1000 * float(np.median(t)) for name, t in times.items()}


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
