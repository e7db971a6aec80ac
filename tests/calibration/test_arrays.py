"""Arrays by input name: what fits a model, what does not, and how they are cut."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efrapq.calibration.arrays import Arrays, arrays_for, load_arrays
from efrapq.calibration.signature import ModelInput
from efrapq.errors import CorruptFileError, DataError, LimitError, UnsupportedModelError

F32, F16, I64, I32, BOOL = (np.dtype(t) for t in (np.float32, np.float16, np.int64, np.int32, np.bool_))
IDS = ModelInput("ids", I64, ("N", "T"))
MASK = ModelInput("mask", I64, ("N", "T"))
X = ModelInput("x", F32, ("N", 6))
TEXT = [IDS, MASK]
TOKENS = np.arange(40).reshape(10, 4)


def same(a: Arrays, expected: dict[str, Any]) -> None:
    assert set(a.by_sample) | set(a.whole) == set(expected)
    for name, array in expected.items():
        found = a.by_sample.get(name, a.whole.get(name))
        assert found is not None
        np.testing.assert_array_equal(found, array)


def test_several_inputs_of_integers() -> None:
    found = arrays_for({"mask": np.ones((10, 4), np.int64), "ids": TOKENS}, TEXT)
    same(found, {"ids": TOKENS, "mask": np.ones((10, 4))})
    assert len(found) == 10
    assert {a.dtype for a in found.by_sample.values()} == {I64}


@pytest.mark.parametrize(
    ("given", "array", "dtype"),
    [
        (IDS, TOKENS.astype(np.int32), I64),
        (IDS, TOKENS.astype(np.uint8), I64),
        (ModelInput("ids", I32, ("N", "T")), TOKENS, I32),
        (X, np.ones((2, 6)), F32),
        (X, np.ones((2, 6), np.float16), F32),
        (ModelInput("x", F16, ("N", 6)), np.ones((2, 6), np.float32), F16),
        (ModelInput("m", BOOL, ("N",)), np.array([True, False]), BOOL),
        (ModelInput("x", np.dtype(np.uint8), ("N", 2, 2, 3)), np.full((1, 2, 2, 3), 255, np.int64), np.dtype(np.uint8)),
    ],
)
def test_widths_change_where_nothing_is_lost(given: ModelInput, array: Any, dtype: np.dtype[Any]) -> None:
    found = arrays_for({given.name: array}, [given]).by_sample[given.name]
    assert found.dtype == dtype
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    ("inputs", "arrays", "words"),
    [
        (
            TEXT,
            {"ids": TOKENS},
            "data: has no array 'mask'; the model takes 'ids' int64 (N, T), 'mask' int64 (N, T), the data hold 'ids'",
        ),
        (TEXT, {}, "has no array 'ids'"),
        (TEXT, {"ids": TOKENS, "mask": TOKENS, "typo": TOKENS}, "'typo' is no input of the model"),
        (TEXT, {"ids": TOKENS, "mask": TOKENS[:, :3]}, "dimension 'T' is 4 in array 'ids' but 3 in 'mask'"),
        (TEXT, {"ids": TOKENS, "mask": TOKENS[:9]}, "different numbers of samples: 'ids' 10, 'mask' 9"),
        ([IDS], {"ids": TOKENS.astype(np.float32)}, "array 'ids' is float32, the model takes int64"),
        ([IDS], {"ids": TOKENS > 3}, "array 'ids' is bool, the model takes int64"),
        ([X], {"x": np.ones((2, 6), np.uint8)}, "array 'x' is uint8, the model takes float32"),
        ([ModelInput("m", BOOL, ("N",))], {"m": np.ones(2, np.uint8)}, "array 'm' is uint8, the model takes bool"),
        ([X], {"x": np.ones((2, 6), np.complex64)}, "array 'x' holds complex64, not numbers"),
        ([X], {"x": np.array([["a"] * 6])}, "array 'x' holds <U1, not numbers"),
        ([ModelInput("i", I32, ("N",))], {"i": np.array([0, 2**31])}, "holds 2147483648, which int32 cannot"),
        ([ModelInput("i", np.dtype(np.uint8), ("N",))], {"i": np.array([3, -1])}, "holds -1, which uint8 cannot"),
        ([X], {"x": np.ones(6, np.float32)}, "array 'x' is (6,); the model takes (N, 6), first axis the samples"),
        ([X], {"x": np.ones((2, 6, 1), np.float32)}, "array 'x' is (2, 6, 1); the model takes (N, 6)"),
        ([X], {"x": np.ones((2, 5), np.float32)}, "axis 1 has 5, not 6"),
        ([X], {"x": np.ones((0, 6), np.float32)}, "array 'x' is empty"),
        ([X], {"x": np.full((1, 6), np.nan, np.float32)}, "array 'x' holds NaN or infinity"),
        ([X], {"x": np.full((1, 6), -np.inf, np.float32)}, "array 'x' holds NaN or infinity"),
        ([X], {"x": np.full((1, 6), 1e39)}, "array 'x' holds NaN or infinity as float32"),
        ([ModelInput("x", F32, None)], {"x": np.float32(1)}, "array 'x' is (); the model takes of any shape"),
    ],
)
def test_what_does_not_fit(inputs: list[ModelInput], arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        arrays_for(arrays, inputs, "data")


STREAM = [
    ModelInput("x", F32, ("N", 6)),
    ModelInput("state", F32, (2, 1, 3)),
    ModelInput("rate", I64, ()),
]


def test_inputs_without_an_axis_of_samples_go_with_every_chunk() -> None:
    x = np.arange(1200, dtype=np.float32).reshape(200, 6)
    state = np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    found = arrays_for({"x": x, "state": state, "rate": np.int64(16_000)}, STREAM)
    assert len(found) == 200
    chunks = found.chunks()
    assert [len(c["x"]) for c in chunks] == [128, 72]
    np.testing.assert_array_equal(np.concatenate([c["x"] for c in chunks]), x)
    for chunk in [*chunks, found.sample()]:
        np.testing.assert_array_equal(chunk["state"], state)
        assert chunk["rate"].shape == ()
        assert chunk["rate"] == 16_000
    assert found.sample()["x"].shape == (1, 6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rate": np.full(200, 16_000)}, "'rate' is (200,); this input of the model has no axis for samples"),
        ({"state": np.zeros((2, 200, 3), np.float32)}, "'state' is (2, 200, 3); this input of the model has no axis"),
        ({"state": np.full((2, 1, 3), np.nan, np.float32)}, "'state' holds NaN"),
    ],
)
def test_whole_arrays_have_exactly_their_shape(change: dict[str, Any], words: str) -> None:
    arrays = {"x": np.zeros((200, 6), np.float32), "state": np.zeros((2, 1, 3), np.float32), "rate": np.int64(1)}
    with pytest.raises(DataError, match=re.escape(words)):
        arrays_for(arrays | change, STREAM)


RECURRENT = [X, ModelInput("state", F32, (2, "N", 3)), ModelInput("rate", I64, ())]


def recurrent(count: int) -> dict[str, Any]:
    return {
        "x": np.arange(6 * count, dtype=np.float32).reshape(count, 6),
        "state": np.arange(6 * count, dtype=np.float32).reshape(2, count, 3),
        "rate": np.int64(16_000),
    }


def test_a_batch_on_another_axis_has_the_model_s_layout() -> None:
    arrays = recurrent(300)
    found = arrays_for(arrays, RECURRENT)
    assert len(found) == 300
    assert found.axes == {"x": 0, "state": 1}
    chunks = found.chunks()
    assert [found.count(chunk) for chunk in chunks] == [128, 128, 44]
    for axis, name in ((0, "x"), (1, "state")):
        np.testing.assert_array_equal(np.concatenate([c[name] for c in chunks], axis), arrays[name])
        assert all(c[name].flags.c_contiguous for c in chunks)
    assert {name: array.shape for name, array in found.sample().items()} == {
        "x": (1, 6),
        "state": (2, 1, 3),
        "rate": (),
    }
    chosen = np.sort(np.random.default_rng(4).permutation(300)[:20])
    subset = found.subset(20, seed=4)
    same(subset, {"x": arrays["x"][chosen], "state": arrays["state"][:, chosen], "rate": 16_000})
    assert len(subset) == 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": np.zeros((2, 9, 3))}, "the arrays hold different numbers of samples: 'x' 10, 'state' 9"),
        ({"state": np.zeros((2, 1, 3))}, "the arrays hold different numbers of samples: 'x' 10, 'state' 1"),
        (
            {"state": np.zeros((10, 2, 3))},
            "array 'state' is (10, 2, 3): axis 0 has 10, not 2; the model takes (2, N, 3), axis 1 the samples",
        ),
        ({"state": np.zeros((2, 3))}, "array 'state' is (2, 3); the model takes (2, N, 3), axis 1 the samples"),
        ({"state": np.zeros((2, 0, 3)), "x": np.zeros((0, 6))}, "array 'x' is empty"),
    ],
)
def test_arrays_in_another_layout(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        arrays_for(recurrent(10) | change, RECURRENT, "data")


@pytest.mark.parametrize(
    "inputs",
    [
        [X, ModelInput("table", F32, (2, "L", 3))],
        [X, ModelInput("table", F32, (2, None, None))],
        [ModelInput("x", F32, (1, 6)), ModelInput("table", F32, (2, "N", 3))],
    ],
    ids=["another name", "two dynamic axes", "a fixed batch"],
)
def test_what_is_not_certain_is_refused(inputs: list[ModelInput]) -> None:
    words = f"'table': it is not certain which axis of the model's input {inputs[1].dims_words()} counts samples"
    arrays = {"x": np.zeros((4, 6), np.float32), "table": np.zeros((2, 4, 3), np.float32)}
    with pytest.raises(UnsupportedModelError, match=re.escape(words)):
        arrays_for(arrays, inputs)


def test_dimensions_of_one_name_behind_the_samples() -> None:
    inputs = [ModelInput("x", F32, ("N", "T")), ModelInput("past", F32, (3, "N", "T", 2))]
    x = np.zeros((5, 4), np.float32)
    assert arrays_for({"x": x, "past": np.zeros((3, 5, 4, 2))}, inputs).axes == {"x": 0, "past": 1}
    with pytest.raises(DataError, match=re.escape("dimension 'T' is 4 in array 'x' but 6 in 'past'")):
        arrays_for({"x": x, "past": np.zeros((3, 5, 6, 2))}, inputs)


def test_a_fixed_batch_is_never_broken() -> None:
    found = arrays_for({"ids": np.arange(30).reshape(10, 3)}, [ModelInput("ids", I64, (4, 3))])
    assert [c["ids"].shape for c in found.chunks()] == [(4, 3), (4, 3)]
    assert found.sample()["ids"].shape == (4, 3)
    with pytest.raises(DataError, match="holds 3 samples, fewer than the 4 that the model takes at once"):
        found.subset(3, 0).chunks()


def test_long_samples_make_small_chunks() -> None:
    wide = ModelInput("x", F32, ("N", 1024))
    found = arrays_for({"x": np.zeros((20, 1024), np.float32)}, [wide])
    assert [len(c["x"]) for c in found.chunks()] == [8, 8, 4]


def test_a_model_without_samples_runs_once() -> None:
    found = arrays_for({"rate": np.int64(3)}, [ModelInput("rate", I64, ())])
    assert len(found) == 1
    assert [dict(c) for c in found.chunks()] == [{"rate": 3}]


def test_the_subset_is_that_of_images() -> None:
    found = arrays_for({"ids": TOKENS, "mask": TOKENS + 100}, TEXT).subset(4, seed=3)
    chosen = np.sort(np.random.default_rng(3).permutation(10)[:4])
    same(found, {"ids": TOKENS[chosen], "mask": TOKENS[chosen] + 100})
    whole = arrays_for({"ids": TOKENS, "mask": TOKENS}, TEXT)
    assert whole.subset(10, seed=3) is whole


# Files.


def save(path: Path, **arrays: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    return path


def test_a_file_may_hold_labels_and_nothing_else_besides(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", ids=TOKENS, mask=TOKENS, labels=np.arange(10))
    same(load_arrays(path, TEXT), {"ids": TOKENS, "mask": TOKENS})
    with pytest.raises(DataError, match=r"d\.npz: 'more', 'other' are no inputs of the model"):
        load_arrays(save(tmp_path / "d.npz", ids=TOKENS, mask=TOKENS, other=TOKENS, more=TOKENS), TEXT)


def test_names_as_exporters_write_them(tmp_path: Path) -> None:
    inputs = [ModelInput(name, I64, ("N",)) for name in ("onnx::ids.1", "serving/mask:0")]
    path = tmp_path / "d.npz"
    np.savez(path, **{"onnx::ids.1": np.arange(3), "serving/mask:0": np.arange(3, 6)})
    same(load_arrays(path, inputs), {"onnx::ids.1": [0, 1, 2], "serving/mask:0": [3, 4, 5]})


def test_a_folder_of_samples_and_batches(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    state = np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    x = np.arange(36, dtype=np.float32).reshape(6, 6)
    save(folder / "b.npz", x=x[3], state=state, rate=np.int64(8))  # one sample without its axis
    save(folder / "a.npz", x=x[:3], state=state, rate=np.int64(8))
    save(folder / "c.npz", x=x[4:], state=state, rate=np.int64(8))
    (folder / ".hidden.npz").write_bytes(b"no archive")
    (folder / "README.txt").write_text("not data")
    same(load_arrays(folder, STREAM), {"x": x, "state": state, "rate": 8})


def test_a_folder_with_the_batch_on_another_axis(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    arrays = recurrent(6)
    save(folder / "a.npz", x=arrays["x"][:3], state=arrays["state"][:, :3], rate=arrays["rate"])
    save(folder / "b.npz", x=arrays["x"][3], state=arrays["state"][:, 3], rate=arrays["rate"])
    save(folder / "c.npz", x=arrays["x"][4:], state=arrays["state"][:, 4:], rate=arrays["rate"])
    found = load_arrays(folder, RECURRENT)
    same(found, arrays)
    assert len(found) == 6
    save(folder / "d.npz", x=arrays["x"], state=np.zeros((3, 6, 3), np.float32), rate=arrays["rate"])
    with pytest.raises(DataError, match=re.escape("d.npz: array 'state' is (3, 6, 3) and (2, 3, 3) in the files")):
        load_arrays(folder, RECURRENT)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"x": np.zeros((1, 6), np.float32), "rate": np.int64(9)}, "b.npz: array 'rate' differs from the files before"),
        (
            {"x": np.zeros((1, 5), np.float32), "rate": np.int64(8)},
            "b.npz: array 'x' is (1, 5) and (2, 6) in the files",
        ),
        ({"x": np.zeros((1, 6)), "rate": np.int64(8)}, "b.npz: array 'x' is float64 and float32 in the files before"),
        ({"x": np.zeros((1, 6), np.float32)}, "b.npz: has no array 'rate'"),
        ({"x": np.float32(1), "rate": np.int64(8)}, "b.npz: array 'x' is ()"),
    ],
)
def test_files_of_a_folder_that_do_not_go_together(tmp_path: Path, second: dict[str, Any], words: str) -> None:
    inputs = [STREAM[0], STREAM[2]]
    save(tmp_path / "data" / "a.npz", x=np.zeros((2, 6), np.float32), rate=np.int64(8))
    save(tmp_path / "data" / "b.npz", **second)
    with pytest.raises(DataError, match=re.escape(words)):
        load_arrays(tmp_path / "data", inputs)


def test_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = tmp_path / "p.npz"
    np.savez(pickled, ids=np.array([object()]), mask=TOKENS)
    with pytest.raises(DataError, match="array 'ids' holds Python objects"):
        load_arrays(pickled, TEXT)
    cut = save(tmp_path / "c.npz", ids=TOKENS, mask=TOKENS)
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(CorruptFileError, match=r"c\.npz"):
        load_arrays(cut, TEXT)
    with pytest.raises(DataError, match=r"no such file or folder; save one array per input with numpy\.savez"):
        load_arrays(tmp_path / "none.npz", TEXT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no \.npz files in it; save one array per input"):
        load_arrays(tmp_path / "empty", TEXT)
    for name in ("a.npz", "b.npz"):
        save(tmp_path / "big" / name, ids=TOKENS, mask=TOKENS)
    monkeypatch.setattr("efrapq.calibration.arrays.MAX_ARRAY_BYTES", 3 * TOKENS.nbytes)
    with pytest.raises(LimitError, match="big: holds more than 960 bytes of arrays"):
        load_arrays(tmp_path / "big", TEXT)
