"""What the exported files are worth in ONNX Runtime: speed, size, kernels and agreement, side by side in one run.

    python benchmarks/export.py [--quick] [--networks NAME …] [--threads N …] [--target ort-avx2]

Of each network: the float file, the int8 file that ONNX Runtime's quantize_static makes of it, and efrapq's int8 and
int4 files for --target (W8A8, W4A8), all calibrated on the same images. Every file is timed in a process of its own;
the processes take turns, a few runs each, so that what else the machine does hits all alike. Agreement with the float
file is of ImageNet MobileNetV2, whose weights are trained. How far a file's outputs are from what its graph says is
taken from the same file without optimizations, whose arithmetic is float: without VNNI sums of integers can saturate.
Needs CIFAR-10 and the published models (see common.py). Writes results/export.json as it goes, for ort-avx2
results/export-avx2.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

import efrapq
from benchmarks.common import RESULTS, Network, machine, save, shared_folder, show
from benchmarks.solver import NETWORKS, network
from efrapq.data import Dataset
from efrapq.graph.prepare import prepare
from efrapq.loading import load
from efrapq.verification.kernels import report_kernels
from efrapq.verification.ort_static import quantize_with_ort
from efrapq.verification.session import open_session

FILES = ("float", "quantize_static", "int8", "int4")
TITLES = {"quantize_static": "quantize_static int8", "int8": "efrapq int8", "int4": "efrapq int4"}
BATCHES = (1, 32)
CALIBRATION = {"imagenet-mobilenetv2": 128}
# Of one file in one turn; a run ahead of them is not counted.
RUNS = 3
# For worker threads of the file before to stop waiting for work.
PAUSE = 0.01
# Of one setting of threads and batch.
SECONDS = 30.0
ROUNDS = (10, 100)
# Medians of one file measured twice differ by as much.
NOISE = 0.02


def make(name: str, target: Path, images: int, runtime: str) -> dict[str, Any]:
    """Write the four files of a network, and what can be said of them without a clock."""
    folder = shared_folder()
    assert folder is not None
    found = network(name, folder)
    own = not isinstance(found.model, Path)
    shape = found.input_shape if own else None
    calibration = _positions(len(found.data), images)
    chosen = found.data.select(calibration)
    proto = load(found.model, input_shape=shape).proto
    (target / "float.onnx").write_bytes(proto.SerializeToString())
    batches = [chosen.inputs(batch, found.preprocess) for batch in chosen.batches(32)]
    static = quantize_with_ort(ir.to_proto(prepare(proto)), batches, 8)
    (target / "quantize_static.onnx").write_bytes(static)
    for bits in (8, 4):
        made = efrapq.defend(
            found.model,
            calib=chosen,
            calib_size=images,
            preprocess=found.preprocess,
            input_shape=shape,
            bits=bits,
            target=runtime,
        )
        (target / f"int{bits}.onnx").write_bytes(made.data)
    x = found.data.inputs(range(max(BATCHES)), found.preprocess)
    np.save(target / "input.npy", x)
    files = {}
    for file in FILES:
        data = (target / f"{file}.onnx").read_bytes()
        files[file] = describe(data) | {"signal_to_error_db": fidelity(data, x)}
    if name == "imagenet-mobilenetv2":
        agreement(found, target, calibration, files)
    return {"title": found.name, "origin": found.origin, "images": images, "files": files}


def _positions(count: int, images: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(0).permutation(count)[:images])


def describe(data: bytes) -> dict[str, Any]:
    """A file's size, and what ONNX Runtime executes: heavy kernels, Q/DQ nodes and all other operators."""
    optimized = open_session(data, threads=1).optimized
    kernels = report_kernels(optimized)
    ops = Counter(node.op_type for node in optimized.graph.node)
    inputs = {v.name for v in optimized.graph.input}
    entry = sum(n.op_type == "QuantizeLinear" and n.input[0] in inputs for n in optimized.graph.node)
    return {
        "bytes": len(data),
        "integer": kernels.integer,
        "float": kernels.float,
        # The QuantizeLinear at the input has to be.
        "qdq": ops["QuantizeLinear"] + ops["DequantizeLinear"] - entry,
        "operators": dict(sorted(ops.items())),
    }


def fidelity(data: bytes, x: NDArray[np.float32]) -> float:
    """The file's outputs against those that it has without optimizations, signal to error in dB."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    wanted = plain.run(None, {plain.get_inputs()[0].name: x})[0].astype(np.float64)
    error = np.square(open_session(data).logits(x) - wanted).sum()
    return float(10 * np.log10(np.square(wanted).sum() / max(error, 1e-30)))


def agreement(found: Network, target: Path, calibration: NDArray[np.int64], files: dict[str, Any]) -> None:
    """Top-1 agreement with the float file, over the images that calibrated and over the others."""
    inside = np.isin(np.arange(len(found.data)), calibration)
    classes = {file: predictions((target / f"{file}.onnx").read_bytes(), found.data, found) for file in FILES}
    for file in FILES:
        same = classes[file] == classes["float"]
        files[file]["agreement"] = {
            "calibration": 100 * float(same[inside].mean()),
            "held_out": 100 * float(same[~inside].mean()),
            "images": [int(inside.sum()), int((~inside).sum())],
        }


def predictions(data: bytes, images: Dataset, found: Network) -> NDArray[np.int64]:
    session = open_session(data)
    batches = images.batches(50)
    return np.concatenate([session.logits(images.inputs(batch, found.preprocess)).argmax(1) for batch in batches])


# Timing.


class Worker:
    """A file in a process of its own."""

    def __init__(self, path: Path, inputs: Path, threads: int) -> None:
        script = Path(__file__).with_name("export_worker.py")
        command = [sys.executable, str(script), str(path), str(inputs), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.memory = 0
        self.load = float(self._answer()["load"])

    def turn(self, runs: int) -> None:
        time.sleep(PAUSE)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{runs}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.seconds += answer["seconds"]
        self.memory = answer["memory"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))}: ended with {self.process.wait()}")
        return dict(json.loads(line))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def timed(
    target: Path, files: Sequence[str], threads: int, batch: int, seconds: float, rounds: tuple[int, int]
) -> dict[str, Any]:
    """All these files of a network, taking turns."""
    inputs = target / f"input{batch}.npy"
    np.save(inputs, np.load(target / "input.npy")[:batch])
    with ExitStack() as stack:
        workers = {file: stack.enter_context(Worker(target / f"{file}.onnx", inputs, threads)) for file in files}
        for worker in workers.values():
            worker.turn(1)
        one = (RUNS + 1) * sum(worker.seconds[0] for worker in workers.values())
        count = int(np.clip(seconds / one, *rounds))
        for worker in workers.values():
            worker.seconds.clear()
        for _ in range(count):
            for worker in workers.values():
                worker.turn(RUNS)
        return {
            file: {
                "median": float(np.median(worker.seconds)),
                "min": min(worker.seconds),
                "runs": len(worker.seconds),
                "load": worker.load,
                "memory": worker.memory,
            }
            for file, worker in workers.items()
        }


# Tables.


def tables(document: dict[str, Any], networks: list[str], threads: list[int]) -> None:
    measured = {name: document["networks"][name] for name in networks}
    for count in threads:
        rows = []
        for found in measured.values():
            for batch in BATCHES:
                times = found["times"][setting(count, batch)]
                base = times["float"]["median"]
                row = [found["title"], batch]
                for file in FILES:
                    t = times[file]
                    faster = "" if file == "float" else f", {base / t['median']:.2f}×"
                    row.append(f"{1000 * t['median']:.2f} ({1000 * t['min']:.2f}){faster}")
                rows.append([*row, f"{times['int4']['median'] / times['int8']['median']:.3f}"])
        header = ("network", "batch", *(TITLES.get(file, file) for file in FILES), "int4 / int8")
        plural = "" if count == 1 else "s"
        show(f"{count} thread{plural}: median (shortest) of a batch, ms; times faster than float", header, rows)
    rows = []
    for found in measured.values():
        files = found["files"]
        sizes = [f"{files[f]['bytes'] / 1024:,.0f}" for f in FILES]
        shares = [f"{files[f]['bytes'] / files['float']['bytes']:.3f}" for f in FILES[1:]]
        rows.append([found["title"], sizes[0], *(f"{s} ({r})" for s, r in zip(sizes[1:], shares, strict=True))])
    show("size, KiB (share of float)", ("network", *(TITLES.get(file, file) for file in FILES)), rows)
    rows = [
        [found["title"], *(f"{d['integer']}/{d['float']}, {d['qdq']}" for d in (found["files"][f] for f in FILES[1:]))]
        for found in measured.values()
    ]
    show("kernels: integer/float, Q/DQ nodes left inside", ("network", *(TITLES[f] for f in FILES[1:])), rows)
    rows = [
        [found["title"], *(f"{found['files'][f]['signal_to_error_db']:.1f}" for f in FILES[1:])]
        for found in measured.values()
    ]
    title = "outputs against those of the same file without optimizations, signal to error, dB"
    show(title, ("network", *(TITLES[f] for f in FILES[1:])), rows)
    if "imagenet-mobilenetv2" in measured:
        files = measured["imagenet-mobilenetv2"]["files"]
        inside, outside = files["float"]["agreement"]["images"]
        rows = [
            [TITLES[f], f"{files[f]['agreement']['held_out']:.2f}", f"{files[f]['agreement']['calibration']:.2f}"]
            for f in FILES[1:]
        ]
        header = ("file", f"{outside} held-out images", f"{inside} calibration images")
        show("ImageNet MobileNetV2: top-1 agreement with float, %", header, rows)
    show("goals", ("goal", "measured", "met"), goals(measured, threads))


def goals(measured: dict[str, Any], threads: list[int]) -> list[tuple[str, str, str]]:
    """What was aimed at beside what was found."""
    times = {
        (name, count, batch): found["times"][setting(count, batch)]
        for name, found in measured.items()
        for count in threads
        for batch in BATCHES
    }

    def ratio(a: str, b: str, times: dict[tuple[str, int, int], Any]) -> list[float]:
        return [t[a]["median"] / t[b]["median"] for t in times.values()]

    found = []
    resnet18 = {key: t for key, t in times.items() if key[0] == "resnet18-cifar"}
    if resnet18:
        least = min(ratio("float", "int8", resnet18))
        found.append(("int8 at least 2× as fast as float on ResNet-18", f"{least:.2f}× at least", yes(least >= 2)))
    most = max(ratio("int4", "int8", times))
    found.append(("int4 within 5 % of int8", f"{most:.3f} at most", yes(most <= 1.05)))
    most = max([*ratio("int8", "quantize_static", times), *ratio("int4", "quantize_static", times)])
    words = f"never slower than quantize_static's file (by more than {100 * NOISE:.0f} %, which is noise)"
    found.append((words, f"{most:.3f} of its time at most", yes(most <= 1 + NOISE)))
    most = max(f["files"]["int4"]["bytes"] / f["files"]["float"]["bytes"] for f in measured.values())
    found.append(("int4 file at most 0.14 of float", f"{most:.3f} at most", yes(most <= 0.14)))
    if "imagenet-mobilenetv2" in measured:
        least = measured["imagenet-mobilenetv2"]["files"]["int8"]["agreement"]["held_out"]
        found.append(("ImageNet MobileNetV2 W8A8 agreement 97 %", f"{least:.2f} % held out", yes(least >= 97)))
    return found


def yes(met: bool) -> str:
    return "yes" if met else "no"


def setting(threads: int, batch: int) -> str:
    return f"threads {threads}, batch {batch}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-20, few images and runs: whether it works at all")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--target", choices=("ort-x86", "ort-avx2"), default="ort-x86", help="of efrapq's files")
    parser.add_argument("--make", nargs=3, metavar=("NAME", "FOLDER", "IMAGES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        print(json.dumps(make(args.make[0], Path(args.make[1]), int(args.make[2]), args.target)))
        return
    if shared_folder() is None:
        raise SystemExit("no development data: set EFRAPQ_SHARED to the folder with CIFAR-10 and the published models")
    networks = ["resnet20"] if args.quick else args.networks
    suffix = args.target.removeprefix("ort").removesuffix("-x86") + ("-quick" if args.quick else "")
    path = RESULTS / f"export{suffix}.json"
    document = json.loads(path.read_text()) if path.exists() else {"networks": {}}
    document |= {"machine": machine() | {"onnxruntime": ort.__version__}}
    for name in networks:
        images = 64 if args.quick else CALIBRATION.get(name, 512)
        with tempfile.TemporaryDirectory(prefix="efrapq-") as folder:
            command = [sys.executable, __file__, "--target", args.target, "--make", name, folder, str(images)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{name}: {done.stderr}")
            document["networks"][name] = json.loads(done.stdout.splitlines()[-1]) | {"times": {}}
            for threads in args.threads:
                for batch in BATCHES:
                    found = timed(
                        Path(folder), FILES, threads, batch, *((1.0, (2, 5)) if args.quick else (SECONDS, ROUNDS))
                    )
                    document["networks"][name]["times"][setting(threads, batch)] = found
                    save(path.stem, document)
    tables(document, networks, args.threads)


if __name__ == "__main__":
    main()
