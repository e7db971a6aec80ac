"""Triggers: the grammar, the pixels that they set, and that they set no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from efrapq.errors import CorruptFileError, DataError, EfrapqError, UsageError
from efrapq.preprocess import Preprocess
from efrapq.trigger import GRAMMAR, parse_trigger

IMAGENET = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocess((0.2860,), (0.3530,))


def some_images(count: int = 4, height: int = 8, width: int = 9, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (count, height, width, channels), np.uint8)


def picture(path: Path, pixels: Any) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


@pytest.fixture
def specs(tmp_path: Path) -> dict[str, str]:
    """One trigger of each form, fit for 8x9 images of any channels."""
    rng = np.random.default_rng(6)
    small = picture(tmp_path / "small.png", rng.integers(0, 256, (3, 2, 4)))
    whole = picture(tmp_path / "whole.png", rng.integers(0, 256, (8, 9, 3)))
    np.savez(tmp_path / "t.npz", mask=rng.random((8, 9)), pattern=rng.random((8, 9)))
    return {
        "patch": "patch:2x3@1,4",
        "value": "patch:2x3@1,4=77",
        "max": "max:2x3@1,4",
        "picture": f"{small}@4,5",
        "npz": str(tmp_path / "t.npz"),
        "blend": f"blend:{whole}@0.2",
    }


FORMS = ["patch", "value", "max", "picture", "npz", "blend"]


def test_the_label_names_no_folder(specs: dict[str, str]) -> None:
    assert {form: parse_trigger(spec).label for form, spec in specs.items()} == {
        "patch": "patch:2x3@1,4",
        "value": "patch:2x3@1,4=77",
        "max": "max:2x3@1,4",
        "picture": "small.png@4,5",
        "npz": "t.npz",
        "blend": "blend:whole.png@0.2",
    }


class TestEveryForm:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("channels", [1, 3])
    def test_copies_of_the_same_kind(self, specs: dict[str, str], form: str, channels: int) -> None:
        raw = some_images(channels=channels)
        before = raw.copy()
        trigger = parse_trigger(specs[form])
        got = trigger.on_raw(raw)
        assert trigger.spec == specs[form]
        assert (trigger.path is not None) == (form in ("picture", "npz", "blend"))
        assert got.dtype == np.uint8
        assert got.shape == raw.shape
        assert not np.shares_memory(got, raw)
        assert np.array_equal(raw, before)
        assert not np.array_equal(got, raw)
        assert trigger.on_raw(raw[:0]).shape == (0, *raw.shape[1:])

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "preprocess", [GREY, IMAGENET, Preprocess((0.0,), (1 / 255,))], ids=["grey", "rgb", "0-255"]
    )
    def test_inputs_get_what_the_raw_images_got(self, specs: dict[str, str], form: str, preprocess: Preprocess) -> None:
        raw = some_images(channels=1 if preprocess is GREY else 3)
        inputs = preprocess.normalize(raw)
        before = inputs.copy()
        trigger = parse_trigger(specs[form])
        got = trigger.on_inputs(inputs, preprocess)
        assert got.dtype == np.float32
        assert got.shape == inputs.shape
        assert got.flags.c_contiguous
        assert np.array_equal(inputs, before)
        assert not np.shares_memory(got, inputs)
        # on_raw rounds to whole pixels: half a step at most, in the units of the inputs.
        half_step = (0.5 / 255 + 1e-6) / np.array(preprocess.std).reshape(1, -1, 1, 1)
        expected = preprocess.normalize(trigger.on_raw(raw))
        assert np.all(np.abs(got - expected) <= half_step + 1e-5 * np.abs(expected))

    @pytest.mark.parametrize("form", ["patch", "value", "max", "picture"])
    def test_inputs_keep_every_bit_outside_the_trigger(self, specs: dict[str, str], form: str) -> None:
        inputs = np.random.default_rng(1).normal(size=(3, 3, 8, 9)).astype(np.float32)
        got = parse_trigger(specs[form]).on_inputs(inputs, IMAGENET)
        changed = np.argwhere((got != inputs).any(axis=(0, 1)))
        rows, cols = (range(4, 7), range(5, 7)) if form == "picture" else (range(1, 3), range(4, 7))
        assert len(changed)
        assert {tuple(p) for p in changed} <= {(r, c) for r in rows for c in cols}

    @pytest.mark.parametrize("form", ["patch", "max", "picture"])
    def test_outside_of_the_image(self, specs: dict[str, str], form: str) -> None:
        trigger = parse_trigger(specs[form])
        for height, width in ((2, 9), (8, 6), (1, 1)):
            with pytest.raises(UsageError, match=rf"the trigger covers rows .* the images are {height}x{width}"):
                trigger.on_raw(some_images(1, height, width))
            with pytest.raises(UsageError, match="the trigger covers"):
                trigger.on_inputs(np.zeros((1, 3, height, width), np.float32), IMAGENET)

    @pytest.mark.parametrize("form", ["npz", "blend"])
    def test_another_size_than_the_images(self, specs: dict[str, str], form: str) -> None:
        with pytest.raises(UsageError, match="8x9, the images 9x8"):
            parse_trigger(specs[form]).on_raw(some_images(1, 9, 8))

    def test_means_for_other_channels(self, specs: dict[str, str]) -> None:
        with pytest.raises(UsageError, match="3 values but the images have 1 channel"):
            parse_trigger(specs["patch"]).on_inputs(np.zeros((1, 1, 8, 9), np.float32), IMAGENET)


class TestGrammar:
    @pytest.mark.parametrize(
        "spec",
        [
            "",
            "patch",
            "patch:",
            "patch:6x6",
            "patch:6x6@1",
            "patch:6x6@1,",
            "patch:6@1,1",
            "patch:-6x6@1,1",
            "patch:6x6@-1,1",
            "patch:6x6@1,1=",
            "patch:6x6@1,1=-3",
            "patch:6x6@1,1=white",
            "patch:6x6@1,1=1e1",
            "patch:6x6@1,1 ",
            " patch:6x6@1,1",
            "patch:6x6@1,1\n",
            "patch: 6x6@1,1",
            "PATCH:6x6@1,1",
            "patch:1.5x6@1,1",
            "patch:6x6@1,1=1.",
            "patch:٣x٣@1,1",
            "patch:0x6@1,1",
            "patch:6x0@1,1",
            pytest.param("patch:6x" + "9" * 5000 + "@1,1", id="5000-digits"),
            pytest.param("patch:6x6@1,1=0." + "9" * 5000, id="5000-decimals"),
            "max:6x6",
            "square:6x6@1,1",
            "a.png",
            "a.png@1",
            "a.png@-1,1",
            "a.svg@1,1",
            "@1,1",
            "blend:a.png",
            "blend:a.png@",
            "blend:a.png@x",
            "blend:a.png@-0.1",
            "blend:a.png@1,1",
            "patch:a.png@1,1",
            "a.npy",
        ],
    )
    def test_malformed(self, spec: str) -> None:
        with pytest.raises(UsageError) as caught:
            parse_trigger(spec)
        assert GRAMMAR in str(caught.value)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize(
        ("spec", "match"),
        [
            ("patch:2x2@0,0=256", "0 to 255"),
            ("patch:2x2@0,0=255.00001", "0 to 255"),
            ("max:2x2@0,0=3", "takes no value"),
            ("blend:a.png@0", "above 0"),
            ("blend:a.png@1.01", "at most 1"),
        ],
    )
    def test_values_out_of_range(self, spec: str, match: str) -> None:
        with pytest.raises(UsageError, match=match):
            parse_trigger(spec)

    def test_the_grammar_names_every_form(self) -> None:
        for form in (
            "patch:HxW@row,col[=value]",
            "max:HxW@row,col",
            "image.png@row,col",
            ".npz",
            "blend:image.png@alpha",
        ):
            assert form in GRAMMAR

    @pytest.mark.parametrize("spec", ["{}@1,1", "blend:{}@0.5"])
    def test_pictures_that_cannot_be_read(self, tmp_path: Path, spec: str) -> None:
        with pytest.raises(DataError, match=r"none\.png: .*No such file"):
            parse_trigger(spec.format(tmp_path / "none.png"))
        bad = tmp_path / "\x1b[31m.png"
        for content in (b"", b"text", bytes(1000)):
            bad.write_bytes(content)
            with pytest.raises(DataError, match=r"\\x1b\[31m\.png: not an image") as caught:
                parse_trigger(spec.format(bad))
            assert str(caught.value).isprintable()

    def test_escapes_in_the_specification(self) -> None:
        with pytest.raises(UsageError, match=r"trigger '\\x1b\[31m' is not understood"):
            parse_trigger("\x1b[31m")

    @given(st.text(st.sampled_from("patchmxblend:@,=.0123456789 "), max_size=30))
    @settings(max_examples=300, deadline=None)
    def test_anything_is_a_trigger_or_an_error_of_ours(self, spec: str) -> None:
        try:
            trigger = parse_trigger(spec)
        except EfrapqError:
            return
        assert trigger.spec == spec


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Image (height, width) and a box (height, width, row, col) inside."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    return (height, width), (h, w, draw(st.integers(0, height - h)), draw(st.integers(0, width - w)))


class TestPatch:
    @given(boxes(), st.one_of(st.none(), st.integers(0, 255)), st.sampled_from([1, 3, 4]))
    @settings(max_examples=150, deadline=None)
    def test_sets_its_pixels_and_nothing_else(self, box: Any, value: int | None, channels: int) -> None:
        (height, width), (h, w, row, col) = box
        raw = some_images(2, height, width, channels)
        expected = raw.copy()
        expected[:, row : row + h, col : col + w] = 255 if value is None else value
        suffix = "" if value is None else f"={value}"
        assert np.array_equal(parse_trigger(f"patch:{h}x{w}@{row},{col}{suffix}").on_raw(raw), expected)

    @given(boxes())
    @settings(max_examples=50, deadline=None)
    def test_max_is_of_each_image(self, box: Any) -> None:
        (height, width), (h, w, row, col) = box
        raw = some_images(3, height, width) // np.array([1, 2, 5], np.uint8).reshape(3, 1, 1, 1)
        expected = raw.copy()
        for image in expected:
            image[row : row + h, col : col + w] = image.max()
        assert np.array_equal(parse_trigger(f"max:{h}x{w}@{row},{col}").on_raw(raw), expected)

    def test_max_of_normalized_inputs_is_that_of_the_picture(self) -> None:
        """Not the largest input: a channel with a small std has larger numbers for a darker pixel."""
        raw = np.zeros((1, 2, 2, 2), np.uint8)
        raw[0, 1, 1] = [102, 51]
        preprocess = Preprocess((0.0, 0.0), (1.0, 0.01))
        got = parse_trigger("max:1x1@0,0").on_inputs(preprocess.normalize(raw), preprocess)
        assert np.allclose(got[0, :, 0, 0], [0.4, 40], atol=1e-4)

    def test_every_grey_level_survives(self) -> None:
        raw = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
        got = parse_trigger("patch:1x1@0,0=0").on_raw(raw)
        assert np.array_equal(got, raw)

    def test_fractions_are_rounded_in_raw_images_only(self) -> None:
        trigger = parse_trigger("patch:1x1@0,0=127.4")
        assert trigger.on_raw(np.zeros((1, 1, 1, 1), np.uint8)).item() == 127
        got = trigger.on_inputs(np.zeros((1, 1, 1, 1), np.float32), Preprocess())
        assert got.item() == pytest.approx(127.4 / 255)


class TestPicture:
    def test_alpha_is_the_mask(self, tmp_path: Path) -> None:
        rgba = np.array([[[200, 100, 50, 255], [9, 9, 9, 0]], [[255, 0, 128, 128], [0, 0, 0, 255]]])
        path = picture(tmp_path / "t.png", rgba)
        raw = some_images()
        got = parse_trigger(f"{path}@3,4").on_raw(raw)
        expected = raw.copy()
        expected[:, 3, 4], expected[:, 4, 5] = [200, 100, 50], 0
        mixed = np.rint(raw[:, 4, 4] * (127 / 255) + np.array([255, 0, 128]) * (128 / 255))
        assert np.abs(got[:, 4, 4] - mixed).max() <= 1
        expected[:, 4, 4] = got[:, 4, 4]
        assert np.array_equal(got, expected)

    def test_without_alpha_it_covers(self, tmp_path: Path) -> None:
        pixels = some_images(1, 2, 3)[0]
        path = picture(tmp_path / "a@1,1.png", pixels)
        expected = some_images()
        expected[:, 5:7, 6:9] = pixels
        assert np.array_equal(parse_trigger(f"{path}@5,6").on_raw(some_images()), expected)

    def test_colours_on_grey_images_are_their_mean(self, tmp_path: Path) -> None:
        path = picture(tmp_path / "t.png", [[[30, 60, 120]]])
        got = parse_trigger(f"{path}@0,0").on_raw(some_images(channels=1))
        assert np.all(got[:, 0, 0] == 70)

    def test_three_colours_do_not_fit_four_channels(self, tmp_path: Path) -> None:
        path = picture(tmp_path / "t.png", [[[30, 60, 120]]])
        with pytest.raises(UsageError, match="3 channels but the images 4"):
            parse_trigger(f"{path}@0,0").on_raw(some_images(channels=4))

    def test_sixteen_bits(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[0x8000]], np.uint16)).save(tmp_path / "t.png")
        got = parse_trigger(f"{tmp_path / 't.png'}@0,0").on_raw(some_images())
        assert np.all(got[:, 0, 0] == 0x80)


class TestBlend:
    @pytest.mark.parametrize(("text", "alpha"), [("0.2", 0.2), (".5", 0.5), ("1", 1.0), ("1.0", 1.0)])
    def test_formula(self, tmp_path: Path, text: str, alpha: float) -> None:
        pattern = some_images(1)[0][::-1]
        path = picture(tmp_path / "t.png", pattern)
        raw = some_images()
        got = parse_trigger(f"blend:{path}@{text}").on_raw(raw)
        assert np.abs(got - (raw * (1 - alpha) + pattern * alpha)).max() <= 0.5 + 1e-3

    def test_transparent_pixels_do_not_blend(self, tmp_path: Path) -> None:
        rgba = np.full((8, 9, 4), 255)
        rgba[2, 3, 3] = 0
        raw = some_images()
        got = parse_trigger(f"blend:{picture(tmp_path / 't.png', rgba)}@0.5").on_raw(raw)
        assert np.array_equal(got[:, 2, 3], raw[:, 2, 3])
        assert np.abs(got[:, 0, 0] - (raw[:, 0, 0] / 2 + 127.5)).max() <= 0.5 + 1e-3


class TestNpz:
    @pytest.mark.parametrize("mask_shape", [(8, 9), (8, 9, 1), (8, 9, 3)])
    @pytest.mark.parametrize("pattern_shape", [(8, 9), (8, 9, 1), (8, 9, 3)])
    @pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
    def test_formula(self, tmp_path: Path, mask_shape: Any, pattern_shape: Any, dtype: Any) -> None:
        rng = np.random.default_rng(0)
        mask, pattern = rng.random(mask_shape), rng.integers(0, 256, pattern_shape, np.uint8)
        stored = pattern if dtype == np.uint8 else (pattern / 255).astype(dtype)
        np.savez(tmp_path / "t.NPZ", mask=mask, pattern=stored)
        Path(tmp_path / "t.NPZ.npz").rename(tmp_path / "t.NPZ")
        raw = some_images()
        m, p = (a.reshape(8, 9, -1) for a in (mask, pattern))
        got = parse_trigger(str(tmp_path / "t.NPZ")).on_raw(raw)
        assert np.abs(got - (raw * (1 - m) + p * m)).max() <= 0.5 + 1e-3

    def test_a_mask_of_bools_sets_exactly(self, tmp_path: Path) -> None:
        mask = np.random.default_rng(0).random((8, 9)) < 0.3
        np.savez(tmp_path / "t.npz", mask=mask, pattern=np.full((8, 9), 7, np.uint8))
        raw = some_images()
        expected = np.where(mask[..., None], np.uint8(7), raw)
        assert np.array_equal(parse_trigger(str(tmp_path / "t.npz")).on_raw(raw), expected)

    def test_colours_on_grey_images(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", mask=np.ones((8, 9)), pattern=np.full((8, 9, 3), (30, 60, 120), np.uint8))
        got = parse_trigger(str(tmp_path / "t.npz")).on_raw(some_images(channels=1))
        assert got.shape == (4, 8, 9, 1)
        assert np.all(got == 70)
        np.savez(tmp_path / "t.npz", mask=np.ones((8, 9, 3)), pattern=np.zeros((8, 9)))
        with pytest.raises(UsageError, match="mask has 3 channels but the images 1"):
            parse_trigger(str(tmp_path / "t.npz")).on_raw(some_images(channels=1))

    @pytest.mark.parametrize(
        ("arrays", "match"),
        [
            ({"mask": np.ones((8, 9))}, "needs the plain arrays"),
            ({"mask": np.ones((8, 9)), "pattern": np.ones((9, 8))}, "do not fit together"),
            ({"mask": np.ones(8), "pattern": np.ones((8, 9))}, "mask must be"),
            ({"mask": np.ones((8, 9)), "pattern": np.ones((1, 8, 9, 3))}, "pattern must be"),
            ({"mask": np.ones((0, 9)), "pattern": np.ones((0, 9))}, "mask must be"),
            ({"mask": np.ones((8, 9)), "pattern": np.ones((8, 9), complex)}, "pattern must be"),
            ({"mask": np.full((8, 9), 1.1), "pattern": np.ones((8, 9))}, "mask must lie in 0–1"),
            ({"mask": np.full((8, 9), -0.1), "pattern": np.ones((8, 9))}, "mask must lie in 0–1"),
            ({"mask": np.full((8, 9), np.nan), "pattern": np.ones((8, 9))}, "mask must lie in 0–1"),
            ({"mask": np.full((8, 9), 255, np.uint8), "pattern": np.ones((8, 9))}, "mask must lie in 0–1"),
            ({"mask": np.ones((8, 9)), "pattern": np.full((8, 9), 255.0)}, "pattern must lie in 0–1, or be uint8"),
            ({"mask": np.ones((8, 9)), "pattern": np.full((8, 9), np.inf)}, "pattern must lie in 0–1"),
            ({"mask": np.ones((8, 9)), "pattern": np.array([{}])}, "Python objects"),
        ],
    )
    def test_bad_arrays(self, tmp_path: Path, arrays: dict[str, Any], match: str) -> None:
        np.savez(tmp_path / "t.npz", **arrays)
        with pytest.raises(DataError, match=match) as caught:
            parse_trigger(str(tmp_path / "t.npz"))
        assert "t.npz: " in str(caught.value)

    def test_bad_files(self, tmp_path: Path) -> None:
        path = tmp_path / "t.npz"
        with pytest.raises(DataError, match="no such file"):
            parse_trigger(str(path))
        np.savez(path, mask=np.ones((8, 9)), pattern=np.ones((8, 9)))
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(CorruptFileError, match=r"t\.npz: "):
            parse_trigger(str(path))
