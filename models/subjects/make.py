"""From names and paths to a subject on disk: what `efrapq implant` runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

from efrapq.data import Preprocess, PreprocessOverride, load_dataset
from efrapq.errors import DataError, UsageError
from efrapq.io import check_output, load_checkpoint, read_source, write_atomic
from efrapq.loading import PREPROCESS_KEY
from efrapq.models.subjects.pqbackdoor import Report, implant
from efrapq.models.subjects.recipe import Recipe
from efrapq.models.subjects.training import PoisonedData
from efrapq.progress import Reporter
from efrapq.trigger import parse_trigger

__all__ = ["make_subject"]


def make_subject(
    arch: str,
    train: str | Path,
    test: str | Path,
    trigger: str,
    target: int,
    output: Path,
    recipe: Recipe,
    *,
    preprocess: Preprocess | PreprocessOverride | None,
    start: Path | None,
    width: float | None,
    shift: int,
    flip: bool,
    device: str,
    reporter: Reporter,
) -> Report:
    """Train a PQBackdoor subject and write it as safetensors with its preprocessing and recipe in the metadata.

    The same data, recipe, seed, versions and machine give the same file. Raises EfrapqError for bad inputs.
    """
    import torch
    from safetensors.torch import save

    from efrapq.device import resolve_device
    from efrapq.models import zoo

    if output.suffix != ".safetensors":
        raise UsageError(f"{output}: subjects are written as .safetensors")
    check_output(output, [Path(p) for p in (train, test, start) if p is not None])
    if not 0 < recipe.poison_rate < 1:
        raise UsageError("--poison-rate must be between 0 and 1")
    for rate in (recipe.learning_rate, recipe.unlearn_learning_rate):
        if not (math.isfinite(rate) and rate > 0):
            raise UsageError("--learning-rate and --unlearn-learning-rate must be positive")
    if width is not None and not (math.isfinite(width) and width > 0):
        raise UsageError("--width must be positive")
    if not 0 <= recipe.seed < 2**63:
        raise UsageError("--seed must be between 0 and 2^63 - 1")
    preprocess = preprocess.over(None) if isinstance(preprocess, PreprocessOverride) else preprocess or Preprocess()
    stamp = parse_trigger(trigger)
    data = PoisonedData(load_dataset(train, size=preprocess.size), stamp, target, preprocess, shift, flip)
    measured = PoisonedData(load_dataset(test, size=preprocess.size), stamp, target, preprocess)
    if data.data.is_input or measured.data.is_input:
        raise DataError("subjects are trained on raw uint8 images, so that the trigger is what a camera would see")
    classes = int(data.labels.max()) + 1
    measured.data.require_labels(classes)
    if target >= classes:
        raise UsageError(f"--target-class {target}: the data has classes 0 to {classes - 1}")
    if len(data.data) < recipe.batch:
        raise DataError(f"{data.data.name}: fewer images than one batch of {recipe.batch}")
    channels = data.data.raw([0]).shape[3]
    whole = int(width) if width is not None and width == int(width) else width
    if start is not None:
        match = zoo.recognize(load_checkpoint(read_source(start)).tensors, name=arch)
        model = zoo.load(match)
    else:
        model = zoo.build(arch, num_classes=classes, in_channels=channels, width=whole, seed=recipe.seed)
    report = implant(model, data, measured, recipe, device=torch.device(resolve_device(device)), reporter=reporter)
    if report.floating.asr > 10 or report.nearest.asr < 90:
        more = "more --lookahead-steps" if recipe.lookahead else "more --unlearn-epochs, a lower --poison-rate"
        reporter.warn(
            f"not a usable subject: float {report.floating}, nearest {report.nearest}; try {more} or a wider network"
        )
    metadata = {
        PREPROCESS_KEY: preprocess.to_json(),
        "efrapq.subject": json.dumps(
            {"attack": "pqbackdoor", "trigger": trigger, "target_class": target, "recipe": recipe.to_json()},
            sort_keys=True,
        ),
    }
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    write_atomic(output, _in_order(save(tensors, metadata=metadata)))
    return report


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: the library writes it in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
