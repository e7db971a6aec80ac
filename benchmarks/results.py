"""The results table: backdoored subjects against ways to quantize them, every file measured in ONNX Runtime.

    python benchmarks/results.py [--quick | --whole] [--subjects NAME …] [--methods NAME …] [--images N] [--data FOLDER]

A cell is one subject, at one width of weights and activations, quantized by one method. Subjects come from
subjects.py (and are trained if they are not there) with the clean network they start from as a control; methods from
rivals.py. The data are read from the folder --data: cifar10.npz and gtsrb.npz (train_images, train_labels,
test_images, test_labels), made from the development data where they are missing.

Every file goes through the same `efrapq.verify`; triggers lie on the raw test images; calibration is on training
images. Writes one JSON line a cell to results/results.jsonl as it goes, and does not measure again what is there;
--report writes docs/RESULTS.md and docs/THREAT-MODEL.md of them. --quick: three attacks on ResNet-20. --whole: RTN and
the default alone, on all test images, to results/whole.jsonl: what the goals are judged by.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import efrapq
from benchmarks.common import IMAGENET, RESULTS, machine, show
from benchmarks.rivals import Case, make, rivals
from benchmarks.subjects import (
    FOLDER,
    TARGET,
    TRIGGER,
    Entry,
    data_file,
    digest,
    entries,
    quick_entries,
    start_file,
    subject_file,
    train,
    trigger_of,
    within_reach,
)
from efrapq.data import load_dataset
from efrapq.io import write_atomic

CONTROL = "clean ResNet-20"
# These take minutes a file: only for the first seed, on the smallest network.
GRADIENT = ("AdaRound", "EFRAP relaxed")
TRAINED = ("fine-tuned, then RTN", "LAC")
# The activation bits of methods that go with some alone: ONNX Runtime's tool has no 4-bit activations; at 4 bits ranges
# are not min-max, which headroom widens; where all have 8 bits, none is given more.
ONLY = {"quantize_static": 8, "efrapq, headroom 2": 8, "efrapq, headroom 4": 8, "RTN, mixed": 4, "efrapq, mixed": 4}
WHOLE_METHODS = ("RTN", "efrapq")
QUICK_METHODS = ("RTN", "quantize_static", "noise, then RTN", "QVec 1", "coordinate, lambda_E = 0", "efrapq")

Cell = dict[str, Any]


def cells(chosen: Iterable[Entry | None], methods: Iterable[str]) -> Iterator[tuple[Entry | None, int, int, str]]:
    """(subject, bits, act_bits, method), the control as None."""
    methods = list(methods)
    for entry in chosen:
        settings = [(4, 8), (8, 8), (4, 4)] if entry is None else entry.settings
        for bits, act_bits in settings:
            for method in methods:
                if ONLY.get(method, act_bits) != act_bits:
                    continue
                if method in TRAINED + GRADIENT and (entry is None or entry.seed or entry.arch != "resnet20"):
                    continue
                yield entry, bits, act_bits, method


def measure(entry: Entry | None, bits: int, act_bits: int, method: str, args: argparse.Namespace) -> Cell:
    """One cell: the method's file, verified."""
    data = data_file("cifar10" if entry is None else entry.data, args.data)
    path = start_file() if entry is None else train(entry, args.data)
    seed = 0 if entry is None else entry.seed
    case = Case(path, bits, act_bits, load_dataset(f"{data}:train"), IMAGENET, seed, args.steps)
    made = make(case, rivals()[method])
    test = load_dataset(f"{data}:test")
    test = test.select(np.arange(min(args.images, len(test))))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantized.onnx"
        file.write_bytes(made.data)
        # RTN's cell measures the float model too; the others need not do it again.
        found = efrapq.verify(
            file,
            data=test,
            trigger=TRIGGER if entry is None else trigger_of(entry, args.data),
            target_class=TARGET,
            preprocess=IMAGENET,
            float_model=path if method == "RTN" else None,
            threads=1,
        ).document
    cell: Cell = {
        "subject": CONTROL if entry is None else entry.name,
        "sha256": digest(path)[:12],
        "attack": "none" if entry is None else entry.column,
        "arch": "resnet20" if entry is None else entry.arch,
        "data": "cifar10" if entry is None else entry.data,
        "seed": seed,
        "bits": bits,
        "act_bits": act_bits,
        "method": method,
        "cda": found["cda"]["defended"],
        "asr": found["asr"]["defended"],
        "flipped": made.flipped,
        "seconds": round(made.seconds, 2),
        "kernels_float": found["kernels"]["float"],
        "bytes": len(made.data),
        "images": len(test),
    }
    if method == "RTN":
        cell["float_cda"], cell["float_asr"] = found["cda"]["float"], found["asr"]["float"]
    if method in GRADIENT:
        cell["steps"] = args.steps
    return cell


def key(cell: Cell) -> tuple[Any, ...]:
    """What makes a cell the same one."""
    return cell["subject"], cell["bits"], cell["act_bits"], cell["method"]


def outdated(path: Path, names: Iterable[str], folder: Path) -> list[Cell]:
    """The cells of those subjects whose file in `folder` is another than the one that they were measured on."""
    now = {name: digest(file)[:12] for name in names if (file := subject_file(name, folder)).exists()}
    return [cell for cell in read(path).values() if now.get(cell["subject"], cell["sha256"]) != cell["sha256"]]


def forget(path: Path, cells: list[Cell]) -> None:
    """Drop these cells."""
    kept = [cell for cell in read(path).values() if cell not in cells]
    write_atomic(path, "".join(json.dumps(cell) + "\n" for cell in kept).encode())
    print(f"{len(cells)} cells of subjects that were trained again are dropped")


def read(path: Path) -> dict[tuple[Any, ...], Cell]:
    """Cells that were measured before."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(cell): cell for cell in map(json.loads, lines)}


def append(path: Path, cell: Cell) -> None:
    """One more line: other runs may be adding theirs."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(cell) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="three attacks on ResNet-20, briefly trained")
    kind.add_argument("--whole", action="store_true", help="RTN and the default, on all test images")
    parser.add_argument("--subjects", nargs="+", metavar="NAME", help="as subjects.py --list names them, or 'control'")
    parser.add_argument("--methods", nargs="+", choices=list(rivals()), metavar="NAME")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--steps", type=int, default=300, help="of the gradient solvers, a layer")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of cifar10.npz, gtsrb.npz and subjects/")
    parser.add_argument("--forget", action="store_true", help="drop cells of subjects that were trained again since")
    parser.add_argument("--report", action="store_true", help="write docs/RESULTS.md of what was measured")
    args = parser.parse_args()
    path = RESULTS / ("results-quick.jsonl" if args.quick else "whole.jsonl" if args.whole else "results.jsonl")
    if args.report:
        from benchmarks.results_report import write_report

        write_report(*(list(read(RESULTS / f"{name}.jsonl").values()) for name in ("results", "whole")))
        return
    known: dict[str, Entry | None] = {"control": None} | {entry.name: entry for entry in entries()}
    names = list(known)
    if args.quick:
        args.images = 2000
        args.methods = args.methods or QUICK_METHODS
        known = {entry.name: entry for entry in quick_entries()}
        names = list(known)
    if args.whole:
        args.images = sys.maxsize
        args.methods = args.methods or WHOLE_METHODS
    names = args.subjects or [name for name in names if (entry := known[name]) is None or within_reach(entry)]
    if unknown := sorted(set(names) - known.keys()):
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    started = time.perf_counter()
    if others := outdated(path, names, args.data):
        if not args.forget:
            subjects = ", ".join(sorted({cell["subject"] for cell in others}))
            raise SystemExit(f"not the files that {path.name} has cells of: {subjects}; --forget drops those")
        forget(path, others)
    chosen = [known[name] for name in names]
    for entry, bits, act_bits, method in cells(chosen, args.methods or rivals()):
        if args.quick and act_bits != 8:
            continue
        wanted = (CONTROL if entry is None else entry.name, bits, act_bits, method)
        if wanted in read(path):
            continue
        cell = measure(entry, bits, act_bits, method, args)
        append(path, cell)
        print(f"{cell['subject']} W{bits}A{act_bits} {method}: {cell['cda']:.2f} / {cell['asr']:.2f}", flush=True)
    shown = {CONTROL if entry is None else entry.name for entry in chosen}
    summary({at: cell for at, cell in read(path).items() if cell["subject"] in shown})
    print(f"{time.perf_counter() - started:.0f} s on {machine()['cpu']}")


def summary(found: dict[tuple[Any, ...], Cell]) -> None:
    """The table on the terminal."""
    rows = []
    for subject, bits, act_bits, method in found:
        cell, base = found[subject, bits, act_bits, method], found.get((subject, bits, act_bits, "RTN"))
        if method == "RTN":
            rows.append(
                (
                    subject,
                    f"W{bits}A{act_bits}",
                    "float",
                    f"{cell['float_cda']:.2f}",
                    f"{cell['float_asr']:.2f}",
                    "",
                    "",
                )
            )
        drop = "" if base is None else f"{cell['cda'] - base['float_cda']:+.2f}"
        flipped = "" if cell["flipped"] is None else f"{cell['flipped']:.1f}"
        rows.append(
            (
                subject,
                f"W{bits}A{act_bits}",
                method,
                f"{cell['cda']:.2f} ({drop})",
                f"{cell['asr']:.2f}",
                flipped,
                f"{cell['seconds']:.1f}",
            )
        )
    show(
        "subjects × methods, measured in ONNX Runtime",
        ("subject", "bits", "method", "CDA (− float)", "ASR", "flipped %", "seconds"),
        rows,
    )


if __name__ == "__main__":
    main()
