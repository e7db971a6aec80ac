"""Makers of good and bad files. The pickles that would run code are written here and nowhere else."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from efrapq.io import Limits, Source, sniff


@pytest.fixture(scope="session")
def as_source() -> Callable[..., Source]:
    """Bytes → the Source that reading them from a file would give."""

    def make(data: bytes, path: Path = Path("model.bin"), limits: Limits | None = None) -> Source:
        return Source(path, data, hashlib.sha256(data).hexdigest(), sniff(data, str(path), limits))

    return make


@pytest.fixture(scope="session")
def torch_bytes() -> Callable[..., bytes]:
    def make(content: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer, **options)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "conv.bias": torch.randn(4, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
    }


@pytest.fixture(scope="session")
def pickle_zip() -> Callable[..., bytes]:
    """The bytes of a pickle and of its storages → a torch checkpoint around them."""

    def make(pickled: bytes, *storages: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
            for i, storage in enumerate(storages):
                archive.writestr(f"archive/data/{i}", storage)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def crafted(pickle_zip: Callable[..., bytes]) -> Callable[..., bytes]:
    """A checkpoint of one float tensor "w" whose numbers need not fit together."""

    def number(value: int) -> bytes:
        return pickle.LONG1 + b"\x08" + struct.pack("<q", value)

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()

    def make(
        size: tuple[int, ...] = (4,),
        stride: tuple[int, ...] = (1,),
        offset: int = 0,
        numel: int = 4,
        stored: int = 16,
    ) -> bytes:
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numel) + b"tQ"
        shape = b"(" + b"".join(map(number, size)) + b"t" + b"(" + b"".join(map(number, stride)) + b"t"
        call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + shape
        pickled = b"\x80\x02}" + text("w") + call + b"\x89ccollections\nOrderedDict\n)RtRs."
        return pickle_zip(pickled, bytes(stored))

    return make
