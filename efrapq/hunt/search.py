"""search_trigger(): look for a trigger that a quantized file answers and its float model does not."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efrapq.calibration.signature import image_layout, model_inputs, takes_images
from efrapq.data import Dataset, files_behind, require_there
from efrapq.errors import DataError, UnsupportedModelError, UsageError
from efrapq.io import check_output, is_quantized, load_onnx, printable, read_source, write_atomic
from efrapq.loading import open_for
from efrapq.preprocess import Preprocess, PreprocessOverride
from efrapq.progress import Reporter, Silent, Task
from efrapq.trigger import Trigger
from efrapq.verification.images import shape_without_classes
from efrapq.verification.metrics import predict
from efrapq.verification.session import Session, open_model
from efrapq.verification.subject import Subject

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from efrapq.grid import ActivationGrid
    from efrapq.hunt.patch import Network, Patch

__all__ = ["SEARCH_SCHEMA", "Found", "search_trigger"]

SEARCH_SCHEMA = "efrapq.search/1"
# The window's side, as a share of the image's shorter one: 6 of 32.
SHARE = 3 / 16
# Percent of images that a trigger turns in the file more than in the float model; and how many times what the same
# search finds with the two exchanged. Both have to be reached (docs/THREAT-MODEL.md has what honest networks reach),
# but for what turns nearly all in the one and none in the other: networks that hide something have controls like that.
MOST_HONEST, ONE_SIDED, CERTAIN = 50.0, 2.0, 90.0
# Images for the search, and as many others to measure what it found on.
IMAGES = 512
FEWEST = 32


@dataclass(frozen=True)
class Found:
    """document: schema efrapq.search/1. trigger: the content of an .npz file with mask and pattern, as --trigger takes
    it; of the best patch, whether or not it is a trigger.
    """

    document: dict[str, Any]
    trigger: bytes

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return bool(self.document["verdict"] == "pass")


def search_trigger(
    model: str | Path,
    *,
    data: str | Path | Dataset,
    output: str | Path | None = None,
    float_model: str | Path | None = None,
    arch: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    preprocess: Preprocess | PreprocessOverride | None = None,
    side: int | None = None,
    steps: int = 100,
    seed: int = 0,
    device: str = "auto",
    trust_pickle: bool = False,
    reporter: Reporter | None = None,
) -> Found:
    """Look for one patch that turns a quantized file's answers into one class, and not its float model's.

    data: images, whose labels are not needed; half of them (at most 512) are searched on, the others (at most as many)
    measure what was found, in ONNX Runtime. side: of the patch in pixels, by default 3/16 of the image's. What turns
    half of the images is held against the same search with file and float model exchanged: how far two networks can be
    told apart that differ by rounding alone. output: where to write the patch, if it is a trigger. What is not found
    may be there all the same.

    Raises EfrapqError for bad inputs.
    """
    from efrapq.device import exact_convolutions, resolve_device
    from efrapq.hunt.overshoot import overshoot
    from efrapq.hunt.patch import Effort, find_patch

    reporter = reporter or Silent()
    require_there(data)
    if steps < 1:
        raise UsageError("--steps must be at least 1")
    device = resolve_device(device)
    subject = _subject(model, data, output, float_model, reporter)
    subject.find_float(float_model, arch, input_shape, trust_pickle)
    if subject.source is None:
        raise UsageError(f"{subject.name}: the search compares it with the model it was made from: pass --float")
    if output is not None and subject.source.path is not None:
        check_output(output, [subject.source.path])
    layout = image_layout(model_inputs(subject.found.model, subject.name))
    effective = subject.preprocess(preprocess).in_layout(layout)
    images = data if isinstance(data, Dataset) else open_for(data, subject.input_shape, effective)
    inside, outside = _halves(images, seed)
    pixels = _pixels(inside, effective)
    size = pixels.shape[1], pixels.shape[2]
    side = side or max(1, round(SHARE * min(size)))
    if not 1 <= side <= min(size):
        raise UsageError(f"--side must be 1 to {min(size)} for images of {size[0]}x{size[1]}")
    effort = Effort(side, steps=steps)
    reference, file = _graphs(subject)
    networks = [_Images(graph, effective, device) for graph in (reference, file)]
    answers = [network.logits for network in networks]
    grids = _grids(subject, reference)
    drive = overshoot(networks[0].values, grids) if grids else None
    given = _tensor(pixels, device)
    sessions = _sessions(subject)

    def searched(title: str, kept: Network, turned: Network) -> tuple[Patch, dict[str, float]]:
        """The best patch, and percent of answers that it turns, by model."""
        with reporter.task(title, float(effort.total(drives=drive is not None))) as task, exact_convolutions():
            patch = find_patch(kept, turned, given, effort, seed, lambda: task.advance("", 1.0), drive)
        with reporter.task("measuring in ONNX Runtime", 2.0 * len(outside)) as task:
            return patch, _measured(patch, sessions, outside, effective, task)

    best, turned = searched("searching", *answers)
    exchanged = None
    if _gap(turned) >= MOST_HONEST:
        _, exchanged = searched("searching with the two exchanged", *answers[::-1])
    document: dict[str, Any] = {
        "schema": SEARCH_SCHEMA,
        "model": {"path": str(subject.path), "sha256": subject.sha256},
        "float_model": {"path": str(subject.source.path or ""), "sha256": subject.source.sha256},
        "samples": {"searched": len(inside), "measured": len(outside)},
        "effort": {"side": side, "steps": steps, "seed": seed},
        "patch": {
            "row": best.row,
            "col": best.col,
            "side": side,
            "share": round(100 * side**2 / (size[0] * size[1]), 2),
        },
        "target_class": best.target,
        "turned": {name: round(rate, 3) for name, rate in turned.items()},
        "exchanged": exchanged and {name: round(rate, 3) for name, rate in exchanged.items()},
        "trigger": None,
        "verdict": "fail" if exchanged is not None and _is_trigger(turned, exchanged) else "pass",
        "notes": list(subject.notes),
    }
    found = Found(document, _npz(best, size))
    if not found.passed and output is not None:
        write_atomic(output, found.trigger)
        document["trigger"] = str(output)
    return found


def _subject(
    model: str | Path,
    data: str | Path | Dataset,
    output: str | Path | None,
    float_model: str | Path | None,
    reporter: Reporter,
) -> Subject:
    """The file to search in, which has to be a quantized classifier of images that the output does not overwrite."""
    source = read_source(model)
    read = [source.path, source.path.with_suffix(".json")]
    read += [] if isinstance(data, Dataset) else files_behind(data)
    read += [] if float_model is None else [Path(float_model)]
    if output is not None:
        check_output(output, read)
    found = load_onnx(source)
    if not is_quantized(found.model):
        raise UnsupportedModelError(f"{source.name}: is a float model; search takes the file that defend wrote")
    if not takes_images(model_inputs(found.model, source.name)):
        raise UnsupportedModelError(f"{source.name}: takes no images, and a patch is for images")
    if (shape := shape_without_classes(found.model)) is not None:
        raise UnsupportedModelError(f"{source.name}: is no classifier, its first output is {shape}, not N×classes")
    return Subject(source, found, reporter)


def _gap(turned: dict[str, float]) -> float:
    """Percent of images that a patch turns in the file more than in the float model. turned: percent by model."""
    return turned["file"] - turned["float"]


def _is_trigger(turned: dict[str, float], exchanged: dict[str, float]) -> bool:
    """Whether a patch that turns half of the images is more than two networks that differ by rounding have."""
    return _gap(turned) >= min(CERTAIN, ONE_SIDED * -_gap(exchanged))


def _halves(images: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Images to search on, and others to measure on."""
    count = min(len(images) // 2, IMAGES)
    if count < FEWEST:
        raise DataError(f"{images.name}: {len(images)} images are too few to search on: give at least {2 * FEWEST}")
    order = np.random.default_rng(seed).permutation(len(images))
    return images.select(np.sort(order[:count])), images.select(np.sort(order[count : 2 * count]))


def _pixels(images: Dataset, preprocess: Preprocess) -> NDArray[np.float32]:
    """(N, H, W, C) float32 where white is 1."""
    everything = range(len(images))
    if images.is_input:
        return preprocess.to_unit(images.inputs(everything, preprocess))
    return images.raw(everything).astype(np.float32) / np.float32(255)


def _tensor(pixels: NDArray[np.float32], device: str) -> Tensor:
    import torch

    return torch.from_numpy(pixels).to(device)


def _graphs(subject: Subject) -> list[ir.Model]:
    """The float model's graph, its channels scaled as the file's are, and the file's."""
    import onnx_ir as ir

    from efrapq.exporters.guard import strip_guard
    from efrapq.graph.outside import attach

    file = ir.from_proto(subject.proto)
    attach(file, subject.found.outside)
    strip_guard(file)
    return [subject.reference(), file]


class _Images:
    """A graph as a function of raw images, with a gradient through its quantizers."""

    def __init__(self, graph: ir.Model, preprocess: Preprocess, device: str) -> None:
        import torch

        from efrapq.graph.executor import Executor
        from efrapq.graph.straight_through import STRAIGHT_THROUGH

        self._executor = Executor(graph, device=device, instead=STRAIGHT_THROUGH)
        if self._executor.fallback_nodes:
            raise UnsupportedModelError(
                f"node {printable(self._executor.fallback_nodes[0])} has no gradient here: the search is for networks "
                "and QDQ files whose operators efrapq computes itself"
            )
        value = next(v for v in graph.graph.inputs if v.name not in self._executor.constants)
        self._input, self._output = str(value.name), str(graph.graph.outputs[0].name)
        self._batch = value.shape[0] if value.shape is not None else None
        self._last = preprocess.layout == "NHWC"
        self._mean, self._std = (
            torch.tensor(v, dtype=torch.float32, device=device) for v in (preprocess.mean, preprocess.std)
        )

    def logits(self, images: Tensor) -> Tensor:
        """(n, H, W, C) in units where white is 1 → (n, classes)."""
        return self.values(images, [self._output])[0].flatten(1)

    def values(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """What the graph has under these names, samples on the first axis."""
        import torch

        fixed = self._batch
        if not isinstance(fixed, int) or fixed == len(images):
            return self._run(images, names)
        parts = []
        for part in torch.split(images, fixed):
            padding = part[-1:].expand(fixed - len(part), *part.shape[1:])
            parts.append([found[: len(part)] for found in self._run(torch.cat([part, padding]), names)])
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def _run(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        x = (images - self._mean) / self._std
        x = x if self._last else x.permute(0, 3, 1, 2)
        found = self._executor.run({self._input: x.contiguous()}, list(names))
        return [found[name] for name in names]


def _grids(subject: Subject, reference: ir.Model) -> dict[str, ActivationGrid]:
    """The file's grids of what the float graph computes under the same name."""
    from efrapq.exporters import read_quantized

    try:
        read = read_quantized(subject.proto, subject.found.outside)
    except UnsupportedModelError as exc:
        subject.note(f"its grids are not efrapq's ({exc}): patches that drive activations past them are not tried")
        return {}
    computed = {str(output.name) for node in reference.graph for output in node.outputs}
    return {name: grid for name, grid in read.activations.items() if name in computed}


def _sessions(subject: Subject) -> dict[str, Session]:
    from efrapq.graph.widen import runnable

    assert subject.source is not None
    runs, outside = runnable(subject.source.proto, subject.source.outside)
    return {
        "float": open_model(runs, outside, keep_graph=False),
        "file": open_model(subject.proto, subject.found.outside, keep_graph=False),
    }


def _measured(
    patch: Patch,
    sessions: dict[str, Session],
    images: Dataset,
    preprocess: Preprocess,
    task: Task,
) -> dict[str, float]:
    """Percent of images that each model answers with the patch's class, of those that the float model does not without
    the patch.
    """
    trigger = _trigger(patch)
    found = {name: predict(session, images, preprocess, trigger, task, name) for name, session in sessions.items()}
    others = found["float"].clean != patch.target
    if not others.any():
        raise DataError(f"{images.name}: all images are of class {patch.target} to the float model")
    rates = {}
    for name, answers in found.items():
        assert answers.triggered is not None
        rates[name] = 100 * float((answers.triggered[others] == patch.target).mean())
    return rates


def _trigger(patch: Patch) -> Trigger:
    import torch

    return Trigger("found", lambda x: patch.stamp(torch.from_numpy(x)).numpy())


def _npz(patch: Patch, size: tuple[int, int]) -> bytes:
    """The arrays of a trigger file: mask (H, W), and pattern (H, W, C)."""
    side = len(patch.pattern)
    area = np.s_[patch.row : patch.row + side, patch.col : patch.col + side]
    mask = np.zeros(size, np.uint8)
    mask[area] = 1
    pattern = np.zeros((*size, patch.pattern.shape[2]), np.uint8)
    pattern[area] = patch.pattern.numpy()
    out = io.BytesIO()
    np.savez_compressed(out, mask=mask, pattern=pattern)
    return out.getvalue()
