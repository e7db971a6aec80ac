"""The doctor: each thing that can be wrong with an installation, and this machine as it is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from efrapq import doctor
from efrapq.cpu import describe_cpu
from efrapq.doctor import CudaDevice, Diagnosis, examine

GOOD = {name: floor if floor != "0" else "0.1.0" for name, (floor, _) in doctor.FLOORS.items()}
GOOD_ORT = {"onnxruntime-gpu": "1.31.1"}
CUDA_LISTED = ("CUDAExecutionProvider", "CPUExecutionProvider")
WORKING = doctor._Ort("1.31.1", CUDA_LISTED, True, "a model ran on it")
H100 = CudaDevice("NVIDIA H100", 80 << 30)

Machine = Callable[..., Diagnosis]


class Distribution:
    def __init__(self, name: str | None, version: str | None) -> None:
        self.metadata = Message()
        if name is not None:
            self.metadata["Name"] = name
        if version is not None:
            self.metadata["Version"] = version


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Examine a machine that is sound but for what is given."""

    def make(
        versions: dict[str, str | None] | None = None,
        ort_packages: dict[str | None, str | None] | None = None,
        torch: Any = None,
        ort: Any = None,
        cpuinfo: str = "model name\t: Some CPU\nflags\t\t: sse avx2 avx_vnni\n",
        system: tuple[str, str] = ("linux", "x86_64"),
    ) -> Diagnosis:
        installed: dict[str, str | None] = {**GOOD, **(versions or {})}

        def version(name: str) -> str:
            found = installed.get(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        packages = GOOD_ORT if ort_packages is None else ort_packages
        distributions = [
            Distribution(*pair) for pair in (*packages.items(), ("numpy", "2.0"), ("onnxruntime-genai", "1"))
        ]
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: distributions)
        monkeypatch.setattr(doctor, "_examine_torch", lambda: torch or doctor._Torch(threads=2))
        monkeypatch.setattr(doctor, "_examine_ort", lambda: ort or WORKING)
        monkeypatch.setattr(doctor, "describe_cpu", lambda: describe_cpu(tmp_path / "cpuinfo"))
        monkeypatch.setattr(sys, "platform", system[0])
        monkeypatch.setattr(platform, "machine", lambda: system[1])
        if cpuinfo:
            (tmp_path / "cpuinfo").write_text(cpuinfo)
        return examine()

    return make


def test_a_sound_machine(machine: Machine) -> None:
    diagnosis = machine(torch=doctor._Torch(2, (H100,)))
    assert diagnosis.problems == ()
    assert diagnosis.ok
    assert diagnosis.versions == {**GOOD, **GOOD_ORT}
    assert diagnosis.cuda_devices == (H100,)
    assert diagnosis.onnxruntime_packages == ("onnxruntime-gpu",)
    assert (diagnosis.cpu, diagnosis.vnni) == ("Some CPU", True)


def only_problem(diagnosis: Diagnosis, severity: str) -> tuple[str, str]:
    (problem,) = diagnosis.problems
    assert problem.severity == severity
    assert diagnosis.ok is (severity == "warning")
    assert (problem.what + problem.what_to_do).isprintable()
    return problem.what, problem.what_to_do


@pytest.mark.parametrize("name", sorted(set(doctor.FLOORS) - {"efrapq"}))
def test_a_package_is_missing(machine: Machine, name: str) -> None:
    diagnosis = machine({name: None})
    what, to_do = only_problem(diagnosis, "error")
    assert what == f"{name} is not installed"
    assert to_do == f"python -m pip install '{name}>={doctor.FLOORS[name][0]}'"
    assert diagnosis.versions[name] is None


def test_efrapq_itself_is_not_installed(machine: Machine) -> None:
    what, to_do = only_problem(machine({"efrapq": None}), "error")
    assert (what, to_do) == ("efrapq is not installed", "python -m pip install efrapq")


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("torch", "2.9.1+cu128", "weights_only"),
        ("torch", "1.13", "weights_only"),
        ("onnx", "1.20.1", "external data"),
        ("onnx-ir", "0.1.9", "0.1.15 or later"),
        ("numpy", "1.26.4", "2.0 or later"),
        ("pillow", "9", "11 or later"),
    ],
)
def test_a_package_is_too_old(machine: Machine, name: str, version: str, reason: str) -> None:
    what, to_do = only_problem(machine({name: version}), "error")
    assert what.startswith(f"{name} {version} is too old: ")
    assert reason in what
    assert to_do == f"python -m pip install --upgrade '{name}>={doctor.FLOORS[name][0]}'"


@pytest.mark.parametrize("version", ["2.10", "2.10.0", "2.10.0rc1", "2.13.0+cpu", "10", "v-unreadable"])
def test_a_package_is_new_enough(machine: Machine, version: str) -> None:
    assert machine({"torch": version}).ok


@pytest.mark.parametrize("other", ["onnxruntime", "onnxruntime-directml", "onnxruntime_openvino", "ONNXRuntime.QNN"])
def test_two_builds_of_onnxruntime(machine: Machine, other: str) -> None:
    name = other.lower().replace("_", "-").replace(".", "-")
    first, second = sorted((name, "onnxruntime-gpu"))
    diagnosis = machine(ort_packages={"onnxruntime-gpu": "1.31.1", other: "1.31.0"})
    what, to_do = only_problem(diagnosis, "error")
    assert what == f"{first} and {second} are installed together and overwrite each other's files"
    assert to_do == (
        f"python -m pip uninstall -y {first} {second} && python -m pip install 'onnxruntime-gpu>={doctor.ORT_FLOOR}'"
    )
    assert diagnosis.versions[name] == "1.31.0"


@pytest.mark.parametrize(
    ("system", "build"),
    [
        (("linux", "x86_64"), "onnxruntime-gpu"),
        (("win32", "AMD64"), "onnxruntime-gpu"),
        (("darwin", "arm64"), "onnxruntime"),
        (("linux", "aarch64"), "onnxruntime"),
    ],
)
def test_no_onnxruntime(machine: Machine, system: tuple[str, str], build: str) -> None:
    # Remains of an interrupted pip are no installation.
    diagnosis = machine(ort_packages={None: "1.0", "onnxruntime": None}, system=system)
    what, to_do = only_problem(diagnosis, "error")
    assert (what, to_do) == (
        "onnxruntime is not installed",
        f"python -m pip install '{build}>={doctor.ORT_FLOOR}'",
    )
    assert (diagnosis.onnxruntime, diagnosis.onnxruntime_cuda) == (None, False)
    assert diagnosis.onnxruntime_cuda_reason == "onnxruntime is not installed"


def test_an_old_onnxruntime(machine: Machine) -> None:
    what, to_do = only_problem(machine(ort_packages={"onnxruntime": "1.17.3"}), "error")
    assert what == f"onnxruntime 1.17.3 is too old: efrapq needs {doctor.ORT_FLOOR} or later"
    assert to_do == f"python -m pip install --upgrade 'onnxruntime>={doctor.ORT_FLOOR}'"


def test_torch_is_broken(machine: Machine) -> None:
    what, to_do = only_problem(machine(torch=doctor._Torch(broken="libgomp.so.1: cannot open")), "error")
    assert what == "torch cannot be imported: libgomp.so.1: cannot open"
    assert "--force-reinstall" in to_do


def test_onnxruntime_is_broken(machine: Machine) -> None:
    broken = doctor._Ort(broken="module 'onnxruntime' has no attribute 'get_available_providers'")
    what, to_do = only_problem(machine(ort=broken, torch=doctor._Torch(2, (H100,))), "error")
    assert what.startswith("onnxruntime does not work: module 'onnxruntime' has no attribute")
    assert to_do.startswith("python -m pip uninstall -y onnxruntime-gpu && python -m pip install")


def test_a_gpu_that_onnxruntime_cannot_load(machine: Machine) -> None:
    ort = doctor._Ort("1.31.1", CUDA_LISTED, False, "its CUDA library does not load (libcublasLt.so.13)")
    what, to_do = only_problem(machine(torch=doctor._Torch(2, (H100,)), ort=ort), "warning")
    assert what == (
        "torch sees NVIDIA H100, but ONNX Runtime cannot use it: its CUDA library does not load (libcublasLt.so.13)"
    )
    assert "CUDA and cuDNN" in to_do


def test_a_gpu_and_the_build_without_cuda(machine: Machine) -> None:
    ort = doctor._Ort("1.31.1", ("CPUExecutionProvider",), False, "this build of onnxruntime has no CUDA provider")
    torch = doctor._Torch(2, (H100,))
    what, to_do = only_problem(machine(torch=torch, ort=ort, ort_packages={"onnxruntime": "1.31.1"}), "warning")
    assert what.endswith("this build of onnxruntime has no CUDA provider")
    assert to_do == (
        f"python -m pip uninstall -y onnxruntime && python -m pip install 'onnxruntime-gpu>={doctor.ORT_FLOOR}'"
    )


def test_no_gpu_is_no_problem(machine: Machine) -> None:
    assert machine(ort=doctor._Ort("1.31.1", CUDA_LISTED, False, "no GPU")).problems == ()


def test_no_vnni(machine: Machine) -> None:
    diagnosis = machine(cpuinfo="model name : Old\nflags : sse avx2\n\nmodel name : Other\nflags : avx_vnni\n")
    assert (diagnosis.cpu, diagnosis.vnni) == ("Old", False)
    what, to_do = only_problem(diagnosis, "warning")
    assert "VNNI" in what
    assert "--target ort-avx2" in to_do


@pytest.mark.parametrize(
    ("cpuinfo", "system", "vnni"),
    [
        ("flags : avx512f avx512_vnni\n", ("linux", "x86_64"), True),
        ("flags : avx_vnni_int8\n", ("linux", "x86_64"), False),
        ("", ("darwin", "x86_64"), None),
        ("rubbish\n", ("linux", "x86_64"), None),
        ("Features : asimd asimddp\n", ("linux", "aarch64"), None),
    ],
)
def test_vnni(machine: Machine, cpuinfo: str, system: tuple[str, str], vnni: bool | None) -> None:
    diagnosis = machine(cpuinfo=cpuinfo, system=system)
    assert diagnosis.vnni is vnni
    assert bool(diagnosis.problems) is (vnni is False)


def test_several_problems_at_once(machine: Machine) -> None:
    diagnosis = machine({"torch": None, "onnx": "1.2"}, {"onnxruntime": "1.0", "onnxruntime-gpu": "1.31"})
    assert len(diagnosis.problems) == 4
    assert not diagnosis.ok


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "\x1b[1;31m2026-01-01 10:00:00.0 [E:onnxruntime:Default, x.cc:1 f()] FAIL : Failed to load library a.so "
            "with error: libcudnn.so.9: cannot open shared object file: No such file\n\x1b[m\nmore\n",
            "its CUDA library does not load (libcudnn.so.9: cannot open shared object file: No such file)",
        ),
        (
            "2026-01-01 10:00:00.0 [E:onnxruntime:Default, x.cc:1 f()] CUDA failure 35: CUDA driver version is "
            "insufficient for CUDA runtime version ; GPU=-1 ; hostname=x",
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
        ),
        (
            "\n*************** EP Error ***************\nsomething else",
            "EP Error",
        ),
        ("2026-01-01 10:00:00.0 [W:onnxruntime:Default, x.cc:1 f()] no luck \x07\n", "no luck \\x07"),
        ("", ""),
    ],
)
def test_the_reason_in_words(said: str, reason: str) -> None:
    assert doctor._reason(said) == reason


def test_quiet_catches_both_levels_and_gives_the_streams_back(capfd: pytest.CaptureFixture[str]) -> None:
    def noise() -> None:
        print("python out")
        print("python err", file=sys.stderr)
        os.write(1, b"fd 1\n")
        os.write(2, b"fd 2\n")
        raise KeyError

    with doctor._quiet() as said, pytest.raises(KeyError):
        noise()
    assert said().split("\n") == ["fd 1", "fd 2", "python out", "python err", ""]
    print("afterwards", flush=True)
    os.write(2, b"too")
    assert capfd.readouterr() == ("afterwards\n", "too")


def test_streams_that_fail_inside_are_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), doctor._quiet():
        raise KeyError
    print("afterwards", flush=True)
    assert capfd.readouterr() == ("afterwards\n", "")


@pytest.mark.parametrize(
    ("outcome", "cuda", "reason"),
    [
        (("CUDAExecutionProvider", "CPUExecutionProvider"), True, "a model ran on it"),
        (("CPUExecutionProvider",), False, "it fell back to the CPU without saying why"),
        (RuntimeError("no kernel\nimage"), False, "no kernel"),
        (ModuleNotFoundError("No module named 'onnx'"), False, "No module named 'onnx'"),
    ],
)
def test_cuda_counts_when_a_model_ran_on_it(
    monkeypatch: pytest.MonkeyPatch, outcome: Any, cuda: bool, reason: str
) -> None:
    def run() -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(CUDA_LISTED))
    monkeypatch.setattr(doctor, "_run_tiny_model", run)
    found = doctor._examine_ort()
    assert (found.cuda, found.reason, found.broken) == (cuda, reason, None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert doctor._examine_ort().reason == "this build of onnxruntime has no CUDA provider"
    monkeypatch.delattr(ort, "get_available_providers")
    assert "get_available_providers" in str(doctor._examine_ort().broken)


def test_this_machine(capfd: pytest.CaptureFixture[str]) -> None:
    diagnosis = examine()
    assert capfd.readouterr() == ("", "")
    assert diagnosis.python == platform.python_version()
    assert not [name for name, version in diagnosis.versions.items() if version is None]
    assert diagnosis.torch_threads
    assert diagnosis.onnxruntime
    assert "CPUExecutionProvider" in diagnosis.onnxruntime_providers
    assert diagnosis.onnxruntime_cuda_reason
    if not diagnosis.cuda_devices:
        assert not diagnosis.onnxruntime_cuda
    assert diagnosis.ok
    with pytest.raises(dataclasses.FrozenInstanceError):
        diagnosis.cpu = "another"  # type: ignore[misc]


def test_json(machine: Machine) -> None:
    diagnosis = machine({"onnx": None}, torch=doctor._Torch(2, (H100,)))
    document = json.loads(json.dumps(diagnosis.to_dict()))
    assert document["schema"] == "efrapq.doctor/1"
    assert document["ok"] is False
    assert document["problems"][0].keys() == {"severity", "what", "what_to_do"}
    assert document["cuda_devices"] == [{"name": "NVIDIA H100", "memory_bytes": 80 << 30}]
    assert document.keys() == {field.name for field in dataclasses.fields(Diagnosis)} | {"schema", "ok"}


def test_the_floors_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = {line.split(";")[0] for line in project["dependencies"]}
    known = {f"{name}>={floor}" for name, (floor, _) in doctor.FLOORS.items() if name != "efrapq"}
    assert wanted == known | {f"{name}>={doctor.ORT_FLOOR}" for name in ("onnxruntime", "onnxruntime-gpu")}


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, efrapq.doctor; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
