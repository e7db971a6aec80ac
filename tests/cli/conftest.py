"""Running the command line in this process, and the embedded subject defended once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from efrapq.cli.main import main
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


@pytest.fixture(scope="module", autouse=True)
def _exported_once(exported_once: None) -> None:
    """Nearly all of these tests load the embedded subject."""


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
