"""The spool: what comes back is what went in, wherever it lay meanwhile."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from efrapq.errors import OutputError
from efrapq.stream.spool import Spool


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits, NaN and denormals among them."""
    size = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).view(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and bool(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)))


SHAPES = [(), (0,), (1,), (3, 0, 5), (7,), (3, 5, 7), (2, 3, 11, 13), (1, 1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)) or "scalar")
@pytest.mark.parametrize("limit", [0, None], ids=["filed", "held"])
def test_what_goes_in_comes_out(temporary: Path, limit: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = filled(shape, dtype)
    with Spool(limit) as spool:
        spool.start("a")
        spool.append("a", tensor)
        back = spool.get("a", 0)
        assert same_bits(back, tensor)
        assert same_bits(spool.get("a", 0), tensor)  # and again
        assert len(files(temporary)) == (limit == 0 and tensor.numel() > 0)
        assert spool.filed == (tensor.nbytes if limit == 0 else 0)
        assert spool.held == (0 if limit == 0 else tensor.nbytes)


@pytest.mark.parametrize(
    "given_as",
    [
        lambda x: x.transpose(1, 3),
        lambda x: x[:, ::2],
        lambda x: x.flip(0)[1:, 1:],
        lambda x: x[:1].as_strided((1, 4, 6, 6), (1, 36, 6, 1)),
        lambda x: x[:, :1].expand(-1, 4, -1, -1),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.flatten()[1:],
    ],
    ids=["transposed", "strided", "cut", "odd-stride", "expanded", "channels-last", "offset"],
)
def test_views_lie_in_memory_as_they_would_out_of_a_file(given_as: object) -> None:
    """Products of the same numbers laid out differently are summed in another order."""
    tensor = given_as(filled((3, 4, 6, 6), torch.float32))  # type: ignore[operator]
    with Spool() as held, Spool(0) as filed:
        for spool in (held, filed):
            spool.start("a")
            spool.append("a", tensor)
            assert same_bits(spool.get("a", 0), tensor)
        a, b = held.get("a", 0), filed.get("a", 0)
        assert a.stride() == b.stride() == torch.empty(tensor.shape).stride()
        assert a.data_ptr() % 64 == b.data_ptr() % 64 == 0


def test_the_limit_is_never_passed_and_the_first_chunks_stay_in_memory(temporary: Path) -> None:
    chunk = filled((10, 10), torch.float32)
    with Spool(1000) as spool:
        spool.start("a")
        for i in range(5):
            spool.append("a", chunk + i)
            assert spool.held <= 1000
        assert (spool.held, spool.filed) == (800, 1200)
        assert len(files(temporary)) == 3
        assert [f.stat().st_size for f in files(temporary)] == [400] * 3
        for i in range(5):
            assert same_bits(spool.get("a", i), chunk + i)
        # Room that was given back is used again.
        spool.release("a", 0)
        spool.start("b")
        spool.append("b", chunk)
        assert (spool.held, spool.filed, len(files(temporary))) == (800, 1200, 3)


def test_a_tensor_larger_than_what_is_left_makes_way_for_smaller_ones(temporary: Path) -> None:
    with Spool(100) as spool:
        spool.start("a")
        spool.append("a", filled((200,), torch.uint8))
        spool.append("a", filled((100,), torch.uint8))
        assert (spool.held, spool.filed) == (100, 200)


@pytest.mark.parametrize("limit", [0, 500, None], ids=["filed", "mixed", "held"])
def test_release_and_drop_give_back_what_was_taken(temporary: Path, limit: int | None) -> None:
    with Spool(limit) as spool:
        for name in ("a", "b"):
            spool.start(name)
            for i in range(3):
                spool.append(name, filled((50,), torch.float32, seed=i))
        spool.release("a", 1)
        with pytest.raises(KeyError, match="chunk 1 of a is gone"):
            spool.get("a", 1)
        assert spool.chunks("a") == 3
        assert same_bits(spool.get("a", 2), filled((50,), torch.float32, seed=2))
        spool.release("a", 1)  # twice is once
        in_files = sum(f.stat().st_size for f in files(temporary))
        assert spool.held + in_files == 5 * 200
        spool.drop("a")
        assert "a" not in spool
        assert spool.chunks("a") == 0
        assert spool.held + sum(f.stat().st_size for f in files(temporary)) == 3 * 200
        spool.start("b")  # in place of what was there
        assert spool.names() == {"b"}
        assert spool.chunks("b") == 0
        assert (spool.held, files(temporary)) == (0, [])
        spool.drop("never there")


@pytest.mark.parametrize("ending", ["normal", "error"])
def test_nothing_is_left_on_the_disk(temporary: Path, ending: str) -> None:
    def use() -> None:
        with Spool(10) as spool:
            spool.start("a")
            spool.append("a", filled((100,), torch.float32))
            assert len(files(temporary)) == 1
            if ending == "error":
                raise RuntimeError("on the way")

    if ending == "error":
        with pytest.raises(RuntimeError, match="on the way"):
            use()
    else:
        use()
    assert list(temporary.iterdir()) == []


def test_without_need_no_folder_is_made(temporary: Path) -> None:
    with Spool(400) as spool:
        spool.start("a")
        spool.append("a", filled((100,), torch.float32))
        assert list(temporary.iterdir()) == []


@contextmanager
def small_disk() -> Iterator[None]:
    """No file of more than 1000 bytes: for as short as can be, as what the tests print may go to one."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named(temporary: Path) -> None:
    with Spool(0) as spool:
        spool.start("a")
        spool.append("a", filled((100,), torch.float32))
        with small_disk(), pytest.raises(OutputError, match=f"{temporary.name}.*--memory"):
            spool.append("a", filled((1000,), torch.float32))
        assert spool.filed == 400
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="this user may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(temporary: Path) -> None:
    temporary.chmod(0o500)
    with Spool(0) as spool:
        spool.start("a")
        with pytest.raises(OutputError, match="TMPDIR"):
            spool.append("a", filled((1,), torch.float32))
    temporary.chmod(0o700)


@given(
    st.integers(0, 600),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 80), st.sampled_from(["append", "release", "drop"]))),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_any_sequence_keeps_its_accounts(limit: int, steps: list[tuple[str, int, str]]) -> None:
    expected: dict[str, list[Tensor | None]] = {}
    with Spool(limit) as spool:
        for count, (name, size, action) in enumerate(steps):
            if action == "drop":
                spool.drop(name)
                expected.pop(name, None)
            elif name not in expected:
                spool.start(name)
                expected[name] = []
            elif action == "append":
                tensor = filled((size,), torch.float32, seed=count)
                spool.append(name, tensor)
                expected[name].append(tensor)
            elif expected[name]:
                spool.release(name, size % len(expected[name]))
                expected[name][size % len(expected[name])] = None
            assert 0 <= spool.held <= limit
        assert spool.names() == set(expected)
        for name, tensors in expected.items():
            assert spool.chunks(name) == len(tensors)
            for i, tensor in enumerate(tensors):
                assert tensor is None or same_bits(spool.get(name, i), tensor)
        for name in expected:
            spool.drop(name)
        assert spool.held == 0
