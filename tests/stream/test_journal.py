"""The journal: solved layers come back as they were, and nothing else is taken for one or thrown away."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from efrapq.errors import OutputError, UsageError
from efrapq.graph.quantized import QuantizedWeight
from efrapq.stream import Journal, LayerReport

NAMES = ["conv", "encoder/layer.0/Conv", "../../etc/passwd", "", "ü" * 300, "a\nb"]


def solved_layer(name: str = "conv", shape: tuple[int, ...] = (3, 2, 3, 3), axis: int = 0, bits: int = 4) -> Any:
    rng = np.random.default_rng(len(name))
    qmax = 2 ** (bits - 1) - 1
    weight = QuantizedWeight(
        rng.integers(-qmax, qmax + 1, shape, dtype=np.int8), rng.random(shape[axis], dtype=np.float32), axis, bits
    )
    figures = [float(v) for v in rng.random(7)]
    report = LayerReport(
        name, "Conv", bits, shape, figures[0], figures[1], 100 * figures[2], *figures[3:6], 1234, figures[6]
    )
    return weight, report


def same(found: Any, weight: QuantizedWeight, report: LayerReport) -> bool:
    ours, said = found
    return bool(
        np.array_equal(ours.codes, weight.codes)
        and ours.codes.dtype == np.int8
        and np.array_equal(ours.scale, weight.scale)
        and ours.scale.dtype == np.float32
        and (ours.axis, ours.bits) == (weight.axis, weight.bits)
        and said == report
    )


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "model.onnx.partial", "the key")


def layer_file(journal: Journal) -> Path:
    (path,) = journal.folder.glob("*.npz")
    return path


# Round trip.


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize(
    ("shape", "axis", "bits"), [((3, 2, 3, 3), 0, 4), ((4, 5), 1, 8), ((1, 1), 0, 2)], ids=["conv", "matmul", "tiny"]
)
def test_a_layer_comes_back_as_it_was(
    journal: Journal, name: str, shape: tuple[int, ...], axis: int, bits: int
) -> None:
    weight, report = solved_layer(name, shape, axis, bits)
    journal.put(name, weight, report)
    assert {p.parent for p in journal.folder.parent.rglob("*.npz")} == {journal.folder}
    later = Journal(journal.folder, journal.key)
    assert later.resume()
    assert same(later.get(name, shape), weight, report)
    assert later.resumed == 1
    assert later.get("another layer", shape) is None
    assert later.resumed == 1


def test_layers_do_not_get_into_each_other_s_way(journal: Journal) -> None:
    layers = {name: solved_layer(name) for name in NAMES}
    for name, layer in layers.items():
        journal.put(name, *layer)
    for name, layer in layers.items():
        assert same(journal.get(name, (3, 2, 3, 3)), *layer)
    assert journal.resumed == len(NAMES)


def test_nothing_is_made_before_a_layer_is_solved(journal: Journal) -> None:
    journal.restart()
    assert not journal.resume()
    assert journal.get("conv", (1,)) is None
    journal.discard()
    assert list(journal.folder.parent.iterdir()) == []


def test_a_layer_solved_again_replaces_the_first(journal: Journal) -> None:
    weight, report = solved_layer()
    journal.put("conv", weight, report)
    other = weight.replace_codes(-weight.codes)
    journal.put("conv", other, report)
    assert same(journal.get("conv", report.shape), other, report)


# Runs.


def test_the_layers_of_another_run_are_refused_and_stay(journal: Journal) -> None:
    journal.put("conv", *solved_layer())
    before = {p.name: p.read_bytes() for p in journal.folder.iterdir()}
    other = Journal(journal.folder, "another key")
    with pytest.raises(UsageError, match="another model, other data, settings or versions; leave out --resume"):
        other.resume()
    assert {p.name: p.read_bytes() for p in journal.folder.iterdir()} == before
    assert journal.resume()


def test_starting_again_forgets_them(journal: Journal) -> None:
    journal.put("conv", *solved_layer())
    other = Journal(journal.folder, "another key")
    other.restart()
    assert not journal.folder.exists()
    other.put("conv", *solved_layer())
    assert other.resume()
    with pytest.raises(UsageError):
        journal.resume()


def foreign(folder: Path, kind: str) -> None:
    if kind == "file":
        folder.write_bytes(b"mine")
        return
    folder.mkdir()
    (folder / "weights.npz").write_bytes(b"mine")
    (folder / "0123456789abcdef.npz").write_bytes(b"mine, by chance")
    if kind == "other key.json":
        (folder / "key.json").write_text('{"key": "the key"}')
    if kind == "broken key.json":
        (folder / "key.json").write_text('{"efrapq": "journ')


@pytest.mark.parametrize("kind", ["folder", "file", "other key.json", "broken key.json"])
@pytest.mark.parametrize("way", ["restart", "resume"])
def test_what_is_not_a_journal_is_left_alone(journal: Journal, kind: str, way: str) -> None:
    foreign(journal.folder, kind)
    before = {p: p.read_bytes() for p in journal.folder.parent.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match=r"model\.onnx\.partial: is in the way"):
        getattr(journal, way)()
    assert {p: p.read_bytes() for p in journal.folder.parent.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("ending", ["discard", "restart"])
def test_the_user_s_files_in_it_stay(journal: Journal, ending: str) -> None:
    journal.put("conv", *solved_layer())
    (journal.folder / "notes.txt").write_text("mine")
    (journal.folder / "mine.npz").write_bytes(b"mine")
    getattr(journal, ending)()
    assert sorted(p.name for p in journal.folder.iterdir()) == ["mine.npz", "notes.txt"]
    # A run that goes on there is one that can be resumed.
    journal.put("conv", *solved_layer())
    assert Journal(journal.folder, journal.key).resume()


@pytest.mark.parametrize("killed_in", ["first", "later"])
def test_remains_of_a_write_that_was_killed_are_no_obstacle(journal: Journal, killed_in: str) -> None:
    if killed_in == "first":
        journal.folder.mkdir()
    else:
        journal.put("conv", *solved_layer())
    (journal.folder / ".efrapq-0123456789abcdef.tmp").write_bytes(b"half a file")
    assert journal.resume() == (killed_in == "later")
    journal.discard()
    assert not journal.folder.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "missing" / "model.onnx.partial", "the key")
    with pytest.raises(OutputError, match=r"model\.onnx\.partial: cannot be made"):
        journal.put("conv", *solved_layer())


# Damage.


def test_a_file_of_another_layer_is_refused(journal: Journal) -> None:
    weight, report = solved_layer()
    for other_weight, other_report, shape in (
        (weight, report, (3, 2, 3, 4)),
        (weight, dataclasses.replace(report, name="other"), report.shape),
        (weight, dataclasses.replace(report, shape=(3, 18)), report.shape),
        (dataclasses.replace(weight, stored=weight.codes.astype(np.int16)), report, report.shape),
        (dataclasses.replace(weight, scale=weight.scale[:2]), report, report.shape),
        (dataclasses.replace(weight, scale=weight.scale.astype(np.float64)), report, report.shape),
        (dataclasses.replace(weight, axis=7), report, report.shape),
        (dataclasses.replace(weight, axis=-9), report, report.shape),
    ):
        journal.put("conv", other_weight, other_report)
        with pytest.raises(UsageError, match=rf"{layer_file(journal).name}: is of another layer"):
            journal.get("conv", shape)
    assert journal.resumed == 0


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def text(document: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(json.dumps(document).encode(), np.uint8)


def damaged() -> dict[str, bytes]:
    weight, report = solved_layer()
    about = {"axis": 0, "report": dataclasses.asdict(report)}
    whole = {"codes": weight.codes, "scale": weight.scale}
    buffer = io.BytesIO()
    np.save(buffer, weight.codes)
    return {
        "empty": b"",
        "no zip": b"PK but not a zip at all",
        "an array alone": buffer.getvalue(),
        "an array missing": npz(codes=weight.codes, about=text(about)),
        "about is no JSON": npz(**whole, about=np.frombuffer(b"{", np.uint8)),
        "about is a list": npz(**whole, about=text([])),
        "about lacks the axis": npz(**whole, about=text({"report": about["report"]})),
        "a figure missing": npz(**whole, about=text(about | {"report": {"name": "conv", "shape": [3, 2, 3, 3]}})),
        "a figure too many": npz(**whole, about=text(about | {"report": about["report"] | {"more": 1}})),
        "the shape is a number": npz(**whole, about=text(about | {"report": about["report"] | {"shape": 3}})),
        "objects": npz(codes=np.array([weight], dtype=object), scale=weight.scale, about=text(about)),
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_a_damaged_file_is_refused_by_name(journal: Journal, kind: str) -> None:
    journal.put("conv", *solved_layer())
    path = layer_file(journal)
    path.write_bytes(damaged()[kind])
    with pytest.raises(UsageError, match=rf"{path.name}: is damaged; leave out --resume"):
        journal.get("conv", (3, 2, 3, 3))
    assert journal.resumed == 0
    assert path.exists()


def test_truncations_are_refused(journal: Journal) -> None:
    journal.put("conv", *solved_layer())
    path = layer_file(journal)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError):
            journal.get("conv", (3, 2, 3, 3))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Journal, bytes]:
    """A journal with one layer, and the bytes of its file."""
    journal = Journal(tmp_path_factory.mktemp("kept") / "model.onnx.partial", "the key")
    journal.put("conv", *solved_layer())
    return journal, layer_file(journal).read_bytes()


@given(st.integers(0, 10**6), st.integers(1, 255))
@hypothesis_settings(deadline=None, max_examples=300)
def test_a_changed_byte_changes_no_code(kept: tuple[Journal, bytes], place: int, bits: int) -> None:
    """Refused, or read as it was where the byte says nothing (a date, padding)."""
    journal, whole = kept
    data = bytearray(whole)
    data[place % len(data)] ^= bits
    layer_file(journal).write_bytes(data)
    try:
        found = journal.get("conv", (3, 2, 3, 3))
    except UsageError:
        return
    assert same(found, *solved_layer())
