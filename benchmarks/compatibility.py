"""Which models of other people's efrapq quantizes, and what comes out.

    python benchmarks/compatibility.py FOLDER [--only NAME …] [--bits 8] [--images 32] [--page]

Every .onnx file in FOLDER is defended for this CPU (8-bit activations) in a process of its own with a time limit, and
the result is run in ONNX Runtime beside the float file, on samples that did not calibrate it. Samples: NAME.calib.npz
beside the model, one array per input of the model in its layout (samples on the batch axis, mostly the first); without
it the model gets photographs (see common.py), resized to what it takes. FOLDER/sources.json says, by file name, where
a model comes from: {"source", "licence"}, and for photographs {"mean", "std", "size", "trained"}, all optional.
Writes results/compatibility.json as it goes; --page writes docs/COMPATIBILITY.md from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

import efrapq
from benchmarks.common import RESULTS, machine, markdown, native, save, shared_folder, show, write_page
from benchmarks.encoder import HEADER as ENCODER
from benchmarks.encoder import encoder_rows
from benchmarks.external import HEADER as EXTERNAL
from benchmarks.external import external_rows
from benchmarks.sentences import HEADER as SENTENCES
from benchmarks.sentences import sentence_rows
from efrapq.calibration.arrays import Arrays, arrays_for
from efrapq.calibration.signature import ModelInput, model_inputs, takes_images
from efrapq.data import Dataset, load_dataset
from efrapq.errors import EfrapqError
from efrapq.graph.layers import find_layers
from efrapq.graph.prepare import prepare
from efrapq.preprocess import Preprocess
from efrapq.verification.kernels import report_kernels
from efrapq.verification.session import open_session

DYNAMIC_SIZE = 224
BITS = (8, 4)

Array = NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """Inputs of a model by name; calibration and test samples have nothing in common. kind: what they are, in words.
    count: of those that calibrate.
    """

    calibration: Dataset | dict[str, Array]
    test: Arrays
    kind: str
    count: int


def samples_for(path: Path, inputs: Sequence[ModelInput], count: int, about: Mapping[str, Any]) -> Samples:
    """Named arrays from beside the model, or photographs."""
    beside = path.with_name(f"{path.stem}.calib.npz")
    if beside.exists():
        with np.load(beside) as file:
            arrays = {given.name: file[given.name] for given in inputs}
        whole = arrays_for(arrays, inputs)
        # As many calibrate as test where there are few.
        calibrate = min(count, len(whole) // 2)
        first, rest = whole.take(np.arange(calibrate)), whole.take(np.arange(calibrate, len(whole)))
        return Samples({**first.by_sample, **first.whole}, rest, "arrays", calibrate)
    folder = shared_folder()
    if folder is None or not takes_images(inputs):
        raise SystemExit(f"{path.name}: no samples: put {beside.name} beside it, or set EFRAPQ_SHARED for photographs")
    photographs = images(folder, inputs[0], 2 * count, about)
    # Datasets of images have their channels first; any other input goes by its name.
    channels_last = photographs.shape[3] in (1, 3)
    calibration = photographs[:count]
    return Samples(
        {inputs[0].name: calibration} if channels_last else Dataset.from_arrays(calibration, None, "photographs"),
        arrays_for({inputs[0].name: photographs[count:]}, inputs),
        "photographs",
        len(calibration),
    )


def images(folder: Path, given: ModelInput, count: int, about: Mapping[str, Any]) -> NDArray[np.float32]:
    """`count` photographs of all classes as the model takes them, in an order that mixes the classes."""
    assert given.dims is not None
    channels_last = given.dims[3] in (1, 3) and given.dims[1] not in (1, 3)
    channel_axis, first = (3, 1) if channels_last else (1, 2)
    size = about.get("size", DYNAMIC_SIZE)
    height, width = (d if isinstance(d, int) else size for d in given.dims[first : first + 2])
    data = load_dataset(folder / "imagenette", size=(height, width), channels=1 if given.dims[channel_axis] == 1 else 3)
    preprocess = Preprocess(tuple(about.get("mean", (0.0,))), tuple(about.get("std", (1.0,))))
    order = np.random.default_rng(0).permutation(len(data))[:count]
    x = data.inputs([int(i) for i in order], preprocess)
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if channels_last else x


def run(data: bytes, test: Arrays) -> tuple[dict[str, Array], onnx.ModelProto]:
    """All outputs over all test samples, and the graph as ONNX Runtime optimized it."""
    session = open_session(data, threads=1)
    names = [str(o.name) for o in session.raw.get_outputs()]
    chunks = test.chunks()
    counts = [test.count(chunk) for chunk in chunks]
    outputs = zip(*(session.raw.run(None, chunk) for chunk in chunks), strict=True)
    return {name: joined(parts, counts) for name, parts in zip(names, outputs, strict=True)}, session.optimized


def joined(parts: Sequence[Array], counts: Sequence[int]) -> Array:
    """An output of all runs, on its first axis that has as many entries in each as the run has samples; that comes to
    the front. An output without one is joined as it is.
    """
    parts = [np.atleast_1d(part) for part in parts]
    fit = (a for a in range(parts[0].ndim) if all(p.shape[a] == c for p, c in zip(parts, counts, strict=True)))
    axis = next(fit, 0)
    return np.concatenate([np.moveaxis(part, axis, 0) for part in parts])


def compared(reference: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, Any]:
    """Each output beside the float one: cosine, and the error's norm relative to the output's and to what of the
    output differs between samples. agreement: of the first output's largest class, percent, where it is (N, classes).
    """
    outputs = {}
    for name, wanted in reference.items():
        a, b = wanted.astype(np.float64), found[name].astype(np.float64)
        error, norm = float(np.linalg.norm(b - a)), float(np.linalg.norm(a))
        spread = float(np.linalg.norm(a - a.mean(0)))
        product = norm * float(np.linalg.norm(b))
        outputs[name] = {
            "shape": list(a.shape),
            "finite": bool(np.isfinite(b).all()),
            "cosine": ratio(float((a * b).sum()), product),
            "error": ratio(error, norm),
            "error_of_spread": ratio(error, spread),
        }
    first = next(iter(reference))
    classes = reference[first]
    agreement = None
    if classes.ndim == 2 and classes.shape[1] > 1:
        agreement = 100 * float((classes.argmax(1) == found[first].argmax(1)).mean())
    return {"outputs": outputs, "agreement": agreement, "compared": len(classes)}


def ratio(a: float, b: float) -> float | None:
    """a / b; None where that is no number: JSON has none for it."""
    return a / b if b and np.isfinite(a / b) else None


def operators(graph: onnx.GraphProto) -> Counter[str]:
    """Nodes by operator, those of subgraphs among them."""
    found: Counter[str] = Counter()
    for node in graph.node:
        found[node.op_type] += 1
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found += operators(inner)
    return found


def describe(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """What can be said of a file before anything is done to it."""
    data = path.read_bytes()
    proto = onnx.load_from_string(data)
    return {
        "source": about.get("source", ""),
        "licence": about.get("licence", ""),
        "trained": bool(about.get("trained", True)),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "opset": next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None),
        "operators": dict(sorted(operators(proto.graph).items())),
    }


def attempt(path: Path, bits: int, count: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """Defend one model and run the result. A refusal is a result too; what is no EfrapqError is left to rise."""
    proto = onnx.load(path)
    started = time.perf_counter()
    try:
        samples = samples_for(path, model_inputs(proto, path.name), count, about)
        started = time.perf_counter()
        made = efrapq.defend(path, calib=samples.calibration, calib_size=count, bits=bits, target=native())
    except EfrapqError as exc:
        return {"outcome": "refused", "error": type(exc).__name__, "message": str(exc).replace(f"{path.parent}/", "")}
    seconds = time.perf_counter() - started
    _, skipped = find_layers(prepare(proto).graph)
    reference, _ = run(path.read_bytes(), samples.test)
    found, optimized = run(made.data, samples.test)
    kernels = report_kernels(optimized)
    return {
        "outcome": "quantized",
        "samples": {"kind": samples.kind, "calibration": samples.count},
        "layers": len(made.quantized.layers),
        "float_activations": sum(layer.input not in made.quantized.activations for layer in made.quantized.layers),
        "skipped": dict(Counter(f"{s.op_type}: {s.reason}" for s in skipped)),
        "kernels": {
            "integer": kernels.integer,
            "float": kernels.float,
            "reasons": dict(Counter(f"{u.op}: {u.reason}" for u in kernels.unfused)),
        },
        "seconds": round(seconds, 1),
        "bytes": len(made.data),
        **compared(reference, found),
    }


def child(path: Path, bits: int, count: int, timeout: float) -> dict[str, Any]:
    """`attempt` in a process of its own: whatever it does there, the others are tried."""
    command = [sys.executable, __file__, str(path.parent), "--one", path.name, "--bits", str(bits)]
    command += ["--images", str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"outcome": "timeout", "message": f"not done after {timeout:.0f} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    lines = done.stderr.strip().splitlines()
    return {
        "outcome": "crash",
        "error": "signal" if done.returncode < 0 else "exception",
        "message": lines[-1] if lines else f"exit status {done.returncode}",
        "traceback": lines[-12:],
    }


# Tables.

SETTINGS = {8: "W8A8", 4: "W4A8"}
HEADER = (
    "model",
    "layers",
    "left float",
    "kernels integer/float",
    "top-1 agreement, %",
    "cosine",
    "error",
    "error / spread",
    "size",
    "s",
)


def tables(models: Mapping[str, Any]) -> dict[str, tuple[Sequence[str], list[list[str]]]]:
    """Title → header and rows."""
    shown: dict[str, tuple[Sequence[str], list[list[str]]]] = {
        "tried": (
            ("file", "source", "licence", "opset", "KiB", "sha256"),
            [
                [name, m["source"], m["licence"], str(m["opset"]), f"{m['bytes'] / 1024:,.0f}", f"`{m['sha256'][:16]}`"]
                for name, m in models.items()
            ],
        )
    }
    for bits in BITS:
        rows = [row(name, m, m["runs"][str(bits)]) for name, m in models.items() if str(bits) in m["runs"]]
        shown[f"int{bits}"] = (
            HEADER,
            [r for r in rows if r],
        )
    for key in ("skipped", "kernels"):
        shown[key] = (("reason", "nodes", "models"), reasons(models, key))
    shown["refused"] = (
        ("model", "setting", "outcome", "what it says"),
        [
            [name, SETTINGS[int(bits)], r["outcome"], r["message"].replace("|", "\\|")]
            for name, m in models.items()
            for bits, r in m["runs"].items()
            if r["outcome"] != "quantized"
        ],
    )
    return shown


def row(name: str, model: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One model's line; empty if it was not quantized. Cosine and errors are of the first output."""
    if found["outcome"] != "quantized":
        return []
    first = next(iter(found["outputs"].values()))
    agreement = "–" if found["agreement"] is None else f"{found['agreement']:.1f}"
    return [
        name.removesuffix(".onnx") + ("" if model["trained"] else " ¹"),
        str(found["layers"]),
        str(sum(found["skipped"].values())),
        f"{found['kernels']['integer']}/{found['kernels']['float']}",
        agreement,
        *("–" if first[k] is None else f"{first[k]:.4f}" for k in ("cosine", "error", "error_of_spread")),
        f"{found['bytes'] / model['bytes']:.3f}",
        f"{found['seconds']:.0f}",
    ]


def reasons(models: Mapping[str, Any], key: str) -> list[list[str]]:
    """Why nodes are left float (skipped) or run in float (kernels), most frequent first, of the W8A8 files."""
    nodes: Counter[str] = Counter()
    where: dict[str, list[str]] = {}
    for name, model in models.items():
        found = model["runs"].get("8", {})
        if found.get("outcome") != "quantized":
            continue
        counted = found["skipped"] if key == "skipped" else found["kernels"]["reasons"]
        for reason, number in counted.items():
            nodes[reason] += number
            where.setdefault(reason, []).append(name.removesuffix(".onnx"))
    return [[reason, str(number), ", ".join(where[reason])] for reason, number in nodes.most_common()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these files, with or without .onnx")
    parser.add_argument("--bits", type=int, choices=BITS, default=8)
    parser.add_argument("--images", type=int, default=32, help="calibration samples")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds a model")
    parser.add_argument("--page", action="store_true", help="write docs/COMPATIBILITY.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    listed = args.folder / "sources.json"
    sources = json.loads(listed.read_text()) if listed.exists() else {}
    if args.one:
        print(json.dumps(attempt(args.folder / args.one, args.bits, args.images, sources.get(args.one, {}))))
        return
    wanted = {name.removesuffix(".onnx") for name in args.only or ()}
    paths = [p for p in sorted(args.folder.glob("*.onnx")) if not wanted or p.stem in wanted]
    if wanted - {p.stem for p in paths}:
        raise SystemExit(f"{args.folder}: has no {', '.join(sorted(wanted - {p.stem for p in paths}))}")
    result = RESULTS / "compatibility.json"
    document = json.loads(result.read_text()) if result.exists() else {"models": {}}
    document |= {"machine": machine() | {"onnxruntime": onnxruntime.__version__}, "images": args.images}
    for path in paths:
        known = document["models"].get(path.name, {"runs": {}})
        about = describe(path, sources.get(path.name, {}))
        # What was found of another file of this name says nothing of this one.
        runs = known["runs"] if known.get("sha256") == about["sha256"] else {}
        runs[str(args.bits)] = child(path, args.bits, args.images, args.timeout)
        document["models"][path.name] = about | {"runs": runs}
        document["models"] = dict(sorted(document["models"].items()))
        save(result.stem, document)
        print(f"{path.name}: {runs[str(args.bits)]['outcome']} {runs[str(args.bits)].get('message', '')}", flush=True)
    shown = tables(document["models"])
    for title, (header, rows) in shown.items():
        show(title, header, rows)
    if args.page:
        pages = {title: markdown(*table) if table[1] else "Nothing measured." for title, table in shown.items()}
        pages["encoder"] = markdown(ENCODER, encoder_rows(json.loads((RESULTS / "encoder.json").read_text())))
        pages["sentences"] = markdown(SENTENCES, sentence_rows(json.loads((RESULTS / "sentences.json").read_text())))
        for name in ("external", "inside"):
            pages[name] = markdown(EXTERNAL, external_rows(json.loads((RESULTS / f"{name}.json").read_text())))
        write_page("COMPATIBILITY", pages)


if __name__ == "__main__":
    main()
