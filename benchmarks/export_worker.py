"""One ONNX file in a process of its own, which runs it when it is told to: `export.py` starts one for each file.

    python benchmarks/export_worker.py MODEL.onnx INPUT.npy THREADS

Each line on its input is a number of runs; the answer is one line of JSON: the seconds of each run, after one that is
not counted, and the largest resident size of the process so far. It imports nothing that its memory would be blamed
for.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np
import onnxruntime as ort


def main() -> None:
    path, inputs, threads = sys.argv[1:4]
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 3
    started = time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter() - started
    feeds = {session.get_inputs()[0].name: np.load(inputs)}
    print(json.dumps({"load": loaded}), flush=True)
    for line in sys.stdin:
        session.run(None, feeds)
        seconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            session.run(None, feeds)
            seconds.append(time.perf_counter() - started)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "memory": memory}), flush=True)


if __name__ == "__main__":
    main()
