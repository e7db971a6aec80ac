from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from efrapq.errors import OutputError
from efrapq.io import check_output, write_all, write_atomic


def failing(code: int, when: Callable[..., bool] = lambda *_: True, honest: Any = None) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        if when(*args):
            raise OSError(code, os.strerror(code))
        return honest(*args, **options)

    return fail


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Writing


def test_new_and_existing_files(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    write_atomic(path, b"one")
    write_atomic(str(path), b"two")
    assert contents(tmp_path) == {"out.onnx": b"two"}
    write_all({tmp_path / "a": b"a", path: b"three", tmp_path / "b": b""})
    assert contents(tmp_path) == {"a": b"a", "out.onnx": b"three", "b": b""}
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_relative_path_and_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomic("o" * 255, b"x")
    assert contents(tmp_path) == {"o" * 255: b"x"}


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "no permission"), (errno.EIO, "error")],
)
def test_failure_leaves_the_old_file_and_nothing_else(
    function: str, code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(code))
        with pytest.raises(OutputError, match=advice):
            write_atomic(tmp_path / "out", b"new")
        with pytest.raises(OutputError, match=advice):
            write_all({tmp_path / "out": b"new", tmp_path / "more": b"new"})
    assert contents(tmp_path) == {"out": b"old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.open

    def full(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_CREAT:
            os.close(honest(path, flags, *args))  # the name is there, and nothing goes into it
            return honest("/dev/full", os.O_WRONLY)
        return honest(path, flags, *args)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_atomic(tmp_path / "out", bytes(1 << 20))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_group_is_undone_when_a_later_rename_fails(
    failure: BaseException, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old a")
    (tmp_path / "c").write_bytes(b"old c")
    honest = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "c" and Path(source).read_bytes() == b"new":
            raise failure
        honest(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if not links:
            patch.setattr(os, "link", failing(errno.EPERM))
        with pytest.raises((OutputError, KeyboardInterrupt)):
            write_all({tmp_path / "a": b"new", tmp_path / "b": b"new", tmp_path / "c": b"new"})
    assert contents(tmp_path) == {"a": b"old a", "c": b"old c"}


def test_directory_that_cannot_be_synced_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.fsync
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, lambda fd: os.path.isdir(f"/proc/self/fd/{fd}"), honest))
    write_atomic(tmp_path / "out", b"x")
    assert contents(tmp_path) == {"out": b"x"}


def test_two_results_for_one_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="same file"):
        write_all({tmp_path / "a": b"1", str(tmp_path) + "/../" + tmp_path.name + "/a": b"2"})


_KILLED = """
import os, sys, time
from efrapq.io import write_atomic
def stop(*args):
    print("reached", flush=True)
    time.sleep(60)
setattr(os, sys.argv[1], stop)
write_atomic(sys.argv[2], b"new" * 1000)
"""


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_in_the_middle(function: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", _KILLED, function, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"reached\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


# Where it may go


def test_good_output_passes(tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    model.write_bytes(b"x")
    (tmp_path / "old").write_bytes(b"x")
    for name in ("new", "old", "Model2.pt"):
        check_output(tmp_path / name, [model, tmp_path / "missing"])


def test_output_that_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.pt"
    model.write_bytes(b"x")
    (tmp_path / "soft").symlink_to(model)
    os.link(model, tmp_path / "hard")
    (tmp_path / "dir").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for output in (
        model,
        tmp_path / "soft",
        tmp_path / "hard",
        tmp_path / "dir" / "model.pt",
        "model.pt",
    ):
        with pytest.raises(OutputError, match=r"input file|symbolic"):
            check_output(output, [model])
    with pytest.raises(OutputError, match="input file"):
        check_output(model, [tmp_path / "other", tmp_path / "soft"])


@pytest.mark.parametrize("check", [check_output, lambda path: write_atomic(path, b"x")], ids=["check", "write"])
def test_places_that_take_no_file(check: Callable[[Any], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    for path, match in [
        (tmp_path / "dir", "is a directory"),
        (tmp_path / "none" / "out", "does not exist"),
        (tmp_path / "file" / "out", "not a directory|does not exist"),
        (tmp_path / "link", "symbolic link"),
        (tmp_path / "fifo", "special file"),
        (tmp_path / ("x" * 300), "too long"),
        (Path("/dev/null"), "special file"),
        (tmp_path / "a\0b", "choose another path"),
    ]:
        with pytest.raises(OutputError, match=match) as caught:
            check(path)
        assert str(caught.value).isprintable()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "fifo", "file", "link"]


def test_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="no permission to write"):
        check_output(tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_really_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    start = time.monotonic()
    with pytest.raises(OutputError, match="no permission"):
        check_output(tmp_path / "out")
    with pytest.raises(OutputError, match="no permission"):
        write_atomic(tmp_path / "out", b"x")
    assert time.monotonic() - start < 1
    tmp_path.chmod(0o700)


def test_a_file_may_come_in_pieces(tmp_path: Path) -> None:
    pieces = iter([b"one", memoryview(b" two"), b"", b" three"])
    write_all({tmp_path / "a": pieces, tmp_path / "b": b"whole"})
    assert (tmp_path / "a").read_bytes() == b"one two three"
    assert (tmp_path / "b").read_bytes() == b"whole"


def test_pieces_that_cannot_be_made_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_all({tmp_path / "b": b"whole", tmp_path / "a": pieces()})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
