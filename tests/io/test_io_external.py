from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import efrapq.io.external as external
from efrapq.errors import CorruptFileError, EfrapqError, InputError, LimitError, UnsafeFileError
from efrapq.io import Limits, Source, load_onnx

DATA = np.array([1, 2, 3, 4], np.float32)
PLACES = (
    "initializer",
    "Constant",
    "list",
    "branch",
    "loop",
    "function",
    "default",
    "sparse",
    "sparse node",
    "training",
)


def outside(name: str = "w", **entries: Any) -> Any:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_with(tensor: Any, place: str = "initializer") -> Any:
    """A model that holds `tensor` in some place, and "w" as an honest initializer where that place is another."""
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    constant = helper.make_node("Constant", [], ["t"], value=tensor)
    output = [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    yes = numpy_helper.from_array(np.array(True), "yes")
    honest = numpy_helper.from_array(DATA, "w")
    functions, opsets = [], [helper.make_opsetid("", 21)]
    if place == "Constant":
        nodes.append(constant)
    elif place == "list":
        node = helper.make_node("Identity", ["x"], ["t"])
        node.attribute.add(name="list", type=9).tensors.append(tensor)
        nodes.append(node)
    elif place == "branch":
        graph = helper.make_graph([constant], "branch", [], output)
        nodes.append(helper.make_node("If", ["yes"], ["i"], then_branch=graph, else_branch=graph))
    elif place == "loop":
        tensor = type(tensor).FromString(tensor.SerializeToString())
        tensor.name = "inner"
        info = [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ]
        keep = [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["inner"], ["t"])]
        results = [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), *output]
        body = helper.make_graph(keep, "body", info, results, initializer=[tensor])
        nodes.append(helper.make_node("Loop", ["", "yes"], ["l"], body=body))
    elif place in ("function", "default"):
        opsets.append(helper.make_opsetid("local", 1))
        inner = constant if place == "function" else helper.make_node("Identity", ["a"], ["t"])
        functions.append(helper.make_function("local", "F", ["a"], ["t"], [inner], opsets))
        if place == "default":
            functions[0].attribute_proto.add(name="d", type=4).t.CopyFrom(tensor)
        nodes.append(helper.make_node("F", ["x"], ["f"], domain="local"))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        initializer=[tensor if place == "initializer" else honest, yes],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    if place.startswith("sparse"):
        indices = numpy_helper.from_array(np.arange(4, dtype=np.int64), "i")
        sparse = helper.make_sparse_tensor(tensor, indices, [4])
        sparse.values.name = "t"
        if place == "sparse":
            model.graph.sparse_initializer.append(sparse)
        else:
            model.graph.node.append(helper.make_node("Constant", [], ["t"], sparse_value=sparse))
    if place == "training":
        model.training_info.add().initialization.initializer.append(tensor)
    return model


@pytest.fixture
def load(tmp_path: Path, as_source: Callable[..., Source]) -> Callable[..., Any]:
    def run(model: Any, **options: Any) -> Any:
        return load_onnx(as_source(model.SerializeToString(), tmp_path / "model.onnx"), **options)

    return run


@pytest.fixture
def no_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every opening of a file (not of a directory) an error that no reader would catch."""
    honest = os.open

    def guarded(path: Any, flags: int, *args: Any, **options: Any) -> int:
        assert flags & os.O_DIRECTORY, f"{path} was opened"
        return honest(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", guarded)


# Good external data


@pytest.mark.parametrize("place", [p for p in PLACES if p not in ("list", "training")])
def test_good_data_are_read_into_the_model(place: str, load: Any, tmp_path: Path) -> None:
    content = b"head" + DATA.tobytes() + b"tail"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights.bin").write_bytes(content)
    tensor = outside(location="sub/weights.bin", offset=4, length=16)
    loaded = load(model_with(tensor, place))
    assert loaded.external == {"sub/weights.bin": hashlib.sha256(content).hexdigest()}
    text = loaded.model.SerializeToString()
    assert DATA.tobytes() in text
    assert b"weights.bin" not in text
    if place == "initializer":
        np.testing.assert_array_equal(numpy_helper.to_array(loaded.model.graph.initializer[0]), DATA)


def test_offset_and_length_may_be_left_out(load: Any, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(DATA.tobytes())
    loaded = load(model_with(outside(location="w", checksum="ignored")))
    np.testing.assert_array_equal(numpy_helper.to_array(loaded.model.graph.initializer[0]), DATA)


def test_a_file_that_several_tensors_share_is_read_once(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w").write_bytes(DATA.tobytes() * 3)
    model = model_with(outside(location="w", offset=16))
    model.graph.initializer.append(outside("second", location="w", offset=32))
    opened: list[Any] = []
    honest = external.stream_fd
    monkeypatch.setattr(external, "stream_fd", lambda *args: opened.append(args) or honest(*args))
    assert list(load(model).external) == ["w"]
    assert len(opened) == 1


def test_model_directory_may_be_a_link(tmp_path: Path, as_source: Callable[..., Source]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "w").write_bytes(DATA.tobytes())
    (tmp_path / "link").symlink_to("real")
    source = as_source(model_with(outside(location="w")).SerializeToString(), tmp_path / "link" / "model.onnx")
    assert list(load_onnx(source).external) == ["w"]


def test_stray_description_of_a_stored_tensor_is_dropped(load: Any) -> None:
    tensor = numpy_helper.from_array(DATA, "w")
    tensor.external_data.add(key="location", value="/etc/passwd")
    assert not load(model_with(tensor)).model.graph.initializer[0].external_data


# Locations


LOCATIONS = [
    "../w",
    "sub/../../w",
    "sub/..",
    "..",
    "/etc/passwd",
    "//etc/passwd",
    "/dev/zero",
    "w\0.bin",
    "w\n",
    "\x1b[31m",
    "",
    ".",
    "./w",
    "sub//w",
    "sub/",
    "C:\\w",
    "C:w",
    "..\\w",
    "\\\\host\\share",
    "file:///etc/passwd",
    "*/_ORT_MEM_ADDR_/*/../x",
    "a/" * 2000 + "w",
]


@pytest.mark.parametrize("location", LOCATIONS, ids=lambda text: repr(text[:30]))
@pytest.mark.usefixtures("no_opening")
def test_location_outside_is_refused_before_opening(location: str, load: Any) -> None:
    with pytest.raises(UnsafeFileError, match="wants its data from") as caught:
        load(model_with(outside(location=location)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("no_opening")
def test_location_outside_is_refused_everywhere(place: str, load: Any) -> None:
    with pytest.raises(UnsafeFileError, match=r"'\.\./w', which leads out"):
        load(model_with(outside(location="../w"), place))


def test_missing_location_and_missing_file(load: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match="no path"):
        load(model_with(outside()))
    for location in ("gone", "gone/w"):
        with pytest.raises(CorruptFileError, match="is missing"):
            load(model_with(outside(location=location)))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CorruptFileError, match="is missing"):
        load(model_with(outside(location="file/w")))


# Files


def make_special(kind: str, path: Path) -> None:
    secret = path.parent / "secret"
    secret.write_bytes(DATA.tobytes())
    if kind == "symlink":
        path.symlink_to(secret)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "hardlink":
        os.link(secret, path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # socket paths are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)


@pytest.mark.parametrize("relative", [True, False], ids=["openat", "lstat"])
@pytest.mark.parametrize("kind", ["symlink", "dangling", "device", "hardlink", "fifo", "directory", "socket"])
@pytest.mark.usefixtures("no_opening")
def test_special_files_are_refused_before_opening(
    kind: str, relative: bool, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "_RELATIVE", relative)
    make_special(kind, tmp_path / "w")
    with pytest.raises(UnsafeFileError, match=r"symbolic link|hard links|not a regular file"):
        load(model_with(outside(location="w")))


@pytest.mark.parametrize("relative", [True, False], ids=["openat", "lstat"])
def test_linked_directory_is_refused(
    relative: bool, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "_RELATIVE", relative)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "w").write_bytes(DATA.tobytes())
    (tmp_path / "sub").symlink_to("real")
    assert load(model_with(outside(location="real/w"))).external
    with pytest.raises(UnsafeFileError, match="symbolic link"):
        load(model_with(outside(location="sub/w")))


@pytest.mark.parametrize("swap", ["symlink", "hardlink", "fifo", "other"])
def test_file_exchanged_between_look_and_opening(
    swap: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    path.write_bytes(DATA.tobytes())
    honest = os.open

    def exchanging(target: Any, flags: int, *args: Any, **options: Any) -> int:
        if target == "w":
            path.rename(tmp_path / "old")  # keeps its inode from being used again
            if swap == "other":
                path.write_bytes(bytes(16))
            else:
                make_special(swap, path)
        return honest(target, flags, *args, **options)

    monkeypatch.setattr(os, "open", exchanging)
    with pytest.raises((UnsafeFileError, InputError)):
        load(model_with(outside(location="w")))


# Ranges


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"offset": -1}, "offset '-1'"),
        ({"length": -16}, "length '-16'"),
        ({"offset": "+1"}, "offset"),
        ({"offset": "1_0"}, "offset"),
        ({"offset": " 1"}, "offset"),
        ({"offset": "٣"}, "offset"),
        ({"offset": "0x1"}, "offset"),
        ({"offset": ""}, "offset"),
        ({"offset": "9" * 30}, "offset"),
        ({"length": 15}, "needs 16 bytes and names 15"),
        ({"length": 17}, "needs 16 bytes and names 17"),
        ({"length": 0}, "needs 16 bytes and names 0"),
        ({"offset": 1, "length": 16}, "has 16 bytes"),
        ({"offset": 2**62}, "has 16 bytes"),
        ({"offset": 2**63 - 1}, "has 16 bytes"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_opening")
def test_range_outside_the_file_is_refused_before_opening(
    entries: dict[str, Any], match: str, load: Any, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(bytes(16))
    with pytest.raises(CorruptFileError, match=match):
        load(model_with(outside(location="w", **entries)))


@pytest.mark.usefixtures("no_opening")
def test_contradictory_descriptions(load: Any, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes(16))
    twice = outside(location="w")
    twice.external_data.add(key="location", value="../w")
    both = outside(location="w")
    both.raw_data = bytes(16)
    text = outside(location="w")
    text.data_type = TensorProto.STRING
    shape = outside(location="w")
    shape.dims[:] = [-4]
    for tensor in (twice, both, text, shape):
        with pytest.raises(CorruptFileError):
            load(model_with(tensor))


@pytest.mark.usefixtures("no_opening")
def test_data_that_would_grow_past_the_limit(load: Any, tmp_path: Path) -> None:
    with (tmp_path / "w").open("wb") as file:
        file.truncate(1 << 40)
    tensor = outside(location="w")
    tensor.dims[:] = [1 << 28]
    model = model_with(tensor)
    for i in range(3):
        model.graph.initializer.add().CopyFrom(tensor)
        model.graph.initializer[-1].name = f"copy{i}"
    with pytest.raises(LimitError, match="with its external data"):
        load(model, limits=Limits(max_external_bytes=1 << 30))


def test_huge_file_with_a_small_slice(load: Any, tmp_path: Path) -> None:
    with (tmp_path / "w").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LimitError, match="over the limit"):
        load(model_with(outside(location="w")), limits=Limits(max_onnx_bytes=1 << 20))


def test_errors_are_one_printable_line(load: Any) -> None:
    with pytest.raises(EfrapqError) as caught:
        load(model_with(outside("\x1b[2J\n", location="\u202e../x")))
    assert str(caught.value).isprintable()
