"""The group: help, exit codes, and what is imported when."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from efrapq.cli.main import COMMANDS

HEAVY = ("torch", "onnxruntime", "onnxsim", "onnx")


def test_help_imports_nothing_heavy_and_answers_fast() -> None:
    script = (
        "import sys\nfrom efrapq.cli.main import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Commands:" in done.stdout
    # The contract is 0.3 s; the slack is for a machine that runs other tests at the same time.
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_that_lists_its_options(run, name: str) -> None:
    ran = run(name, "--help")
    assert ran.code == 0
    assert "Usage:" in ran.out
    assert "--json" in ran.out


def test_version(run) -> None:
    ran = run("--version")
    assert ran.code == 0
    assert ran.out.startswith("efrapq, version ")


def test_python_m_is_the_same_command() -> None:
    found = subprocess.run([sys.executable, "-m", "efrapq", "verify"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("Usage: efrapq verify [OPTIONS] MODEL")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["defend"], ["defend", "x.pt", "--bits", "5"], ["verify", "x", "--max-asr", "many"]],
    ids=["unknown command", "missing argument", "bad choice", "not a number"],
)
def test_bad_usage_is_exit_code_2_without_a_traceback(run, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_a_missing_file_is_one_line_and_exit_code_2(run) -> None:
    ran = run("defend", "nowhere.pt")
    assert ran.code == 2
    assert ran.err == "error: nowhere.pt: there is no such file; check the path\n"


def test_debug_shows_the_traceback_too(run) -> None:
    ran = run("--debug", "defend", "nowhere.pt")
    assert ran.code == 2
    assert "Traceback" in ran.err


def test_an_interrupt_is_exit_code_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("efrapq.pipeline.defend", interrupted)
    ran = run("defend", "model.pt")
    assert ran.code == 130
    assert "interrupted" in ran.err


def test_a_bug_is_not_mistaken_for_a_verdict(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("efrapq.pipeline.defend", broken)
    ran = run("defend", "model.pt")
    assert ran.code == 70
    assert "internal error" in ran.err
