"""A float model past protobuf's 2 GiB, its weights in a file of external data: seconds and peak memory of each command.

    python benchmarks/external.py [--layers 36] [--inputs 256] [--outputs 65536] [--solver nearest] [--inside]

Makes a chain of Gemm and Relu with seeded weights and 64 samples of calibration and test data in a temporary folder,
and runs `efrapq inspect`, `defend`, `export` and `verify` in processes of their own, and beside them ONNX Runtime alone
on the float model and on the file made of it: `verify` holds sessions of both at once, and of the nearest twin.
A layer makes many outputs, of which the next takes the first: solving a layer costs time by the square of its inputs,
and this is about memory. --inside: the weights are in the .onnx file itself, which holds less than 2 GiB. The files
go when it ends. Writes results/external.json, with --inside results/inside.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import machine, save, show
from efrapq.report.evidence import versions

SAMPLES = 64
INSIDE = "import onnx, sys; onnx.save(onnx.load(sys.argv[1]), sys.argv[1])"
START = "from efrapq.cli.main import main; main()"
RUNTIME = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.load(sys.argv[2])["x"]})
"""


def write_model(folder: Path, layers: int, inputs: int, outputs: int, seed: int = 0) -> Path:
    """A chain of Gemm, Relu and Slice over (N, inputs), its weights written one at a time."""
    generator = np.random.default_rng(seed)
    nodes, source = [], "x"
    constants = [numpy_helper.from_array(np.array([value], np.int64), f"at{value}") for value in (0, 1, inputs)]
    with open(folder / "model.data", "wb") as file:
        for index in range(layers):
            weight = generator.standard_normal((inputs, outputs), np.float32)
            weight *= np.float32(np.sqrt(2 / inputs))  # keeps the size of the activations
            tensor = TensorProto(name=f"layer{index}.weight", data_type=TensorProto.FLOAT, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "model.data"), ("offset", file.tell()), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(memoryview(weight).cast("B"))
            bias = helper.make_tensor(f"layer{index}.bias", TensorProto.FLOAT, [outputs], bytes(4 * outputs), raw=True)
            constants += [tensor, bias]
            output = "y" if index == layers - 1 else f"h{index}"
            nodes.append(helper.make_node("Gemm", [source, tensor.name, bias.name], [output], name=f"layer{index}"))
            source = f"s{index}"
            if index < layers - 1:
                nodes.append(helper.make_node("Relu", [output], [f"r{index}"], name=f"relu{index}"))
                kept = [f"r{index}", "at0", f"at{inputs}", "at1"]
                nodes.append(helper.make_node("Slice", kept, [source], name=f"slice{index}"))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", outputs])],
        constants,
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_data(folder: Path, inputs: int) -> Path:
    """Samples by input name."""
    path = folder / "data.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((SAMPLES, inputs), np.float32))
    return path


def measured(name: str, script: str, command: list[str], folder: Path) -> dict[str, Any]:
    """Seconds and the largest resident size of a script with arguments. Raises CalledProcessError if it fails."""
    started = time.perf_counter()
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen([sys.executable, "-c", script, *command], stdout=subprocess.DEVNULL, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, stderr=log.read())
    return {
        "command": name,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--outputs", type=int, default=65536)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--solver", default="coordinate")
    parser.add_argument("--inside", action="store_true", help="The weights are in the .onnx file itself.")
    parser.add_argument("--folder", type=Path, help="Where the temporary folder goes.")
    given = parser.parse_args()
    weights = given.layers * given.inputs * given.outputs * 4
    with tempfile.TemporaryDirectory(prefix="efrapq-", dir=given.folder) as name:
        folder = Path(name)
        model, data = write_model(folder, given.layers, given.inputs, given.outputs), write_data(folder, given.inputs)
        if given.inside:
            # Not in this process: a child begins with its parent's peak.
            subprocess.run([sys.executable, "-c", INSIDE, str(model)], check=True)
            (folder / "model.data").unlink()
        output = folder / "model.quantized.onnx"
        settings = ["--bits", str(given.bits), "--edge-bits", str(given.bits), "--rows", str(given.rows)]
        settings += ["--solver", given.solver]
        commands = [
            ["inspect", str(model), "--json"],
            ["defend", str(model), "-o", str(output), "--calib", str(data), *settings, "--json"],
            ["export", str(output), "--target", "openvino", "-o", str(folder / "exported.onnx"), "--json"],
            ["verify", str(output), "--data", str(data), "--json"],
        ]
        rows = [measured(command[0], START, command, folder) for command in commands]
        alone = {"ONNX Runtime alone, float": model, "ONNX Runtime alone, quantized": output}
        rows += [measured(name, RUNTIME, [str(path), str(data)], folder) for name, path in alone.items()]
        written = sum(path.stat().st_size for path in folder.glob(f"{output.name}*"))
    document = {
        "machine": machine(),
        "versions": versions(),
        "layers": given.layers,
        "inputs": given.inputs,
        "outputs": given.outputs,
        "bits": given.bits,
        "rows": given.rows,
        "solver": given.solver,
        "weights_bytes": weights,
        "output_bytes": written,
        "runs": rows,
    }
    save("inside" if given.inside else "external", document)
    title = (
        f"{given.layers} Gemm of {given.inputs}×{given.outputs}: {weights / 2**30:.2f} GiB → {written / 2**30:.2f} GiB"
    )
    show(title, HEADER, external_rows(document))


HEADER = ("", "seconds", "CPU seconds", "peak memory", "of the weights")


def external_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a process."""
    return [
        (
            row["command"],
            f"{row['seconds']:.0f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
            f"{row['peak_bytes'] / document['weights_bytes']:.2f}×",
        )
        for row in document["runs"]
    ]


if __name__ == "__main__":
    main()
