"""How far ordinary networks amplify what an activation grid may round away, and what `defend --lift` does to them.

    python benchmarks/lift.py [--data FOLDER]

A channel's gain is how many steps of its output's grid a layer answers to one step of it (efrapq/calibration/lift.py).
Of every network at hand, as float model on 512 calibration images (ImageNet: 128): the gains of all channels whose size
is free, those of channels at rest, and which are lifted. Needs the published models (see common.py); clean networks and
subjects are those that lie in FOLDER/subjects. Writes results/lift.json, which `results.py --report` puts into
docs/THREAT-MODEL.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.common import IMAGENET, RESULTS, imagenet_mobilenet, machine, markdown, save, shared_folder, show
from benchmarks.subjects import FOLDER, data_file, entries, start_file, subject_file
from efrapq.calibration.inputs import input_shape, real_inputs
from efrapq.calibration.lift import GAIN, _Gains, choose_lift
from efrapq.data import Dataset, load_dataset
from efrapq.graph.layers import find_layers
from efrapq.graph.placement import place
from efrapq.graph.prepare import prepare
from efrapq.loading import load
from efrapq.preprocess import Preprocess

HEADER = ["network", "channels", "gain: median", "99th percentile", "largest", "at rest", "largest of these", "lifted"]
IMAGES, IMAGENET_IMAGES = 512, 128
PUBLISHED = ("published ResNet-20", "ImageNet MobileNetV2")


def networks(folder: Path) -> Iterator[tuple[str, Path, Dataset, Preprocess]]:
    """Name, file, images and preprocessing: what was published, clean networks, subjects."""
    shared = shared_folder()
    assert shared is not None
    cifar = load_dataset(f"{data_file('cifar10', folder)}:train")
    yield PUBLISHED[0], start_file(), cifar, IMAGENET
    found = imagenet_mobilenet(shared)
    assert isinstance(found.model, Path)
    yield PUBLISHED[1], found.model, found.data.subset(IMAGENET_IMAGES, 0), found.preprocess
    for entry in sorted(entries(), key=lambda entry: entry.attack != "none"):
        path = subject_file(entry.name, folder)
        if path.exists():
            data = cifar if entry.data == "cifar10" else load_dataset(f"{data_file(entry.data, folder)}:train")
            yield entry.name, path, data, IMAGENET


def measure(path: Path, data: Dataset, preprocess: Preprocess) -> dict[str, Any]:
    """The gains of one float model."""
    source = load(path)
    model = prepare(source.proto, source.outside)
    layers, _ = find_layers(model.graph)
    images, _ = real_inputs(data.subset(IMAGES, 0), input_shape(model, source.name), preprocess, source.name)
    placement, device = place(model.graph, layers, 8), torch.device("cpu")
    found = _Gains(model, layers, placement, images, device)
    gain = np.concatenate([found._gain(span, {}) for span in found.spans])
    rest = np.concatenate([found._at_rest(span) for span in found.spans])
    lifted = choose_lift(model, layers, placement, images, device)
    return {
        "channels": len(gain),
        "median": float(np.median(gain)),
        "percentile_99": float(np.quantile(gain, 0.99)),
        "largest": float(gain.max()),
        "at_rest": int(rest.sum()),
        "largest_at_rest": float(gain[rest].max(initial=0)),
        "lifted": lifted.channels,
        "lifted_at_rest": lifted.hidden,
        "left": lifted.left[0],
    }


def rows(document: dict[str, Any], names: list[str]) -> list[list[str]]:
    return [
        [
            name,
            f"{found['channels']:,}",
            f"{found['median']:.2f}",
            f"{found['percentile_99']:.2f}",
            f"{found['largest']:,.1f}",
            f"{found['at_rest']:,}",
            f"{found['largest_at_rest']:,.2f}" if found["at_rest"] else "–",
            f"{found['lifted']:,}",
        ]
        for name in names
        if (found := document["networks"].get(name)) is not None
    ]


def tables() -> dict[str, str]:
    """The networks that hide nothing in a step, by name or all together, and the one that does."""
    document = json.loads((RESULTS / "lift.json").read_text())
    hiding = [name for name in document["networks"] if "adaptive-step" in name]
    named = [name for name in document["networks"] if name in PUBLISHED or "clean" in name or name in hiding]
    others = [found for name, found in document["networks"].items() if name not in named]
    summary = (
        f"{len(others)} subjects of the other attacks: the largest gain of any of their channels is "
        f"{max(found['largest'] for found in others):.1f}, of any at rest "
        f"{max(found['largest_at_rest'] for found in others):.2f}; {sum(found['lifted'] > 0 for found in others)} of "
        "them have channels that are lifted."
    )
    return {"gains": markdown(HEADER, rows(document, named)), "gains_others": summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, metavar="FOLDER")
    args = parser.parse_args()
    if shared_folder() is None:
        raise SystemExit("no development data: set EFRAPQ_SHARED to the folder with the published models")
    document: dict[str, Any] = {"machine": machine(), "gain": GAIN, "networks": {}}
    for name, path, data, preprocess in networks(args.data):
        document["networks"][name] = measure(path, data, preprocess)
        save("lift", document)
    show("gains of channels", HEADER, rows(document, list(document["networks"])))


if __name__ == "__main__":
    main()
