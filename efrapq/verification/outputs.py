"""How far the outputs of a quantized model are from the float model's on the same inputs, output by output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import InputError
from efrapq.io.text import printable
from efrapq.verification.classes import ClassAxis
from efrapq.verification.distance import Agreement, Distance, Spread
from efrapq.verification.metrics import class_scores
from efrapq.verification.session import Session

__all__ = ["OutputComparison", "is_float", "nearness"]

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")
# Outputs that answer instead of scoring: label maps, positions, masks.
DISCRETE = tuple(f"tensor({kind})" for kind in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"))
COMPARED = ("nearest", "defended")


def is_float(output: Any) -> bool:
    """Whether one of a session's outputs is a tensor of floats."""
    return output.type in FLOATS


class OutputComparison:
    """The outputs of all models on the same inputs, run by run; those that are no tensors of numbers are left out.

    axes: output name → its axis of classes. Raises InputError for models that have not the same outputs.
    """

    def __init__(self, sessions: Mapping[str, Session], axes: Mapping[str, ClassAxis] | None = None) -> None:
        made = sessions["defended"].outputs
        for name, session in sessions.items():
            outputs = len(session.outputs)
            if outputs != len(made):
                raise InputError(
                    f"the {name} model has {outputs} outputs, the defended file has {len(made)}; pass the model that "
                    "was defended with --float"
                )
        compared = [name for name in COMPARED if name in sessions and "float" in sessions]
        self.sessions = sessions
        self.rows = [
            _Row(index, str(output.name), is_float(output), (axes or {}).get(output.name), compared)
            for index, output in enumerate(made)
            if output.type in FLOATS + DISCRETE
        ]
        self.first = next((row for row in self.rows if row.is_float), None)
        self.classes = 0
        self._is_classifier = self.first is not None and self.first.index == 0
        self._answers: dict[str, list[NDArray[np.int64]]] = {name: [] for name in sessions}
        self._clipped: list[NDArray[np.bool_]] = []

    def run(self, feeds: Mapping[str, Mapping[str, NDArray[Any]]], size: int, count: int) -> None:
        """Run the models once and add what they give. feeds: by model, arrays by input name; of the `size` samples
        that they hold the first `count` are measured.

        Raises UnsupportedModelError if the runtime does not run a model on them.
        """
        if not self.rows:
            return
        positions = [row.index for row in self.rows]
        guard = self.sessions["defended"].guard
        beside = {} if guard is None else {"defended": [guard]}
        found = {name: s.run(feeds[name], positions + beside.get(name, [])) for name, s in self.sessions.items()}
        if guard is not None:
            self._clipped.append(measured(found["defended"].pop(), size, count) > 0)
        for place, row in enumerate(self.rows):
            pieces = {name: measured(outputs[place], size, count) for name, outputs in found.items()}
            if "float" in pieces:
                row.add(pieces, sample_axis(found["float"][place].shape, size))
            if row is self.first:
                self._answer(pieces, count)

    def _answer(self, found: Mapping[str, NDArray[Any]], count: int) -> None:
        for name, output in found.items():
            scores = class_scores(output, count) if self._is_classifier else None
            if scores is None:
                self._is_classifier = False
                return
            self.classes = scores.shape[1]
            self._answers[name].append(scores.argmax(1))

    def answers(self) -> dict[str, NDArray[np.int64]]:
        """Top-1 classes by model, (N,); empty for a model that is no classifier."""
        if not self._is_classifier:
            return {}
        return {name: np.concatenate(parts) for name, parts in self._answers.items()}

    def agreement(self) -> float | None:
        """Percent of the samples whose top-1 class is the float model's; None for no classifier."""
        answers = self.answers()
        if "float" not in answers:
            return None
        return 100 * float((answers["defended"] == answers["float"]).mean())

    def clipped(self) -> dict[str, float | None] | None:
        """Percent of the samples of which the defended file says that something was clipped, see `metrics.flagged`."""
        if not self._clipped:
            return None
        return {"clean": 100 * float(np.concatenate(self._clipped).mean()), "triggered": None, "asr": None}

    def notes(self) -> tuple[str, ...]:
        """Why outputs that ran have no figures."""
        if self.first is None:
            return ("distances of outputs are not measured: the model has no float output",)
        reasons = ((row.name, reason) for row in self.rows for reason in row.reasons)
        return tuple(f"output '{printable(name)}' is not compared: {reason}" for name, reason in reasons)

    def nearness(self) -> dict[str, dict[str, float | None]]:
        """cosine and relative_error of the first float output, by model."""
        return nearness({} if self.first is None else self.first.distances)

    def each(self) -> list[dict[str, Any]] | None:
        """All outputs with their figures by model; None where there is no float model to compare with."""
        if "float" not in self.sessions:
            return None
        return [row.record() for row in self.rows]


def nearness(distances: Mapping[str, Distance]) -> dict[str, dict[str, float | None]]:
    """cosine and relative_error by model; None where nothing was compared."""
    return {name: distances.get(name, Distance()).figures() for name in COMPARED}


def measured(output: NDArray[Any], size: int, count: int) -> NDArray[Any]:
    """The output for the first `count` of the `size` samples of a run; taken whole without an axis of samples."""
    axis = sample_axis(output.shape, size)
    return output if axis is None or count == size else np.take(output, np.arange(count), axis)


def sample_axis(shape: Sequence[int], size: int) -> int | None:
    """The axis of an output that counts the `size` samples of a run: the first, or the only other one of that size."""
    axes = [axis for axis, length in enumerate(shape) if length == size]
    return axes[0] if axes[:1] == [0] or len(axes) == 1 else None


class _Row:
    """One output. compared: the models that are compared with the float one."""

    def __init__(
        self, index: int, name: str, has_floats: bool, classes: ClassAxis | None, compared: Sequence[str]
    ) -> None:
        self.index, self.name, self.is_float, self.classes = index, name, has_floats, classes
        self.distances = {model: Distance() for model in compared} if has_floats else {}
        self.agreements = {model: Agreement() for model in compared}
        self.spread = Spread()
        self.shape: list[int | None] | None = None
        self.axis: int | None = None

    def add(self, found: Mapping[str, NDArray[Any]], samples: int | None) -> None:
        """The output of all models on the same inputs. samples: its axis that counts them, if there is one."""
        expected = found["float"]
        self._see(expected.shape, samples)
        if self.is_float:
            self.spread.add(None if samples is None else np.moveaxis(expected, samples, 0))
            self.axis = None if self.classes is None else self.classes.of(expected.shape)
        for model, distance in self.distances.items():
            distance.add(expected, found[model])
        for model, agreement in self.agreements.items():
            if not self.is_float:
                agreement.add(expected, found[model])
            elif self.axis is not None and expected.shape == found[model].shape:
                agreement.add(expected.argmax(self.axis), found[model].argmax(self.axis))

    def _see(self, shape: Sequence[int], samples: int | None) -> None:
        """Keep of the shape what is the same in all runs."""
        seen = [None if axis == samples else length for axis, length in enumerate(shape)]
        if self.shape is None:
            self.shape = seen
        elif len(self.shape) == len(seen):
            self.shape = [a if a == b else None for a, b in zip(self.shape, seen, strict=True)]

    @property
    def reasons(self) -> list[str]:
        """Why there are no figures."""
        return sorted({distance.reason for distance in self.distances.values() if distance.reason is not None})

    def record(self) -> dict[str, Any]:
        """shape: of the output, null where it counts samples or varies. class_axis: where the scores of classes are
        that `agreement` compares. positions: how many answers that are.
        """
        return {
            "name": self.name,
            "shape": self.shape,
            "class_axis": self.axis,
            "positions": max((agreement.positions for agreement in self.agreements.values()), default=0) or None,
            **{model: self._figures(model) for model in COMPARED},
        }

    def _figures(self, model: str) -> dict[str, float | None]:
        distance, agreement = self.distances.get(model, Distance()), self.agreements.get(model, Agreement())
        return {
            **distance.figures(),
            "error_of_spread": distance.error_of(self.spread.value) if model in self.distances else None,
            "agreement": None if distance.reason is not None else agreement.percent,
        }
