"""Datasets: what is read, how it becomes the model's input, and what every bad file is told."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import efrapq
from efrapq import pipeline
from efrapq.data import Dataset, load_dataset
from efrapq.errors import CorruptFileError, DataError, EfrapqError, LimitError, UnsafeFileError, UsageError
from efrapq.io import npz as reading
from efrapq.io.npz import ArrayFile
from efrapq.preprocess import Preprocess
from efrapq.verification import verifier

ESCAPE = "\x1b[31m"


def some_images(count: int = 6, height: int = 5, width: int = 6, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (count, height, width, channels), np.uint8)


IMAGES = some_images()
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int64)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def npy_header(shape: str, descr: str = "'|u1'", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


def crafted(path: Path, content: bytes, key: str = "images.npy", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(key, content)
    return path


def write_images(folder: Path, count: int = 3, size: tuple[int, int] = (5, 6)) -> list[NDArray[np.uint8]]:
    folder.mkdir(parents=True, exist_ok=True)
    images = list(some_images(count, *size))
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return images


def refused(path: str | Path, error: type[EfrapqError], match: str, **options: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        load_dataset(path, **options).raw([0])
    message = str(caught.value)
    assert message.isprintable()
    assert os.path.basename(str(path)).split(":")[0].replace(ESCAPE, "\\x1b[31m") in message


class TestPreprocess:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_normalize_is_the_textbook_formula(self, channels: int) -> None:
        raw = some_images(channels=channels)
        mean, std = (0.485, 0.456, 0.406, 0.5)[:channels], (0.229, 0.224, 0.225, 0.5)[:channels]
        expected = np.stack([(raw[..., c] / 255 - mean[c]) / std[c] for c in range(channels)], axis=1)
        got = Preprocess(mean, std).normalize(raw)
        assert got.dtype == np.float32
        assert got.shape == (6, channels, 5, 6)
        assert got.flags.c_contiguous
        assert np.abs(got - expected).max() < 2e-6

    def test_one_value_serves_every_channel(self) -> None:
        each = Preprocess((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).normalize(IMAGES)
        assert np.array_equal(Preprocess((0.5,), (0.25,)).normalize(IMAGES), each)

    def test_normalize_leaves_the_raw_images_alone(self) -> None:
        raw = IMAGES.copy()
        Preprocess((0.5,), (0.5,)).normalize(raw)
        assert np.array_equal(raw, IMAGES)

    @given(
        st.lists(st.tuples(st.floats(-1, 1, width=32), st.floats(0.125, 2, width=32)), min_size=3, max_size=3),
        st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=50, deadline=None)
    def test_to_unit_and_from_unit_are_inverse(self, pairs: list[tuple[float, float]], seed: int) -> None:
        preprocess = Preprocess(tuple(m for m, _ in pairs), tuple(s for _, s in pairs))
        unit = np.random.default_rng(seed).random((2, 4, 5, 3), np.float32)
        inputs = preprocess.from_unit(unit)
        assert inputs.dtype == np.float32
        assert inputs.shape == (2, 3, 4, 5)
        back = preprocess.to_unit(inputs)
        assert back.dtype == np.float32
        assert np.abs(back - unit).max() < 1e-6

    def test_from_unit_agrees_with_normalize(self) -> None:
        preprocess = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        unit = IMAGES.astype(np.float32) / np.float32(255)
        assert np.abs(preprocess.from_unit(unit) - preprocess.normalize(IMAGES)).max() < 2e-6

    def test_three_means_on_grey_images_are_refused(self) -> None:
        preprocess = Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        message = "3 values but the images have 1 channel"
        with pytest.raises(UsageError, match=message):
            preprocess.normalize(some_images(channels=1))
        with pytest.raises(UsageError, match=message):
            preprocess.to_unit(np.zeros((1, 1, 2, 2), np.float32))
        with pytest.raises(UsageError, match=message):
            preprocess.from_unit(np.zeros((1, 2, 2, 1), np.float32))

    @pytest.mark.parametrize(
        ("mean", "std", "size", "match"),
        [
            ((0.5, 0.5), (0.5,), None, "one per channel"),
            ((), (), None, "empty"),
            ((float("nan"),), (1.0,), None, "finite"),
            ((0.0,), (float("inf"),), None, "finite"),
            ((0.0,), (0.0,), None, "positive"),
            ((0.0,), (-1.0,), None, "positive"),
            ((0.0,), (1e-42,), None, "between"),
            ((123.675, 116.28, 103.53), (58.4, 57.12, 57.38), None, "divide both by 255"),
            ((0.0,), (1.0,), (0, 5), "HxW"),
            ((0.0,), (1.0,), (32, 10**9), "HxW"),
        ],
    )
    def test_senseless_numbers(self, mean: Any, std: Any, size: Any, match: str) -> None:
        with pytest.raises(UsageError, match=match):
            Preprocess(mean, std, size)

    @pytest.mark.parametrize("size", [None, (224, 200)])
    def test_json_round_trip(self, size: tuple[int, int] | None) -> None:
        preprocess = Preprocess((0.485, 0.1, 1 / 3), (0.229, 1e-3, 1.0), size)
        assert Preprocess.from_json(preprocess.to_json()) == preprocess
        assert Preprocess.from_json(json.dumps(json.loads(preprocess.to_json()), indent=4)) == preprocess

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "null",
            "[1]",
            "{}",
            '{"mean": [0.5]}',
            '{"mean": "12", "std": "34"}',
            '{"mean": [0.5], "std": [0]}',
            '{"mean": [0.5], "std": [0.5, 0.5]}',
            '{"mean": [], "std": []}',
            '{"mean": [NaN], "std": [1]}',
            '{"mean": [1e999], "std": [1]}',
            pytest.param('{"mean": [1' + "0" * 400 + '], "std": [1]}', id="huge-int"),
            '{"mean": [0], "std": [1], "size": [Infinity, 2]}',
            '{"mean": [0], "std": [1], "size": [0, 2]}',
            '{"mean": [0], "std": [1], "size": [1000000000, 1000000000]}',
            '{"mean": [0], "std": [1], "size": [2, 2, 2]}',
            '{"mean": [0], "std": [1], "size": 3}',
            '{"mean": [[0]], "std": [1]}',
            pytest.param("[" * 100_000, id="deep"),
        ],
    )
    def test_bad_records_in_metadata(self, text: str) -> None:
        with pytest.raises(DataError, match="unreadable preprocessing record: pass --mean and --std"):
            Preprocess.from_json(text)


class TestArrays:
    def test_uint8(self) -> None:
        dataset = Dataset.from_arrays(IMAGES, LABELS)
        assert (len(dataset), dataset.is_input) == (6, False)
        assert np.array_equal(dataset.raw([4, 1]), IMAGES[[4, 1]])
        assert np.array_equal(dataset.raw(range(2, 4)), IMAGES[2:4])
        assert dataset.raw([]).shape == (0, 5, 6, 3)
        preprocess = Preprocess((0.1, 0.2, 0.3), (0.5,) * 3)
        assert np.array_equal(dataset.inputs([0, 5], preprocess), preprocess.normalize(IMAGES[[0, 5]]))

    def test_grey_without_a_channel_axis(self) -> None:
        assert Dataset.from_arrays(IMAGES[..., 0], None).raw([0]).shape == (1, 5, 6, 1)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_floats_are_inputs_and_stay_as_they_are(self, dtype: Any) -> None:
        inputs = np.random.default_rng(0).normal(size=(4, 2, 5, 6)).astype(dtype)
        dataset = Dataset.from_arrays(inputs, None)
        assert dataset.is_input
        got = dataset.inputs([3, 0], Preprocess((0.5,), (0.5,)))
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        assert np.array_equal(got, inputs[[3, 0]].astype(np.float32))
        got += 1
        assert np.array_equal(dataset.inputs([3, 0], Preprocess()), inputs[[3, 0]].astype(np.float32))

    @pytest.mark.parametrize(
        ("images", "match"),
        [
            pytest.param(IMAGES.transpose(0, 3, 1, 2), "1, 3 or 4 channels", id="uint8-nchw"),
            pytest.param(IMAGES[0], "single image", id="one-image"),
            pytest.param(IMAGES[0, 0, 0], "1, 3 or 4 channels", id="one-axis"),
            pytest.param(np.uint8(3), "1, 3 or 4 channels", id="scalar"),
            pytest.param(IMAGES[:0], "no images", id="none"),
            pytest.param(IMAGES[:, :0], "no images", id="no-rows"),
            pytest.param(np.zeros((2, 3, 0, 0), np.float32), "no images", id="no-rows-float"),
            pytest.param(IMAGES.astype(np.int64), "dtype int64", id="int64"),
            pytest.param(IMAGES.astype(bool), "dtype bool", id="bool"),
            pytest.param(IMAGES.astype(np.complex64), "dtype complex64", id="complex"),
            pytest.param(IMAGES.astype(np.float32)[0], "model inputs", id="float-3d"),
            pytest.param(IMAGES.astype(np.float32), "255; store 0–255 pixels as uint8", id="float-pixels"),
            pytest.param(np.full((1, 1, 2, 2), -200.0), "reach 200", id="float-negative"),
            pytest.param(np.full((1, 1, 2, 2), 1e300), r"reach 1e\+300", id="past-float32"),
            pytest.param(np.array([[[[0.0, np.nan]]]]), "NaN or infinity", id="nan"),
            pytest.param(np.array([[[[0.0, -np.inf]]]], np.float32), "NaN or infinity", id="inf"),
        ],
    )
    def test_bad_images(self, images: Any, match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            Dataset.from_arrays(images, None, "mine")
        assert str(caught.value).startswith("mine: ")

    @pytest.mark.parametrize(
        ("labels", "match"),
        [
            pytest.param(LABELS[:5], "must be 6 integers", id="too-few"),
            pytest.param(np.eye(6, dtype=np.int64), "must be 6 integers", id="one-hot"),
            pytest.param(LABELS.astype(np.float32), "float32", id="float"),
            pytest.param(LABELS.astype(bool), "bool", id="bool"),
            pytest.param(np.int64(3), "must be 6 integers", id="scalar"),
            pytest.param(np.array([0, 1, -3, 0, 0, -1]), "label -3 at position 2", id="negative"),
            pytest.param(
                np.array([0, 1, 2**64 - 1, 0, 0, 0], np.uint64), f"label {2**64 - 1} at position 2", id="huge"
            ),
        ],
    )
    def test_bad_labels(self, labels: Any, match: str) -> None:
        with pytest.raises(DataError, match=match):
            Dataset.from_arrays(IMAGES, labels, "mine")

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
    def test_labels_become_int64(self, dtype: Any) -> None:
        got = Dataset.from_arrays(IMAGES, LABELS.astype(dtype)[:, None]).require_labels(3)
        assert got.dtype == np.int64
        assert np.array_equal(got, LABELS)

    def test_labels_beyond_the_model(self) -> None:
        dataset = Dataset.from_arrays(IMAGES, LABELS, "mine")
        with pytest.raises(DataError, match="mine: label 2 at position 2, but the model has only 2 classes"):
            dataset.require_labels(2)

    def test_no_labels(self) -> None:
        with pytest.raises(DataError, match="has no labels"):
            Dataset.from_arrays(IMAGES, None).require_labels()


class TestSelection:
    dataset = Dataset.from_arrays(np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1), np.arange(200))

    def test_subset_is_deterministic_ordered_and_without_repeats(self) -> None:
        first, again = self.dataset.subset(50, seed=3), self.dataset.subset(50, seed=3)
        chosen = first.raw(range(50)).ravel()
        assert np.array_equal(chosen, again.raw(range(50)).ravel())
        assert np.all(np.diff(chosen.astype(int)) > 0)
        assert np.array_equal(first.require_labels(), chosen)
        assert not np.array_equal(chosen, self.dataset.subset(50, seed=4).raw(range(50)).ravel())

    def test_a_subset_of_everything_is_everything(self) -> None:
        assert self.dataset.subset(200, 0) is self.dataset
        assert self.dataset.subset(10**9, 0) is self.dataset

    def test_a_selection_of_a_selection(self) -> None:
        inner = self.dataset.select(np.array([9, 7, 5])).select(np.array([2, 0]))
        assert inner.raw([0, 1]).ravel().tolist() == [5, 9]
        assert inner.require_labels().tolist() == [5, 9]

    @pytest.mark.parametrize("count", [0, -1])
    def test_nothing_cannot_be_drawn(self, count: int) -> None:
        with pytest.raises(UsageError, match="at least 1"):
            self.dataset.subset(count, 0)

    @pytest.mark.parametrize(("size", "lengths"), [(64, [64, 64, 64, 8]), (200, [200]), (999, [200])])
    def test_batches_cover_everything_once(self, size: int, lengths: list[int]) -> None:
        batches = list(self.dataset.batches(size))
        assert [len(b) for b in batches] == lengths
        assert [i for b in batches for i in b] == list(range(200))

    @pytest.mark.parametrize("size", [0, -5])
    def test_empty_batches(self, size: int) -> None:
        with pytest.raises(UsageError, match="at least 1"):
            list(self.dataset.batches(size))


class TestNpz:
    @pytest.mark.parametrize("names", [("images", "labels"), ("x", "y")])
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_plain(self, tmp_path: Path, names: tuple[str, str], save: Any) -> None:
        save(tmp_path / "d.npz", **dict(zip(names, (IMAGES, LABELS), strict=True)))
        dataset = load_dataset(tmp_path / "d.npz")
        assert np.array_equal(dataset.raw(range(6)), IMAGES)
        assert np.array_equal(dataset.require_labels(), LABELS)

    @pytest.mark.parametrize("form", ["x_{}", "{}_x", "{}_images"])
    @pytest.mark.parametrize("as_option", [False, True])
    def test_splits(self, tmp_path: Path, form: str, as_option: bool) -> None:
        other = {"x_{}": "y_{}", "{}_x": "{}_y", "{}_images": "{}_labels"}[form]
        arrays: dict[str, Any] = {form.format(s): IMAGES[i : i + 2] for i, s in enumerate(("train", "test"))}
        arrays |= {other.format(s): LABELS[i : i + 2, None] for i, s in enumerate(("train", "test"))}
        path = npz(tmp_path / "d.npz", **arrays)
        dataset = load_dataset(path, split="test") if as_option else load_dataset(f"{path}:test")
        assert np.array_equal(dataset.raw([0, 1]), IMAGES[1:3])
        assert dataset.require_labels().tolist() == [1, 2]
        refused(path, DataError, r"several splits; name one, e\.g\. .*d\.npz:train")
        refused(f"{path}:val", DataError, "has no array 'val_images' or 'val_x' or 'x_val'; it holds: ")
        refused(f"{path}:", UsageError, "a split is one of the sets")

    def test_a_colon_in_the_name_is_not_always_a_split(self, tmp_path: Path) -> None:
        odd = tmp_path / "a.npz:train"
        with odd.open("wb") as file:
            np.savez(file, images=IMAGES)
        assert len(load_dataset(odd)) == 6
        (tmp_path / "b.npz:c").mkdir()
        assert len(load_dataset(npz(tmp_path / "b.npz:c" / "d.npz", images=IMAGES))) == 6

    def test_without_labels(self, tmp_path: Path) -> None:
        assert load_dataset(npz(tmp_path / "d.npz", images=IMAGES)).labels is None

    def test_fortran_order_is_kept_straight(self, tmp_path: Path) -> None:
        path = npz(tmp_path / "d.npz", images=np.asfortranarray(IMAGES))
        assert np.array_equal(load_dataset(path).raw(range(6)), IMAGES)

    def test_only_the_arrays_asked_for_are_unpacked(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.writestr("train_x.npy", b"rubbish")
            buffer = io.BytesIO()
            np.save(buffer, IMAGES)
            archive.writestr("test_x.npy", buffer.getvalue())
        assert len(load_dataset(tmp_path / "d.npz", split="test")) == 6

    def test_names_are_escaped(self, tmp_path: Path) -> None:
        refused(npz(tmp_path / f"{ESCAPE}.npz", **{f"{ESCAPE}evil": IMAGES}), DataError, "holds: '.x1b.31mevil'")
        refused(f"{npz(tmp_path / 'd.npz', q=IMAGES)}:{ESCAPE}", DataError, "has no array '.x1b")
        refused(tmp_path / f"{ESCAPE}none", DataError, "no such file")
        refused(npz(tmp_path / f"{ESCAPE}2.npz", images=IMAGES.astype(int)), DataError, "int64")

    def test_many_names_are_not_all_listed(self, tmp_path: Path) -> None:
        path = npz(tmp_path / "d.npz", **{f"a{i:03}": LABELS for i in range(50)})
        refused(path, DataError, r"'a009' and 40 more$")


class TestHostileNpz:
    def test_objects(self, tmp_path: Path) -> None:
        refused(npz(tmp_path / "d.npz", images=np.array([{}, "x"], object)), DataError, "holds Python objects")
        refused(npz(tmp_path / "e.npz", images=IMAGES, labels=np.array([None] * 6)), DataError, "holds Python objects")
        nested = crafted(tmp_path / "f.npz", npy_header("(1,)", "[('a', '|O')]") + bytes(8))
        refused(nested, DataError, "holds Python objects")

    @pytest.mark.parametrize(
        "array",
        [np.array(["cat"] * 6), np.array([b"cat"] * 6), np.zeros(6, [("a", "u1")]), np.zeros(6, "datetime64[s]")],
        ids=["text", "bytes", "structured", "dates"],
    )
    def test_what_is_no_number(self, tmp_path: Path, array: Any) -> None:
        refused(npz(tmp_path / "d.npz", images=IMAGES, labels=array), DataError, "not numbers")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"", "not an .npz file"),
            (b"hello", "not an .npz file"),
            (b"\x89PNG\r\n\x1a\n", "not an .npz file"),
            (b"\x80\x04K\x01.", "not an .npz file"),
            (npy_header(f"({10**12},)"), "single array"),
        ],
        ids=["empty", "text", "png", "pickle", "npy"],
    )
    def test_other_files(self, tmp_path: Path, content: bytes, match: str) -> None:
        (tmp_path / "d.npz").write_bytes(content)
        refused(tmp_path / "d.npz", DataError, match)

    @pytest.mark.parametrize(
        ("shape", "descr"),
        [
            (f"({10**15},)", "'|u1'"),
            (f"({2**62}, {2**62}, 4)", "'<f8'"),
            ("(3,)", "'|u1'"),
            ("(-2, -2)", "'|u1'"),
            ("(-4,)", "'|u1'"),
            ("()", "'|u1'"),
        ],
        ids=["huge", "overflow", "short", "negative-pair", "negative", "scalar"],
    )
    def test_a_header_that_lies_gets_no_memory(self, tmp_path: Path, shape: str, descr: str) -> None:
        refused(
            crafted(tmp_path / "d.npz", npy_header(shape, descr) + bytes(4)),
            CorruptFileError,
            "the archive holds .* bytes",
        )

    @pytest.mark.parametrize("descr", ["'|V0'", "'<U0'", "('u1', (1000000000,))"])
    def test_odd_dtypes_that_would_fool_the_arithmetic(self, tmp_path: Path, descr: str) -> None:
        refused(crafted(tmp_path / "d.npz", npy_header(f"({2**61},)", descr)), DataError, "not numbers")

    @pytest.mark.parametrize(
        "text",
        [
            "(" * 9000,
            "-" * 9000,
            "'''\n",
            " \n  x\n y",
            "{{}: 1}",
            "{'descr': ',', 'fortran_order': False, 'shape': (1,)}",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (1,)}" + " " * 20000,
            "{'descr': '|u1'}",
            "__import__('os')",
        ],
        ids=lambda text: text.strip()[:12],
    )
    def test_unreadable_headers(self, tmp_path: Path, text: str) -> None:
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
        refused(crafted(tmp_path / "d.npz", content), CorruptFileError, "damaged|unreadable header")

    @pytest.mark.parametrize("version", [b"\x03\x00", b"\x09\x00"])
    def test_versions(self, tmp_path: Path, version: bytes) -> None:
        with pytest.raises((DataError, CorruptFileError), match="version"):
            load_dataset(crafted(tmp_path / "d.npz", npy_header("(4,)", version=version) + bytes(4)))

    def test_zip_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "d.npz"
        np.savez_compressed(path, images=np.zeros((100, 100, 100), np.uint8))
        assert path.stat().st_size < 5000
        assert len(load_dataset(path)) == 100
        monkeypatch.setattr(reading, "FREE_ARRAY_BYTES", 1 << 16)
        refused(path, LimitError, r"would unpack from [\d,]+ bytes to 1,000,128")
        monkeypatch.setattr(reading, "MAX_ARRAY_BYTES", 1 << 17)
        refused(path, LimitError, "over the limit of 131,072")

    def test_a_directory_that_promises_more_than_there_is(self, tmp_path: Path) -> None:
        path = crafted(tmp_path / "d.npz", npy_header("(10, 10, 10)") + bytes(1000), compression=zipfile.ZIP_DEFLATED)
        data = bytearray(path.read_bytes())
        entry = data.index(b"PK\x01\x02")
        struct.pack_into("<L", data, entry + 24, 2**32 - 2)
        path.write_bytes(data)
        refused(path, LimitError, r"would unpack from [\d,]+ bytes to 4,294,967,294")

    def test_what_is_there_must_match_its_checksum(self, tmp_path: Path) -> None:
        path = npz(tmp_path / "d.npz", images=IMAGES)
        data = bytearray(path.read_bytes())
        at = data.index(IMAGES.tobytes()[:16])
        data[at] ^= 1
        path.write_bytes(data)
        refused(path, CorruptFileError, "damaged .*CRC")

    def test_broken_compression(self, tmp_path: Path) -> None:
        path = crafted(tmp_path / "d.npz", npy_header("(540,)") + IMAGES.tobytes(), compression=8)
        data = bytearray(path.read_bytes())
        start = 30 + len("images.npy")
        data[start : start + 20] = b"\xff" * 20
        path.write_bytes(data)
        refused(path, CorruptFileError, "damaged")

    @pytest.mark.parametrize("sixteenths", range(1, 16))
    def test_cut_off(self, tmp_path: Path, sixteenths: int) -> None:
        path = npz(tmp_path / "d.npz", images=IMAGES, labels=LABELS)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * sixteenths // 16])
        refused(path, CorruptFileError, "copy or download it again")

    def test_encrypted(self, tmp_path: Path) -> None:
        path = npz(tmp_path / "d.npz", images=IMAGES)
        data = bytearray(path.read_bytes())
        data[data.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(data)
        refused(path, UnsafeFileError, "encrypted")

    @pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_compression(self, tmp_path: Path, compression: int) -> None:
        refused(crafted(tmp_path / "d.npz", b"x", compression=compression), CorruptFileError, "NumPy does not use")

    def test_twice_the_same_name(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.writestr("images", b"x")
            archive.writestr("images.npy", b"x")
        refused(tmp_path / "d.npz", CorruptFileError, "'images' twice")

    def test_too_many_members(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            for i in range(1001):
                archive.writestr(str(i), b"")
        refused(tmp_path / "d.npz", LimitError, "1,001 zip members")

    def test_bytes_around_the_archive(self, tmp_path: Path) -> None:
        path = npz(tmp_path / "d.npz", images=IMAGES)
        path.write_bytes(path.read_bytes() + b"more")
        refused(path, UnsafeFileError, "after the end")

    def test_special_files(self, tmp_path: Path) -> None:
        refused(Path("/dev/zero"), DataError, "not a regular file")
        os.mkfifo(tmp_path / "fifo.npz")
        refused(tmp_path / "fifo.npz", DataError, "not a regular file")

    def test_too_large_a_file(self, tmp_path: Path) -> None:
        with (tmp_path / "d.npz").open("wb") as file:
            file.truncate(5 << 30)
        refused(tmp_path / "d.npz", LimitError, "use fewer images")

    @pytest.mark.parametrize("name", ["none.npz", "x" * 5000, "a\0b"], ids=["missing", "long", "nul"])
    def test_paths_that_lead_nowhere(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match=r"no such file|cannot be opened"):
            load_dataset(tmp_path / name)
        with pytest.raises(DataError, match=r"no such file|cannot be opened"):
            ArrayFile(tmp_path / name)

    @given(st.data())
    @settings(max_examples=150, deadline=None)
    def test_damage_anywhere_is_an_error_of_ours_or_harmless(self, data: st.DataObject) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=IMAGES[:2], labels=LABELS[:2])
        content = bytearray(buffer.getvalue())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = Path(reading.__file__).with_name("never-written")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "_read_file", lambda *_: bytes(content))
            try:
                file = ArrayFile(path)
                images = file["images"] if "images" in file.keys else IMAGES[:2]
            except EfrapqError:
                return
        assert images.size == IMAGES[:2].size


class TestFolders:
    def test_flat(self, tmp_path: Path) -> None:
        images = write_images(tmp_path / "f")
        (tmp_path / "f" / "notes.txt").write_text("not an image")
        dataset = load_dataset(tmp_path / "f")
        assert np.array_equal(dataset.raw([2, 0]), np.stack([images[2], images[0]]))
        assert (dataset.labels, dataset.classes, dataset.is_input) == (None, None, False)
        assert dataset.raw([]).shape == (0, 5, 6, 3)

    def test_class_folders(self, tmp_path: Path) -> None:
        for i, name in enumerate(["dog", "cat", "10", "9"]):
            write_images(tmp_path / name, i + 1)
        write_images(tmp_path / "dog" / "puppies", 1)
        for hidden in (".git", "__MACOSX", ".ipynb_checkpoints"):
            write_images(tmp_path / hidden, 1)
        (tmp_path / "cat" / "._000.png").write_bytes(b"\0\5\26\7")
        dataset = load_dataset(tmp_path)
        assert dataset.classes == ("10", "9", "cat", "dog")
        assert dataset.require_labels(4).tolist() == [0] * 3 + [1] * 4 + [2] * 2 + [3] * 2
        assert dataset.raw(range(len(dataset))).shape == (11, 5, 6, 3)

    def test_an_empty_class_keeps_its_number(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        write_images(tmp_path / "b", 1)
        assert load_dataset(tmp_path).require_labels().tolist() == [1]

    def test_grey_on_request(self, tmp_path: Path) -> None:
        grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
        Image.fromarray(grey).save(tmp_path / "a.png")
        assert np.array_equal(load_dataset(tmp_path, channels=1).raw([0]), grey[None, ..., None])
        assert np.array_equal(load_dataset(tmp_path).raw([0]), np.repeat(grey[None, ..., None], 3, 3))

    def test_empty(self, tmp_path: Path) -> None:
        refused(tmp_path, DataError, "no images in it")
        (tmp_path / "a.txt").write_text("")
        (tmp_path / "cat").mkdir()
        refused(tmp_path, DataError, "no images in it")

    def test_images_beside_folders(self, tmp_path: Path) -> None:
        write_images(tmp_path)
        write_images(tmp_path / "cat")
        refused(tmp_path, DataError, "both images and folders")

    def test_a_folder_has_no_splits(self, tmp_path: Path) -> None:
        write_images(tmp_path)
        refused(tmp_path, UsageError, "a split is", split="train")

    def test_a_folder_that_may_not_be_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(_: Path) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", forbidden)
        refused(tmp_path, DataError, r"cannot be listed \(Permission denied\)")

    def test_read_lazily(self, tmp_path: Path) -> None:
        write_images(tmp_path, 20)
        dataset = load_dataset(tmp_path).subset(10, seed=1)
        for path in sorted(tmp_path.iterdir())[1:]:
            path.unlink()
        with pytest.raises(DataError, match=r"\.png: not a readable image \(No such file"):
            dataset.raw([9])

    def test_one_corrupt_image_among_many(self, tmp_path: Path) -> None:
        write_images(tmp_path, 5)
        bad = tmp_path / f"003{ESCAPE}.png"
        (tmp_path / "003.png").rename(bad)
        for content in (b"", b"hello", bytes(100), (tmp_path / "002.png").read_bytes()[:60]):
            bad.write_bytes(content)
            dataset = load_dataset(tmp_path)
            assert dataset.raw([0, 1, 2, 4]).shape == (4, 5, 6, 3)
            with pytest.raises(DataError, match=r"003\\x1b\[31m\.png: not a") as caught:
                dataset.raw(range(5))
            assert str(caught.value).isprintable()

    def test_the_first_image_corrupt(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"hello")
        with pytest.raises(DataError, match=r"a\.png: not an image of a known type"):
            load_dataset(tmp_path)
        dataset = load_dataset(tmp_path, size=(2, 2))
        with pytest.raises(DataError, match=r"a\.png: not an image of a known type"):
            dataset.raw([0])

    def test_damage_anywhere_is_named(self, tmp_path: Path) -> None:
        """Every cut of every format, and random bytes: the image's own name, never a stranger's exception."""
        rng = np.random.default_rng(0)
        image = Image.fromarray(some_images(1, 40, 40)[0])
        for suffix in ("png", "jpg", "bmp", "webp", "gif", "tif", "ppm"):
            path = tmp_path / f"a.{suffix}"
            image.save(path)
            whole = path.read_bytes()
            for trial in range(16):
                damaged = bytearray(whole[: len(whole) * trial // 16] if trial % 2 else whole)
                for _ in range(trial * 3 if damaged else 0):
                    damaged[rng.integers(min(len(damaged), 300))] = rng.integers(256)
                path.write_bytes(damaged)
                message = f"a.{suffix}: "
                try:
                    load_dataset(tmp_path).raw([0])
                except (DataError, LimitError) as exc:
                    message = str(exc)
                assert f"a.{suffix}: " in message
            path.unlink()

    def test_sizes_that_differ(self, tmp_path: Path) -> None:
        write_images(tmp_path, 2)
        Image.new("RGB", (9, 7)).save(tmp_path / "b.png")
        dataset = load_dataset(tmp_path)
        with pytest.raises(DataError, match=r"b\.png: is 7x9 but the first image is 5x6; pass --size"):
            dataset.raw([2])
        assert load_dataset(tmp_path, size=(6, 8)).raw(range(3)).shape == (3, 6, 8, 3)

    @pytest.mark.parametrize("size", [(0, 4), (-1, 4), (4, 10**7)])
    def test_senseless_sizes(self, tmp_path: Path, size: tuple[int, int]) -> None:
        write_images(tmp_path)
        with pytest.raises(UsageError, match="HxW"):
            load_dataset(tmp_path, size=size)

    def test_resizing_keeps_the_middle_and_the_aspect(self, tmp_path: Path) -> None:
        wide = np.zeros((10, 30, 3), np.uint8)
        wide[:, 10:20] = 200
        Image.fromarray(wide).save(tmp_path / "a.png")
        assert np.all(load_dataset(tmp_path, size=(10, 10)).raw([0]) == 200)
        assert np.all(load_dataset(tmp_path, size=(5, 5)).raw([0])[0, :, 1:-1] == 200)


class TestImageModes:
    def read(self, tmp_path: Path, image: Image.Image, name: str = "a.png", **options: Any) -> NDArray[np.generic]:
        image.save(tmp_path / name, **options)
        return np.asarray(load_dataset(tmp_path).raw([0])[0])

    def test_grey(self, tmp_path: Path) -> None:
        grey = IMAGES[0, ..., 0]
        assert np.array_equal(self.read(tmp_path, Image.fromarray(grey)), np.repeat(grey[..., None], 3, 2))

    def test_one_bit(self, tmp_path: Path) -> None:
        got = self.read(tmp_path, Image.fromarray(np.array([[True, False]])))
        assert got[0].tolist() == [[255] * 3, [0] * 3]

    def test_palette(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        assert self.read(tmp_path, image).tolist() == [[[10, 20, 30], [200, 100, 50]]]

    def test_palette_with_a_transparent_entry(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        got = self.read(tmp_path, image, transparency=b"\x00\xff")
        assert got.tolist() == [[[0, 0, 0], [200, 100, 50]]]

    def test_alpha_lies_over_black(self, tmp_path: Path) -> None:
        rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 128]]], np.uint8)
        got = self.read(tmp_path, Image.fromarray(rgba))
        assert got[0, :2].tolist() == [[200, 100, 50], [0, 0, 0]]
        assert np.abs(got[0, 2].astype(int) - [100, 50, 25]).max() <= 1
        grey = np.array([[[200, 255], [200, 0]]], np.uint8)
        assert self.read(tmp_path, Image.fromarray(grey, "LA")).tolist() == [[[200] * 3, [0] * 3]]

    def test_cmyk(self, tmp_path: Path) -> None:
        cmyk = np.zeros((16, 16, 4), np.uint8)
        cmyk[..., 1:3] = 255
        got = self.read(tmp_path, Image.fromarray(cmyk, "CMYK"), "a.jpg", quality=100)
        assert np.abs(got.astype(int) - [255, 0, 0]).max() <= 3

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_sixteen_bits_keep_the_high_byte(self, tmp_path: Path, suffix: str) -> None:
        values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
        if suffix == "pgm":
            (tmp_path / "a.pgm").write_bytes(b"P5\n5 1\n65535\n" + values.astype(">u2").tobytes())
        else:
            Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        assert load_dataset(tmp_path).raw([0])[0, 0].tolist() == [[v] * 3 for v in (0, 0, 1, 0x80, 0xFF)]
        assert load_dataset(tmp_path, channels=1).raw([0])[0, 0].ravel().tolist() == [0, 0, 1, 0x80, 0xFF]

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_thirty_two_bits_have_no_range(self, tmp_path: Path, dtype: Any) -> None:
        with pytest.raises(DataError, match=r"a\.tif: 32-bit pixels"):
            self.read(tmp_path, Image.fromarray(np.zeros((2, 2), dtype)), "a.tif")

    def test_portrait_photos_stand_upright(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = some_images(1, 4, 7)[0]
        got = self.read(tmp_path, Image.fromarray(pixels), exif=exif.tobytes())
        assert np.array_equal(got, np.rot90(pixels, -1))

    def test_the_content_counts_not_the_name(self, tmp_path: Path) -> None:
        Image.fromarray(IMAGES[0]).save(tmp_path / "a.jpg", format="PNG")
        assert np.array_equal(load_dataset(tmp_path).raw([0])[0], IMAGES[0])

    @pytest.mark.parametrize("file_format", ["EPS", "ICO", "PCX"])
    def test_other_decoders_are_never_reached(self, tmp_path: Path, file_format: str) -> None:
        Image.new("RGB", (16, 16)).save(tmp_path / "a.png", format=file_format)
        with pytest.raises(DataError, match="not an image of a known type"):
            load_dataset(tmp_path)

    @pytest.mark.parametrize("side", [9_001, 30_000])
    def test_an_image_that_would_fill_the_memory(self, tmp_path: Path, side: int) -> None:
        def chunk(kind: bytes, content: bytes) -> bytes:
            return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))

        header = chunk(b"IHDR", struct.pack(">LLBBBBB", side, side, 8, 2, 0, 0, 0))
        png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(png)
        with pytest.raises(LimitError, match=r"a\.png: .*80,000,000"):
            load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["nosuch.npz", "nosuch.npz:train", "x" * 5000, "a\0b"])
def test_data_that_are_not_there_are_missed_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a network can take a minute, which a slip in the next argument would waste."""

    def load(*given: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(pipeline, "load", load)
    monkeypatch.setattr(verifier, "read_source", load)
    for call in (partial(efrapq.defend, calib=tmp_path / name), partial(efrapq.verify, data=tmp_path / name)):
        with pytest.raises(DataError, match="no such file or folder"):
            call(tmp_path / "model.pt")
