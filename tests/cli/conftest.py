"""Running the command line in this process, and the embedded subject defended once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from safetensors.torch import save
from torch import nn

from efrapq.cli.main import main
from efrapq.graph import from_torch
from efrapq.models import weights


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call efrapq with these arguments; what it printed and its exit code."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        code = stopped.value.code
        printed = capsys.readouterr()
        return Ran(code if isinstance(code, int) else 0, printed.out, printed.err)

    return call


@pytest.fixture(scope="session", autouse=True)
def exported_once() -> Iterator[None]:
    """torch's exporter takes seconds, and these tests load one network over and over: the same gives the same graph
    (tests/graph/test_from_torch.py).
    """
    known: dict[tuple[str, str, tuple[int, ...]], bytes] = {}
    export = from_torch.export_module

    def remembered(module: nn.Module, input_shape: tuple[int, ...]) -> onnx.ModelProto:
        held = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        key = repr(module), hashlib.sha256(save(held)).hexdigest(), tuple(input_shape)
        if key not in known:
            known[key] = export(module, input_shape).SerializeToString()
        return onnx.load_model_from_string(known[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(from_torch, "export_module", remembered)
        yield


@pytest.fixture(scope="session")
def defended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded subject, defended at 4 bits on its sample calibration images, in a folder of its own."""
    folder = tmp_path_factory.mktemp("defended")
    subject = folder / "model.safetensors"
    subject.write_bytes(weights.SUBJECT.read_bytes())
    output = folder / "model.int4.onnx"
    with pytest.raises(SystemExit) as stopped:
        main(
            ["defend", str(subject), "--bits", "4", "--calib", f"{weights.SAMPLES}:calib", "-q", "--target", "ort-x86"]
        )
    assert stopped.value.code == 0
    assert output.is_file()
    return output
