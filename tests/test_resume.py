"""Runs that were killed, for real, and went on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from efrapq.cli.main import main
from efrapq.exporters import read_quantized
from efrapq.stream import Journal

if os.name == "nt":
    pytest.skip("no SIGKILL here", allow_module_level=True)

# Half a second or so a layer, also beside other tests, so that the signal arrives while there is still one to solve.
SLOW = ("--solver", "relaxed", "--steps", "350", "--target", "ort-x86", "--device", "cpu")
LAYERS = 5
# A shell without job control starts what runs in its background with SIGINT ignored, and so does whatever that starts:
# these tests too, perhaps.
FROM_A_TERMINAL = """
import signal
from efrapq.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@dataclass(frozen=True)
class Bench:
    """model, calib: what is defended; whole: the bytes of the file that a run without interruption writes."""

    model: Path
    calib: Path
    whole: bytes

    def arguments(self, output: Path, *more: object) -> list[str]:
        given = ["defend", self.model, "-o", output, "--calib", self.calib, *SLOW, *more]
        return [str(a) for a in given]


def partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def solved(output: Path) -> list[Path]:
    return sorted(partial(output).glob("*.npz"))


@dataclass(frozen=True)
class Ran:
    code: int
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], Ran]:
    """efrapq in this process."""

    def run(arguments: list[str]) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        return Ran(int(stopped.value.code or 0), capsys.readouterr().err)

    return run


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, net: Any, images: Callable[..., Any]) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    n = net()
    value = "input"
    for i, (inputs, outputs) in enumerate([(3, 8), (8, 8), (8, 8), (8, 8)]):
        value = n.op("Relu", n.conv(value, f"c{i}", inputs, outputs), f"a{i}")
    onnx.save(
        n.model(n.gemm(n.op("Flatten", n.op("GlobalAveragePool", value, "gap"), "flat"), "y", 8, 4)),
        folder / "net.onnx",
    )
    np.savez(folder / "calib.npz", images=images(32))
    unfinished = Bench(folder / "net.onnx", folder / "calib.npz", b"")
    with pytest.raises(SystemExit) as stopped:
        main(unfinished.arguments(folder / "whole.onnx", "-q"))
    assert stopped.value.code == 0
    assert not partial(folder / "whole.onnx").exists()
    return Bench(unfinished.model, unfinished.calib, (folder / "whole.onnx").read_bytes())


def interrupted(bench: Bench, output: Path, after: int, how: signal.Signals) -> tuple[int, str]:
    """Run in a process of its own, and send it the signal when so many layers are kept. Exit code and stderr.

    On a busy machine a run can end before the signal reaches it, which tests nothing: it is run again.
    """
    for _ in range(5):
        code, err = _signalled(bench, output, after, how)
        # Between the last layer and the file there is a moment without either.
        if solved(output) and not output.exists():
            break
        output.unlink(missing_ok=True)
        output.with_suffix(".json").unlink(missing_ok=True)
    assert after <= len(solved(output)) < LAYERS, f"the signal came too late to test anything: {code}, {err}"
    assert not output.exists()
    return code, err


def _signalled(bench: Bench, output: Path, after: int, how: signal.Signals) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", FROM_A_TERMINAL, *bench.arguments(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while len(solved(output)) < after:
            if process.poll() is not None:
                break
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (0, -how, 130), err
    return process.returncode, err


@pytest.fixture(scope="module")
def killed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Path], Path]:
    """(layers, folder) → an output in that folder whose run was killed when so many layers were kept."""
    made: dict[int, Path] = {}

    def copy(after: int, folder: Path) -> Path:
        if after not in made:
            output = tmp_path_factory.mktemp("killed") / "out.onnx"
            code, _ = interrupted(bench, output, after, signal.SIGKILL)
            assert code == -signal.SIGKILL
            made[after] = output
        shutil.copytree(partial(made[after]), partial(folder / "out.onnx"))
        return folder / "out.onnx"

    return copy


def contents(output: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in partial(output).iterdir()}


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_goes_on(bench: Bench, killed: Any, call: Any, tmp_path: Path, after: int) -> None:
    output = killed(after, tmp_path)
    kept = len(solved(output))
    ran = call(bench.arguments(output, "--resume"))
    assert ran.code == 0, ran.err
    assert f"resumed: {kept} of {LAYERS} layers were solved before" in ran.err
    assert output.read_bytes() == bench.whole
    assert output.with_suffix(".json").is_file()
    assert not partial(output).exists()


def test_what_was_kept_is_used_and_not_solved_again(bench: Bench, killed: Any, call: Any, tmp_path: Path) -> None:
    """Shown by a kept layer that no run would have found."""
    output = killed(1, tmp_path)
    key = json.loads((partial(output) / "key.json").read_text())["key"]
    journal = Journal(partial(output), key)
    found = journal.get("c0", (8, 3, 3, 3))
    assert found is not None
    codes = np.full_like(found[0].codes, 5)
    journal.put("c0", found[0].replace_codes(codes), found[1])
    ran = call(bench.arguments(output, "--resume"))
    assert ran.code == 0, ran.err
    assert np.array_equal(read_quantized(onnx.load(output)).weights["c0"].codes, codes)
    assert output.read_bytes() != bench.whole


def test_memory_may_change_in_between(bench: Bench, killed: Any, call: Any, tmp_path: Path) -> None:
    """It decides nothing, and too little of it is why some runs stop."""
    output = killed(3, tmp_path)
    ran = call(bench.arguments(output, "--resume", "--memory", "1k"))
    assert ran.code == 0, ran.err
    assert "resumed" in ran.err
    assert output.read_bytes() == bench.whole


@pytest.mark.parametrize(
    "other",
    [
        ("--seed", "1"),
        ("--bits", "3"),
        ("--act-bits", "4"),
        ("--calib-size", "20"),
        ("--scale", "mse"),
        ("--headroom", "2"),
        ("--no-stress",),
        ("--cover", "patch:2x2@0,0"),
    ],
    ids=lambda o: o[0],
)
def test_another_run_s_layers_are_refused(
    bench: Bench, killed: Any, call: Any, tmp_path: Path, other: tuple[str, ...]
) -> None:
    output = killed(3, tmp_path)
    before = contents(output)
    ran = call(bench.arguments(output, "--resume", *other))
    assert ran.code == 2
    (line,) = [line for line in ran.err.splitlines() if line.startswith("error:")]
    assert "out.onnx.partial: was begun with another model, other data, settings or versions" in line
    assert "leave out --resume to start again" in line
    assert contents(output) == before
    assert not output.exists()


def test_another_model_s_layers_are_refused(bench: Bench, killed: Any, call: Any, tmp_path: Path) -> None:
    output = killed(3, tmp_path)
    before = contents(output)
    proto = onnx.load(bench.model)
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight.flat[0] += np.float32(1e-3)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, proto.graph.initializer[0].name))
    other = Bench(tmp_path / "other.onnx", bench.calib, b"")
    onnx.save(proto, other.model)
    ran = call(other.arguments(output, "--resume"))
    assert ran.code == 2
    assert "was begun with another model" in ran.err
    assert contents(output) == before


def test_with_nothing_to_resume_it_says_so_and_begins(bench: Bench, call: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    ran = call(bench.arguments(output, "--resume"))
    assert ran.code == 0, ran.err
    assert "nothing to resume: starting from the first layer" in ran.err
    assert "resumed:" not in ran.err
    assert output.read_bytes() == bench.whole
    assert not partial(output).exists()


def test_without_resume_it_starts_afresh(bench: Bench, killed: Any, call: Any, tmp_path: Path) -> None:
    """Even from layers that are not what this run would find."""
    output = killed(3, tmp_path)
    for path in solved(output):
        path.write_bytes(b"damaged")
    ran = call(bench.arguments(output))
    assert ran.code == 0, ran.err
    assert "resume" not in ran.err
    assert output.read_bytes() == bench.whole
    assert not partial(output).exists()


def test_a_damaged_layer_is_named_and_the_others_are_kept(bench: Bench, killed: Any, call: Any, tmp_path: Path) -> None:
    output = killed(3, tmp_path)
    damaged = solved(output)[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    before = contents(output)
    ran = call(bench.arguments(output, "--resume"))
    assert ran.code == 2
    assert f"{damaged.name}: is damaged; leave out --resume to start again" in ran.err
    assert before.items() <= contents(output).items()
    damaged.unlink()
    ran = call(bench.arguments(output, "--resume"))
    assert ran.code == 0, ran.err
    assert output.read_bytes() == bench.whole


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["fresh", "resume"])
def test_a_folder_of_the_user_s_is_not_touched(
    bench: Bench, call: Any, tmp_path: Path, resume: tuple[str, ...]
) -> None:
    output = tmp_path / "out.onnx"
    partial(output).mkdir()
    (partial(output) / "my_images.npz").write_bytes(b"mine")
    ran = call(bench.arguments(output, *resume))
    assert ran.code == 2
    assert "out.onnx.partial: is in the way; move it or choose another output" in ran.err
    assert contents(output) == {"my_images.npz": b"mine"}
    assert not output.exists()


def test_interrupting_keeps_what_was_solved(bench: Bench, call: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    code, err = interrupted(bench, output, 2, signal.SIGINT)
    assert code == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    ran = call(bench.arguments(output, "--resume"))
    assert ran.code == 0, ran.err
    assert output.read_bytes() == bench.whole
    assert not partial(output).exists()
