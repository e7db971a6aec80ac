"""What is installed here, what of it works, and what to do about the rest.

The dependencies' usual failures are silent: two builds of ONNX Runtime overwrite each other, and a CUDA provider that
is listed need not load. So nothing is believed that can be tried.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from efrapq.cpu import describe_cpu
from efrapq.io.text import printable

__all__ = ["CudaDevice", "Diagnosis", "Problem", "examine"]

# Package → lowest version that works (the floors of pyproject.toml), and why where that matters to the user.
FLOORS: Mapping[str, tuple[str, str]] = {
    "efrapq": ("0", ""),
    "torch": ("2.10", "weights_only loading can be bypassed in earlier releases"),
    "onnx": ("1.21", "earlier releases check external data too little"),
    "onnx-ir": ("0.1.15", ""),
    "onnxscript": ("0.5", ""),
    "onnxsim": ("0.4.36", ""),
    "numpy": ("2.0", ""),
    "click": ("8.4", ""),
    "ml_dtypes": ("0.5", ""),
    "protobuf": ("5", ""),
    "rich": ("13", ""),
    "safetensors": ("0.5", ""),
    "pillow": ("11", ""),
    "jinja2": ("3.1", ""),
}
ORT_FLOOR = "1.23"
# What compiles the solver's column loop, where it is there.
COMPILERS = ("numba", "triton")
# All of these install the one module `onnxruntime`.
ORT_BUILDS = frozenset(
    {"onnxruntime", "ort-nightly", "ort-nightly-gpu", "ort-nightly-directml"}
    | {
        f"onnxruntime-{build}"
        for build in ("gpu", "directml", "openvino", "qnn", "rocm", "migraphx", "vitisai", "cann")
    }
    | {f"onnxruntime-{build}" for build in ("training", "training-cpu", "silicon", "azure", "noopenmp", "webgpu")}
)


@dataclass(frozen=True)
class Problem:
    """Something wrong, in words, and the remedy. With an error efrapq does not work; a warning limits it."""

    severity: Literal["error", "warning"]
    what: str
    what_to_do: str


@dataclass(frozen=True)
class CudaDevice:
    """A GPU as torch sees it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """The state of this installation. None stands for what is missing or cannot be told."""

    python: str
    platform: str
    versions: Mapping[str, str | None]
    """Distribution name → version, None where it is not installed; every installed build of ONNX Runtime is in it."""
    cpu: str | None
    vnni: bool | None
    """Whether the CPU sums products of bytes in 32 bits; None where that cannot be told or is no question."""
    torch_threads: int | None
    cuda_devices: tuple[CudaDevice, ...]
    onnxruntime_packages: tuple[str, ...]
    onnxruntime: str | None
    """The version that the imported module states."""
    onnxruntime_providers: tuple[str, ...]
    """What ONNX Runtime lists, loadable or not."""
    onnxruntime_cuda: bool
    """Whether a model really ran on the CUDA provider."""
    onnxruntime_cuda_reason: str
    """Why not, or on what it ran."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether efrapq works here: no problem is an error."""
        return all(problem.severity != "error" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """The form that `--json` prints."""
        return {"schema": "efrapq.doctor/1", "ok": self.ok, **asdict(self), "versions": dict(self.versions)}


@dataclass(frozen=True)
class _Torch:
    threads: int | None = None
    devices: tuple[CudaDevice, ...] = ()
    broken: str | None = None


@dataclass(frozen=True)
class _Ort:
    version: str | None = None
    providers: tuple[str, ...] = ()
    cuda: bool = False
    reason: str = "onnxruntime is not installed"
    broken: str | None = None


def examine() -> Diagnosis:
    """Look at this installation. Imports torch and onnxruntime, opens one tiny session, prints nothing."""
    ort_packages = _ort_packages()
    versions = {name: _version(name) for name in FLOORS} | ort_packages
    versions |= {name: version for name in COMPILERS if (version := _version(name)) is not None}
    cpu, vnni = describe_cpu()
    # torch comes first: the CUDA libraries that it brings are then found by ONNX Runtime too.
    torch = _examine_torch() if versions["torch"] is not None else _Torch()
    ort = _examine_ort() if ort_packages else _Ort()
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=versions,
        cpu=cpu,
        vnni=vnni,
        torch_threads=torch.threads,
        cuda_devices=torch.devices,
        onnxruntime_packages=tuple(ort_packages),
        onnxruntime=ort.version,
        onnxruntime_providers=ort.providers,
        onnxruntime_cuda=ort.cuda,
        onnxruntime_cuda_reason=ort.reason,
        problems=tuple(_problems(versions, ort_packages, torch, ort, vnni)),
    )


def _problems(
    versions: Mapping[str, str | None], ort_packages: Mapping[str, str], torch: _Torch, ort: _Ort, vnni: bool | None
) -> Iterator[Problem]:
    pip = "python -m pip"
    for name, (floor, reason) in FLOORS.items():
        version = versions[name]
        if version is None:
            advice = f"{pip} install '{name}>={floor}'" if floor != "0" else f"{pip} install efrapq"
            yield Problem("error", f"{name} is not installed", advice)
        elif _older(version, floor):
            yield _outdated(name, version, floor, reason)
    build = _ort_build()
    install = f"{pip} install '{build}>={ORT_FLOOR}'"
    replace = f"{pip} uninstall -y {' '.join(ort_packages)} && {install}"
    if not ort_packages:
        yield Problem("error", "onnxruntime is not installed", install)
    elif len(ort_packages) > 1:
        what = f"{' and '.join(ort_packages)} are installed together and overwrite each other's files"
        yield Problem("error", what, replace)
    for name, version in ort_packages.items():
        if _older(version, ORT_FLOOR):
            yield _outdated(name, version, ORT_FLOOR)
    if torch.broken is not None:
        yield Problem("error", f"torch cannot be imported: {torch.broken}", f"{pip} install --force-reinstall torch")
    if ort.broken is not None:
        yield Problem("error", f"onnxruntime does not work: {ort.broken}", replace)
    if torch.devices and ort_packages and ort.broken is None and not ort.cuda:
        yield _no_cuda(torch, ort, replace)
    if vnni is False:
        yield Problem(
            "warning",
            "this CPU has no VNNI: pairs of u8×s8 products are summed in 16 bits, which 8-bit weights can overflow",
            "files for --target ort-avx2, the default here, avoid it; verify other files where they will run",
        )


def _outdated(name: str, version: str, floor: str, reason: str = "") -> Problem:
    what = f"{name} {printable(version)} is too old: efrapq needs {floor} or later"
    return Problem(
        "error", f"{what} ({reason})" if reason else what, f"python -m pip install --upgrade '{name}>={floor}'"
    )


def _no_cuda(torch: _Torch, ort: _Ort, replace: str) -> Problem:
    what = f"torch sees {torch.devices[0].name}, but ONNX Runtime cannot use it: {ort.reason}"
    if "CUDAExecutionProvider" not in ort.providers and _ort_build() == "onnxruntime-gpu":
        return Problem("warning", what, replace)
    advice = (
        "install the CUDA and cuDNN releases that this build of ONNX Runtime asks for "
        "(https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html); without them it runs on the CPU"
    )
    return Problem("warning", what, advice)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _older(version: str, floor: str) -> bool:
    """Compare the numbers of two versions. What follows them (rc1, +cpu) is ignored; unreadable ones are not older."""

    def numbers(text: str) -> tuple[int, ...]:
        match = re.match(r"\d{1,9}(?:\.\d{1,9})*", text)
        return tuple(int(n) for n in match[0].split(".")) if match else (1 << 30,)

    have, need = numbers(version), numbers(floor)
    return have + (0,) * (len(need) - len(have)) < need


def _ort_packages() -> dict[str, str]:
    """Every installed distribution that provides the module `onnxruntime` → its version, ordered by name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        # An interrupted pip leaves folders without a name behind.
        if "Name" not in metadata or "Version" not in metadata:
            continue
        name = re.sub(r"[-_.]+", "-", metadata["Name"]).lower()
        if name in ORT_BUILDS:
            # The first on the path is the one that counts.
            found.setdefault(name, metadata["Version"])
    return dict(sorted(found.items()))


def _ort_build() -> str:
    """The build that efrapq asks for on this kind of machine."""
    has_gpu_build = (sys.platform, platform.machine()) in {("linux", "x86_64"), ("win32", "AMD64")}
    return "onnxruntime-gpu" if has_gpu_build else "onnxruntime"


def _examine_torch() -> _Torch:
    try:
        with _quiet():
            import torch

            devices = []
            if torch.cuda.is_available():
                for index in range(torch.cuda.device_count()):
                    properties = torch.cuda.get_device_properties(index)
                    devices.append(CudaDevice(str(properties.name), int(properties.total_memory)))
            return _Torch(torch.get_num_threads(), tuple(devices))
    except Exception as exc:  # noqa: BLE001  a broken installation fails in its own ways, OSError to AttributeError
        return _Torch(broken=_first_line(exc))


def _examine_ort() -> _Ort:
    try:
        with _quiet():
            import onnxruntime as ort

            version, providers = str(ort.__version__), tuple(str(p) for p in ort.get_available_providers())
    except Exception as exc:  # noqa: BLE001  two builds on top of each other lack any attribute
        return _Ort(reason="onnxruntime does not work", broken=_first_line(exc))
    if "CUDAExecutionProvider" not in providers:
        return _Ort(version, providers, False, "this build of onnxruntime has no CUDA provider")
    with _quiet() as said:
        try:
            used = _run_tiny_model()
            failure = ""
        except Exception as exc:  # noqa: BLE001  onnxruntime has its own exception classes for each failure
            used, failure = (), _first_line(exc)
    if "CUDAExecutionProvider" in used:
        return _Ort(version, providers, True, "a model ran on it")
    return _Ort(version, providers, False, _reason(said()) or failure or "it fell back to the CPU without saying why")


def _run_tiny_model() -> tuple[str, ...]:
    """Run one Relu with the CUDA provider asked for; return the providers that the session really has."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), options, providers=wanted)
    (result,) = session.run(None, {"x": np.array([-1, 2], np.float32)})
    if result.tolist() != [0, 2]:
        raise RuntimeError(f"Relu of -1 and 2 came out as {result.tolist()}")
    return tuple(session.get_providers())


def _reason(text: str) -> str:
    """The telling part of what ONNX Runtime wrote: the library that is missing, CUDA's own error, or the first line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    if match := re.search(r"with error: (.+)", text):
        return f"its CUDA library does not load ({printable(match[1].strip())})"
    if match := re.search(r"CUDA failure \d+: [^;\n]+", text):
        return printable(match[0].strip())
    lines = (re.sub(r"^\S+ \S+ \[[A-Z]:[^]]*\]", "", line).strip(" *") for line in text.splitlines())
    return next((printable(line) for line in lines if line), "")


def _first_line(exc: Exception) -> str:
    return printable((str(exc).strip().splitlines() or [type(exc).__name__])[0])


@contextlib.contextmanager
def _quiet() -> Iterator[Callable[[], str]]:
    """Catch what Python and C++ write to stdout and stderr; the value says, afterwards too, what that was."""
    caught = io.StringIO()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
            # A daemon may have closed the descriptor; then nothing can be written to it.
            with contextlib.suppress(OSError):
                saved = os.dup(number)
                stack.callback(os.close, saved)
                stack.callback(os.dup2, saved, number)
                os.dup2(file.fileno(), number)
        stack.enter_context(contextlib.redirect_stdout(caught))
        stack.enter_context(contextlib.redirect_stderr(caught))
        said: list[str] = []
        try:
            yield lambda: "".join(said)
        finally:
            file.seek(0)
            said[:] = [file.read().decode("utf-8", "replace"), caught.getvalue()]
