from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

from efrapq.errors import (
    CorruptFileError,
    InputError,
    LimitError,
    UnsafeFileError,
    UnsupportedFileError,
)
from efrapq.io import Format, Limits, read_source, sniff

ONNX = onnx.helper.make_model(
    onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 4])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 4])],
    )
).SerializeToString()


def small_module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())


@pytest.fixture(scope="module")
def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(small_module(), torch.zeros(1, 1, 8, 8)), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def exported() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(1, 4),)), buffer)
    return buffer.getvalue()


def tar_bytes(*names: str, form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def zip_bytes(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


def test_good_files_are_known_by_content_and_hashed(
    tmp_path: Path, torch_bytes: Callable[..., bytes], state: dict[str, torch.Tensor]
) -> None:
    for data, expected in [
        (torch_bytes(state), Format.TORCH_ZIP),
        (safetensors.torch.save(state), Format.SAFETENSORS),
        (ONNX, Format.ONNX),
    ]:
        path = tmp_path / "misleading.txt"
        path.write_bytes(data)
        source = read_source(path)
        assert source.format is expected
        assert source.data == data
        assert source.path == path
        assert source.sha256 == hashlib.sha256(data).hexdigest()
        assert "data=" not in repr(source)  # a traceback must not print the weights


def test_onnx_without_leading_version_is_known() -> None:
    model = onnx.ModelProto.FromString(ONNX)
    version = onnx.ModelProto(ir_version=model.ir_version).SerializeToString()
    model.ClearField("ir_version")
    assert sniff(model.SerializeToString() + version) is Format.ONNX


def test_torchscript_is_refused(torchscript: bytes) -> None:
    with pytest.raises(UnsafeFileError, match="TorchScript"):
        sniff(torchscript)


def test_exported_program_is_refused(exported: bytes) -> None:
    with pytest.raises(UnsupportedFileError, match=r"torch\.export program"):
        sniff(exported)


npz = io.BytesIO()
np.savez(npz, x=np.zeros(3))


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        pytest.param(b"", CorruptFileError, "empty", id="empty"),
        pytest.param(gzip.compress(b"x"), UnsupportedFileError, "gzip", id="gzip"),
        pytest.param(b"\x89HDF\r\n\x1a\n" + bytes(100), UnsupportedFileError, "HDF5", id="hdf5"),
        pytest.param(b"\x1c\0\0\0TFL3" + bytes(100), UnsupportedFileError, "TensorFlow Lite", id="tflite"),
        pytest.param(b"\x1c\0\0\0ORTM" + bytes(100), UnsupportedFileError, r"\.ort", id="ort"),
        pytest.param(npz.getvalue(), UnsupportedFileError, "npz", id="npz"),
        pytest.param(zip_bytes("config.json", "model.weights.h5"), UnsupportedFileError, "Keras", id="keras"),
        pytest.param(zip_bytes("a.txt", "b/c"), UnsupportedFileError, "not a torch checkpoint", id="other zip"),
        pytest.param(ONNX.join([b"", b""]) + zip_bytes("a"), UnsafeFileError, "other content before", id="onnx+zip"),
        pytest.param(pickle.dumps({"a": 1}), UnsafeFileError, "bare pickle", id="pickle"),
        pytest.param(pickle.dumps({"a": 1}, protocol=0), UnsafeFileError, "bare pickle", id="text pickle"),
        pytest.param(b"cos\nsystem\n(S'true'\ntR.", UnsafeFileError, "bare pickle", id="text pickle call"),
        pytest.param(tar_bytes("sys_info", "pickle"), UnsafeFileError, "tar archive", id="torch tar"),
        pytest.param(b"sys_info".ljust(512, b"\0"), UnsafeFileError, "tar archive", id="old torch tar"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", UnsupportedFileError, "git lfs pull", id="lfs"),
        pytest.param(b"<!DOCTYPE html><html>", UnsupportedFileError, "web page", id="html"),
        pytest.param(b"hello, world", UnsupportedFileError, "known kind", id="text"),
        pytest.param(b"\x0a\x05hello", UnsupportedFileError, "known kind", id="other protobuf"),
        pytest.param(bytes(1000), UnsupportedFileError, "known kind", id="zeros"),
    ],
)
def test_other_files_are_refused_by_content(data: bytes, error: type[InputError], match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(error, match=match) as caught:
        read_source(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_legacy_torch_file_is_refused(torch_bytes: Callable[..., bytes], state: Any) -> None:
    with pytest.raises(UnsafeFileError, match=r"before 1\.6"):
        sniff(torch_bytes(state, _use_new_zipfile_serialization=False))


@pytest.mark.parametrize("prefix", [pickle.dumps({"evil": 1}), b"\0", b"PK\x03\x04"], ids=["pickle", "byte", "header"])
def test_zip_with_something_before_it_is_refused(prefix: bytes, torch_bytes: Callable[..., bytes], state: Any) -> None:
    with pytest.raises((UnsafeFileError, CorruptFileError), match="zip"):
        sniff(prefix + torch_bytes(state))


@pytest.mark.parametrize("length", [1, 100, 70_000])
def test_zip_with_something_after_it_is_refused(length: int, torch_bytes: Callable[..., bytes], state: Any) -> None:
    with pytest.raises((UnsafeFileError, CorruptFileError), match="zip archive"):
        sniff(torch_bytes(state) + b"x" * length)


def test_zip_comment_is_refused(torch_bytes: Callable[..., bytes], state: Any) -> None:
    data = torch_bytes(state)
    with pytest.raises(UnsafeFileError, match="after the end"):
        sniff(data[:-2] + b"\x05\x00hello")


def test_missing_file_and_strange_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        read_source(tmp_path / "a\x1b[31m\nb.pt")
    assert str(caught.value).isprintable()
    with pytest.raises(InputError, match="cannot be opened"):
        read_source("a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnsupportedFileError, match="FIFO"):
        read_source(tmp_path / "fifo")
    with pytest.raises(UnsupportedFileError, match="directory"):
        read_source(tmp_path)
    with pytest.raises(UnsupportedFileError, match="device"):
        read_source("/dev/zero")


def test_fifo_that_takes_the_place_of_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    honest = os.open

    def swap(target: Any, *args: Any, **options: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return honest(target, *args, **options)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(UnsupportedFileError, match="FIFO"):
        read_source(path)


def test_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with pytest.raises(LimitError, match="over the limit"):
        read_source(path)
    path.write_bytes(bytes(11))
    with pytest.raises(LimitError):
        read_source(path, Limits(max_file_bytes=10))


def test_file_that_changes_under_the_reader_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(ONNX)
    honest = os.fstat

    def grow(fd: int) -> os.stat_result:
        status = honest(fd)
        with path.open("ab") as file:
            file.write(b"more")
        return status

    monkeypatch.setattr(os, "fstat", grow)
    with pytest.raises(CorruptFileError, match="changed while"):
        read_source(path)
