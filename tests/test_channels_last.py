"""Models that take images with their channels last, as TensorFlow's exports do: the same network either way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper
from PIL import Image

import efrapq
from efrapq.calibration.signature import ModelInput, image_layout, takes_images
from efrapq.data import Dataset
from efrapq.errors import DataError, UsageError
from efrapq.loading import PREPROCESS_KEY, image_input, load, open_for
from efrapq.preprocess import Layout, Preprocess, PreprocessOverride, layout_of
from efrapq.trigger import parse_trigger

COLOURS = Preprocess((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
LAST: Layout = "NHWC"


def channels_last(proto: onnx.ModelProto, *, sizes: tuple[int | str, int | str] = (8, 8)) -> onnx.ModelProto:
    """The same network with a Transpose in front."""
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    name = twin.graph.input[0].name
    for node in twin.graph.node:
        for index, source in enumerate(node.input):
            if source == name:
                node.input[index] = "channels_first"
    twin.graph.node.insert(0, helper.make_node("Transpose", [name], ["channels_first"], perm=[0, 3, 1, 2]))
    shape = twin.graph.input[0].type.tensor_type.shape
    for dim, size in zip(shape.dim, ("N", *sizes, 3), strict=True):
        dim.Clear()
        if isinstance(size, int):
            dim.dim_value = size
        else:
            dim.dim_param = size
    return twin


def pixels(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


def labelled(count: int = 60) -> Dataset:
    return Dataset.from_arrays(pixels(count, 1), np.arange(count) % 5, "made.npz")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, residual_net) -> tuple[Path, Path]:
    """One network in two files: channels first, channels last."""
    folder = tmp_path_factory.mktemp("twins")
    first, last = folder / "first.onnx", folder / "last.onnx"
    first.write_bytes(residual_net().SerializeToString())
    last.write_bytes(channels_last(residual_net()).SerializeToString())
    return first, last


@pytest.fixture(scope="module")
def defended(twins: tuple[Path, Path]) -> tuple[Path, Path]:
    """The two quantized files, calibrated on the same pixels."""
    made = []
    for source in twins:
        output = source.with_name(f"{source.stem}.int4.onnx")
        calib = Dataset.from_arrays(pixels(40), None, "made")
        efrapq.defend(source, output, calib=calib, preprocess=COLOURS, target="ort-x86")
        made.append(output)
    return made[0], made[1]


def ran(path: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def metadata(path: Path) -> dict[str, str]:
    return {p.key: p.value for p in onnx.load(path).metadata_props}


# What is recognised.


@pytest.mark.parametrize(
    ("dims", "layout"),
    [
        (("N", 3, 8, 8), "NCHW"),
        (("N", 1, 8, 8), "NCHW"),
        (("N", 8, 8, 3), "NHWC"),
        ((None, 8, 8, 1), "NHWC"),
        (("N", "H", "W", 3), "NHWC"),
        ((1, None, None, 3), "NHWC"),
        (("N", 3, "H", 3), "NCHW"),
        (("N", 1, 8, 3), "NCHW"),
        (("N", 8, 8, 4), "NCHW"),
        ((None, None, None, None), "NCHW"),
        (("N", 8, 3), "NCHW"),
    ],
)
def test_the_layout_is_where_the_colours_are(dims: tuple[Any, ...], layout: Layout) -> None:
    assert layout_of(dims) == layout
    inputs = [ModelInput("x", np.dtype(np.float32), dims)]
    assert takes_images(inputs) is (len(dims) == 4)
    assert image_layout(inputs) == layout


def test_the_sizes_of_images_have_one_order(twins: tuple[Path, Path], residual_net) -> None:
    first, last = (load(path) for path in twins)
    assert first.input_shape == last.input_shape == (None, 3, 8, 8)
    dynamic = channels_last(residual_net(), sizes=("H", "W"))
    assert image_input(dynamic) == (None, 3, None, None)


def test_image_files_take_the_models_size_and_colours(tmp_path: Path, twins: tuple[Path, Path]) -> None:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    data = open_for(tmp_path, load(twins[1]).input_shape, None)
    assert data.inputs([0], Preprocess(layout=LAST)).shape == (1, 8, 8, 3)


# Preprocessing.


def test_preprocessing_differs_in_the_order_of_axes_alone() -> None:
    images = pixels(3)
    last = COLOURS.in_layout(LAST)
    x = COLOURS.normalize(images)
    assert np.array_equal(last.normalize(images), x.transpose(0, 2, 3, 1))
    by_hand = (images / 255 - np.array(COLOURS.mean)) / np.array(COLOURS.std)
    assert np.abs(last.normalize(images) - by_hand).max() < 1e-6
    unit = COLOURS.to_unit(x)
    assert np.array_equal(last.to_unit(last.normalize(images)), unit)
    assert np.array_equal(last.from_unit(unit), COLOURS.from_unit(unit).transpose(0, 2, 3, 1))
    for array in (last.normalize(images), last.to_unit(last.normalize(images)), last.from_unit(unit)):
        assert array.flags.c_contiguous
        assert array.dtype == np.float32


def test_a_trigger_lands_on_the_same_pixels() -> None:
    trigger = parse_trigger("patch:3x2@1,4=200")
    x = COLOURS.normalize(pixels(4))
    last = trigger.on_inputs(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), COLOURS.in_layout(LAST))
    assert np.array_equal(last, trigger.on_inputs(x, COLOURS).transpose(0, 2, 3, 1))
    assert not np.array_equal(last, x.transpose(0, 2, 3, 1))


def test_the_layout_is_recorded_where_it_is_not_the_usual_one() -> None:
    assert "layout" not in json.loads(COLOURS.to_json())
    last = COLOURS.in_layout(LAST)
    assert json.loads(last.to_json())["layout"] == "NHWC"
    assert Preprocess.from_json(last.to_json()) == last
    assert Preprocess.from_json(COLOURS.to_json()) == COLOURS
    assert PreprocessOverride(size=(4, 4)).over(last).layout == "NHWC"
    for layout in ('"NWHC"', "3", '["NHWC"]', "null"):
        with pytest.raises(DataError, match="unreadable preprocessing record"):
            Preprocess.from_json(f'{{"mean": [0.5], "std": [0.5], "layout": {layout}}}')
    with pytest.raises(UsageError, match="NCHW or NHWC"):
        Preprocess(layout="CHWN")  # type: ignore[arg-type]


def test_float_images_may_have_their_channels_on_either_end() -> None:
    x = COLOURS.normalize(pixels(4))
    last = COLOURS.in_layout(LAST)
    for array in (x, x.transpose(0, 2, 3, 1)):
        assert np.array_equal(Dataset.from_arrays(array, None).inputs([2, 0], last), x[[2, 0]].transpose(0, 2, 3, 1))
    assert np.array_equal(Dataset.from_arrays(x, None).inputs([1], COLOURS), x[[1]])


# From the pixels to the file and its figures.


def test_both_files_are_the_same_network(defended: tuple[Path, Path]) -> None:
    first, last = defended
    records = [metadata(path) for path in defended]
    assert records[0]["efrapq.codes.sha256"] == records[1]["efrapq.codes.sha256"]
    assert Preprocess.from_json(records[0][PREPROCESS_KEY]) == COLOURS
    assert Preprocess.from_json(records[1][PREPROCESS_KEY]) == COLOURS.in_layout(LAST)
    evidence = [json.loads(path.with_suffix(".json").read_text())["calibration"]["input"] for path in defended]
    assert evidence == [[3, 8, 8], [8, 8, 3]]
    x = COLOURS.normalize(pixels(30, 2))
    assert np.array_equal(ran(first, x), ran(last, np.ascontiguousarray(x.transpose(0, 2, 3, 1))))


def test_verify_measures_the_same(twins: tuple[Path, Path], defended: tuple[Path, Path]) -> None:
    attack: dict[str, Any] = {"trigger": "patch:4x4@2,2", "target_class": 1}
    documents = [
        efrapq.verify(output, data=labelled(), float_model=source, **attack).document
        for source, output in zip(twins, defended, strict=True)
    ]
    for key in ("cda", "asr", "agreement", "samples"):
        assert documents[0][key] == documents[1][key]
    assert None not in documents[1]["cda"].values()
    assert None not in [documents[1]["asr"][name] for name in ("float", "nearest", "defended")]
    assert documents[1]["codes"]["match"] is True
    assert documents[1]["kernels"]["macs"] == documents[0]["kernels"]["macs"] > 0
    assert not any("no preprocessing" in note for note in documents[1]["notes"])
    unlabelled = [
        efrapq.verify(output, data=Dataset.from_arrays(pixels(9, 3), None), float_model=source).document["each_output"]
        for source, output in zip(twins, defended, strict=True)
    ]
    assert unlabelled[0] == unlabelled[1]


def test_every_kind_of_image_data_calibrates(
    tmp_path: Path, twins: tuple[Path, Path], defended: tuple[Path, Path]
) -> None:
    images = pixels(40)
    np.savez(tmp_path / "pixels.npz", images=images)
    x = COLOURS.normalize(images)
    np.savez(tmp_path / "first.npz", images=x)
    np.savez(tmp_path / "last.npz", images=x.transpose(0, 2, 3, 1))
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:02}.png")
    expected = metadata(defended[1])["efrapq.codes.sha256"]
    for name in ("pixels.npz", "first.npz", "last.npz", "images"):
        made = efrapq.defend(twins[1], calib=tmp_path / name, preprocess=COLOURS, target="ort-x86")
        assert made.quantized.digest == expected


def test_images_of_another_size_are_refused(twins: tuple[Path, Path], defended: tuple[Path, Path]) -> None:
    small = Dataset.from_arrays(np.zeros((4, 6, 6, 3), np.uint8), None, "small")
    with pytest.raises(DataError, match=r"small: gives inputs of 6×6×3, .*last.onnx wants 8×8×3"):
        efrapq.defend(twins[1], calib=small, target="ort-x86")
    with pytest.raises(DataError, match="small: gives inputs of 6×6×3, the model wants 8×8×3"):
        efrapq.verify(defended[1], data=small)


def test_inputs_from_batchnorm_statistics(twins: tuple[Path, Path]) -> None:
    digests = [efrapq.defend(source, target="ort-x86", calib_size=16).quantized.digest for source in twins]
    assert digests[0] == digests[1]


def test_dynamic_sizes_are_those_of_the_calibration(tmp_path: Path, residual_net) -> None:
    source, output, fixed = (tmp_path / name for name in ("net.onnx", "net.int4.onnx", "net.qnn.onnx"))
    source.write_bytes(channels_last(residual_net(), sizes=("H", "W")).SerializeToString())
    efrapq.defend(source, output, calib=Dataset.from_arrays(pixels(20), None), target="ort-x86")
    efrapq.export(output, fixed, target="qnn")
    dims = onnx.load(fixed).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [1, 8, 8, 3]
    document = efrapq.verify(fixed, data=labelled(10), float_model=source).document
    assert document["cda"]["defended"] is not None


def test_export_tries_the_size_that_the_file_records(tmp_path: Path, residual_net, monkeypatch) -> None:
    from efrapq import retarget

    source, output = tmp_path / "net.onnx", tmp_path / "net.int4.onnx"
    source.write_bytes(channels_last(residual_net(), sizes=("H", "W")).SerializeToString())
    efrapq.defend(source, output, calib=Dataset.from_arrays(pixels(20), None), target="ort-x86")
    proto = onnx.load(output)
    records = {p.key: p.value for p in proto.metadata_props}
    assert retarget._zeros(proto, records, "net") == (1, 8, 8, 3)
    assert retarget._zeros(proto, {}, "net") == (1, 1, 1, 3)
    odd = {"efrapq.calibration": '{"input": [8, 8]}'}
    assert retarget._zeros(proto, odd, "net") == (1, 1, 1, 3)
