"""What a guard costs, and how many ordinary images it speaks up for: efrapq's int8 files with and without one.

    python benchmarks/guard.py [--networks NAME …] [--threads N …] [--quick]

The files of export.py (W8A8, the same networks and images), each timed in a process of its own, taking turns. What the
guard says of images that did not calibrate, and how often the file's answers are the float model's, with some headroom
and without, is of the networks whose weights are trained. Needs CIFAR-10 and the published models (see common.py). It
writes results/guard.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

import efrapq
from benchmarks.common import RESULTS, Network, machine, markdown, native, save, shared_folder, show
from benchmarks.export import BATCHES, CALIBRATION, ROUNDS, SECONDS, describe, setting, timed
from benchmarks.solver import NETWORKS, network
from efrapq.data import Dataset
from efrapq.loading import load
from efrapq.verification.session import open_session

FILES = ("float", "int8", "guarded")
HEADROOM = (1.0, 1.1, 1.25)
HEADROOM_HEADER = ["network", "images", "--headroom", "something clipped, %", "answers that are float's, %"]
# Images that did not calibrate.
TESTED = 2000


def make(name: str, folder: Path, images: int) -> dict[str, Any]:
    """Write the three files of a network, and say what the guard says of images that did not calibrate."""
    shared = shared_folder()
    assert shared is not None
    found = network(name, shared)
    shape = None if isinstance(found.model, Path) else found.input_shape
    order = np.random.default_rng(0).permutation(len(found.data))
    chosen = found.data.select(np.sort(order[:images]))
    others = found.data.select(np.sort(order[images : images + TESTED]))
    options: dict[str, Any] = {"calib": chosen, "calib_size": images, "preprocess": found.preprocess, "bits": 8}
    options |= {"input_shape": shape, "target": native()}
    data = {"float": load(found.model, input_shape=shape).proto.SerializeToString()}
    data["int8"] = efrapq.defend(found.model, **options).data
    data["guarded"] = efrapq.defend(found.model, guard=True, **options).data
    for file, content in data.items():
        (folder / f"{file}.onnx").write_bytes(content)
    np.save(folder / "input.npy", others.inputs(range(max(BATCHES)), found.preprocess))
    plain, _ = answers(data["int8"], found, others)
    guarded, _ = answers(data["guarded"], found, others)
    assert np.array_equal(plain, guarded)
    shares = {}
    if "published" in found.origin:
        expected, _ = answers(data["float"], found, others)
        for headroom in HEADROOM:
            made = efrapq.defend(found.model, guard=True, headroom=headroom, **options)
            classes, clipped = answers(made.data, found, others)
            same = 100 * float((classes.argmax(1) == expected.argmax(1)).mean())
            shares[f"{headroom:g}"] = {"clipped": 100 * float(clipped.mean()), "agreement": same}
    files = {file: describe(content) for file, content in data.items()}
    return {"title": found.name, "origin": found.origin, "files": files, "images": len(others), "headroom": shares}


def answers(data: bytes, found: Network, images: Dataset) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What a file answers to these images, and which of them it says something was clipped of."""
    session = open_session(data, keep_graph=False)
    parts = [session.answers(images.inputs(batch, found.preprocess)) for batch in images.batches(50)]
    flags = [np.zeros(len(logits), np.bool_) if clipped is None else clipped for logits, clipped in parts]
    return np.concatenate([logits for logits, _ in parts]), np.concatenate(flags)


def headroom_table() -> str:
    """What the guard says of ordinary images, as the threat model shows it."""
    document = json.loads((RESULTS / "guard.json").read_text())
    return markdown(HEADROOM_HEADER, headroom_rows(document))


def headroom_rows(document: dict[str, Any]) -> list[list[str]]:
    return [
        [found["title"], f"{found['images']:,}", headroom, f"{at['clipped']:.2f}", f"{at['agreement']:.2f}"]
        for found in document["networks"].values()
        for headroom, at in found["headroom"].items()
    ]


def table(document: dict[str, Any], threads: list[int]) -> None:
    rows = []
    for found in document["networks"].values():
        for count in threads:
            for batch in BATCHES:
                times = found["times"][setting(count, batch)]
                base, plain, guarded = (times[file]["median"] for file in FILES)
                rows.append(
                    [
                        found["title"],
                        count,
                        batch,
                        f"{1000 * plain:.2f}, {base / plain:.2f}×",
                        f"{1000 * guarded:.2f}, {base / guarded:.2f}×",
                        f"{guarded / plain:.3f}",
                    ]
                )
    header = ("network", "threads", "batch", "int8, ms, of float's speed", "with a guard", "guarded / int8")
    show("what a guard costs", header, rows)
    rows = [
        [
            found["title"],
            f"{found['files']['guarded']['bytes'] - found['files']['int8']['bytes']:,}",
            f"{found['files']['guarded']['integer']}/{found['files']['guarded']['float']}",
        ]
        for found in document["networks"].values()
    ]
    show("what it adds", ("network", "bytes", "kernels: integer/float"), rows)
    show("what it says of ordinary images", HEADROOM_HEADER, headroom_rows(document))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="few runs: whether it works at all; nothing is written")
    args = parser.parse_args()
    if shared_folder() is None:
        raise SystemExit("no development data: set EFRAPQ_SHARED to the folder with CIFAR-10 and the published models")
    document: dict[str, Any] = {"machine": machine(), "networks": {}}
    for name in args.networks:
        with tempfile.TemporaryDirectory(prefix="efrapq-") as folder:
            found = make(name, Path(folder), CALIBRATION.get(name, 512)) | {"times": {}}
            for threads in args.threads:
                for batch in BATCHES:
                    effort = (1.0, (2, 5)) if args.quick else (SECONDS / 2, ROUNDS)
                    found["times"][setting(threads, batch)] = timed(Path(folder), FILES, threads, batch, *effort)
            document["networks"][name] = found
            if not args.quick:
                save("guard", document)
    table(document, args.threads)


if __name__ == "__main__":
    main()
