from __future__ import annotations

import functools
import json
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st

from efrapq.errors import (
    AlreadyQuantizedError,
    BadWeightsError,
    CorruptFileError,
    EfrapqError,
    InputError,
    LimitError,
    UnsafeFileError,
    UnsupportedFileError,
    UnsupportedModelError,
)
from efrapq.io import Format, Limits, Source, load_checkpoint, require_finite
from efrapq.io.pickles import pickle_globals
from efrapq.io.tensors import plain_tensors

Maker = Callable[..., bytes]
ToSource = Callable[..., Source]


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        t.dtype == b[k].dtype and t.shape == b[k].shape and torch.equal(t, b[k]) for k, t in a.items()
    )


# Good files


@pytest.mark.parametrize("key", ["", "state_dict", "model_state_dict", "model", "net", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_state_dict_is_found(key: str, prefix: str, state: Any, torch_bytes: Maker, as_source: ToSource) -> None:
    named = OrderedDict((prefix + k, v) for k, v in state.items())
    content: Any = {key: named, "epoch": 3, "optimizer": {"state": {}}} if key else named
    checkpoint = load_checkpoint(as_source(torch_bytes(content)))
    assert same(checkpoint.tensors, state)
    assert checkpoint.metadata == {}
    assert checkpoint.module is None


def test_prefix_that_not_all_names_share_stays(torch_bytes: Maker, as_source: ToSource) -> None:
    tensors = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert load_checkpoint(as_source(torch_bytes(tensors))).tensors.keys() == tensors.keys()


def test_parameters_and_views_come_out_plain(torch_bytes: Maker, as_source: ToSource) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "parameter": torch.nn.Parameter(base.clone()),
        "transposed": base.t(),
        "slice": base[1:3, ::2],
        "expanded": torch.tensor([5.0]).expand(100, 3),
        "scalar": torch.tensor(1.5, dtype=torch.float16),
        "empty": torch.zeros(0, 3),
        "bfloat": torch.ones(3, dtype=torch.bfloat16),
    }
    loaded = load_checkpoint(as_source(torch_bytes(tensors))).tensors
    assert same(loaded, tensors)
    for tensor in loaded.values():
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert type(tensor) is torch.Tensor


def test_safetensors_with_metadata(state: Any, as_source: ToSource) -> None:
    data = safetensors.torch.save({"module." + k: v for k, v in state.items()}, metadata={"arch": "resnet"})
    checkpoint = load_checkpoint(as_source(data))
    assert same(checkpoint.tensors, state)
    assert checkpoint.metadata == {"arch": "resnet"}


_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@st.composite
def _state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(
        st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=4, unique=True)
    )
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        seed = draw(st.integers(0, 99))
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
        tensors["k" + name] = values.to(draw(st.sampled_from(_DTYPES)))
    return tensors


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(tensors=_state_dicts())
def test_round_trip(tensors: dict[str, torch.Tensor], torch_bytes: Maker, as_source: ToSource) -> None:
    for data in (torch_bytes(tensors), safetensors.torch.save(tensors)):
        assert same(load_checkpoint(as_source(data)).tensors, tensors)


# Files that would run code


@pytest.mark.parametrize(
    "wrap", [lambda evil: evil, lambda evil: {"w": torch.zeros(1), "evil": evil}], ids=["bare", "dict"]
)
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda canary: Call(os.system, f"touch {canary}"), "system"),
        (lambda canary: Call(eval, f"open({canary!r}, 'w')"), "builtins.eval|__builtin__.eval"),
        (lambda canary: Call(exec, f"open({canary!r}, 'w')"), "exec"),
        (lambda canary: Call(open, canary, "w"), "open"),
        (lambda canary: Call(os.makedirs, canary), "os.makedirs"),
        (lambda canary: Call(functools.partial(os.makedirs, canary)), "functools.partial"),
    ],
    ids=["os.system", "eval", "exec", "open", "os.makedirs", "partial"],
)
def test_pickle_that_runs_code(
    make: Any, named: str, wrap: Any, tmp_path: Path, torch_bytes: Maker, as_source: ToSource
) -> None:
    canary = tmp_path / "canary"
    source = as_source(torch_bytes(wrap(make(str(canary)))))
    with pytest.raises(UnsafeFileError, match=named) as caught:
        load_checkpoint(source)
    assert not canary.exists()
    assert "state_dict" in str(caught.value)
    assert "--trust-pickle" in str(caught.value)


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00touch\x85R.",
        b"\x80\x02ctorch.os\nsystem\nX\x05\x00\x00\x00touch\x85R.",
        b"\x80\x02ctorch\nos.system\nX\x05\x00\x00\x00touch\x85R.",
        b"\x80\x02(S'touch'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c\x05touch\x85R.",
        b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x01h\x00\x93\x8c\x05touch\x85R.",
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02c\x1b[31m\nsystem\n.",
        b"\x80\x02ccollections\\q\nsystem\n.",
    ],
    ids=[
        "GLOBAL",
        "dotted module",
        "dotted name",
        "INST",
        "STACK_GLOBAL",
        "memo",
        "bytearray",
        "torch.load",
        "escape",
        "backslash",
    ],
)
def test_crafted_pickle_is_refused_by_name(pickled: bytes, pickle_zip: Maker, as_source: ToSource) -> None:
    with pytest.raises(UnsafeFileError, match=r"system|bytearray|load") as caught:
        load_checkpoint(as_source(pickle_zip(pickled)))
    assert str(caught.value).isprintable()


def test_globals_are_found_without_importing() -> None:
    assert pickle_globals(pickle.dumps(OrderedDict(a=1), protocol=4), "f") == ["collections.OrderedDict"]
    assert pickle_globals(b"\x80\x02cno.such\nthing\n.", "f") == ["no.such.thing"]


def test_whole_module(torch_bytes: Maker, as_source: ToSource) -> None:
    net = Net()
    source = as_source(torch_bytes(net))
    with pytest.raises(UnsafeFileError, match=r"Net.*torch\.save\(model\.state_dict\(\).*--trust-pickle"):
        load_checkpoint(source)
    checkpoint = load_checkpoint(source, trust_pickle=True)
    assert isinstance(checkpoint.module, Net)
    assert same(checkpoint.tensors, net.state_dict())


def test_trusted_wrappers(torch_bytes: Maker, as_source: ToSource, state: Any) -> None:
    net = Net()
    for content in (torch.nn.DataParallel(net), {"model": net, "epoch": 1}):
        checkpoint = load_checkpoint(as_source(torch_bytes(content)), trust_pickle=True)
        assert isinstance(checkpoint.module, Net)
        assert same(checkpoint.tensors, net.state_dict())
    assert load_checkpoint(as_source(torch_bytes(state)), trust_pickle=True).module is None


def test_trusted_pickle_that_needs_other_code(pickle_zip: Maker, as_source: ToSource) -> None:
    source = as_source(pickle_zip(b"\x80\x02cno_such_package\nNet\n)R."))
    with pytest.raises(UnsupportedFileError, match="no_such_package"):
        load_checkpoint(source, trust_pickle=True)


# Files that hold something else


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "no tensors"),
        ([torch.zeros(1)], "type list"),
        (torch.zeros(1), "type Tensor"),
        ({"epoch": 1}, "only 'epoch'"),
        ({"a": torch.zeros(1), "epoch": 1}, "not tensors: 'epoch'"),
        ({"state_dict": {"a": torch.zeros(1), "lr\x1b": 0.1}}, r"not tensors: 'lr\\x1b'"),
        ({1: torch.zeros(1)}, "'1'"),
        ({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}}, "different.*'model', 'ema'"),
        ({"a\x07": torch.zeros(2, 2).to_sparse()}, r"'a\\x07' is sparse"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "float8"),
        ({"a": torch.zeros(2, device="meta")}, "meta"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_content_that_is_no_state_dict(content: Any, match: str, torch_bytes: Maker, as_source: ToSource) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        load_checkpoint(as_source(torch_bytes(content)))


def test_the_same_weights_twice_are_fine(state: Any, torch_bytes: Maker, as_source: ToSource) -> None:
    content = {"model": state, "state_dict": dict(state)}
    assert same(load_checkpoint(as_source(torch_bytes(content))).tensors, state)


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensor(torch_bytes: Maker, as_source: ToSource) -> None:
    tensor = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    with pytest.raises(AlreadyQuantizedError, match="'q'"):
        load_checkpoint(as_source(torch_bytes({"q": tensor})))


def test_onnx_is_not_a_checkpoint() -> None:
    with pytest.raises(UnsupportedFileError, match="not a checkpoint"):
        load_checkpoint(Source(Path("m"), b"", "", Format.ONNX))


# Tensors that do not fit what holds them


def test_crafted_tensor_can_be_good(crafted: Maker, as_source: ToSource) -> None:
    assert load_checkpoint(as_source(crafted())).tensors["w"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"size": (8,)},
        {"size": (10**6,)},
        {"size": (2**40,), "stride": (0,)},
        {"size": (2**30,), "stride": (0,)},
        {"size": (2**62, 4), "stride": (0, 0)},
        {"size": (2**62,), "stride": (1,)},
        {"size": (-4,)},
        {"stride": (2**40,)},
        {"stride": (2**62,)},
        {"stride": (-1,)},
        {"offset": 2},
        {"offset": 2**62},
        {"offset": -1},
        {"size": (2, 2)},
        {"numel": 8},
        {"numel": 2**40},
        {"numel": -1},
        {"stored": 4},
        {"stored": 0},
    ],
    ids=str,
)
def test_hostile_sizes(options: Any, crafted: Maker, as_source: ToSource) -> None:
    with pytest.raises((LimitError, CorruptFileError)):
        load_checkpoint(as_source(crafted(**options)))


def test_many_expanded_views_count_together(torch_bytes: Maker, as_source: ToSource) -> None:
    one = torch.zeros(1).expand(1 << 17)
    with pytest.raises(LimitError, match="expanded view"):
        load_checkpoint(as_source(torch_bytes({str(i): one for i in range(100)})))


def test_view_outside_its_storage() -> None:
    tensor = torch.zeros(4)
    bad = tensor.as_strided((4,), (1,))
    tensor.untyped_storage().resize_(8)
    with pytest.raises(CorruptFileError, match="'bad' reaches outside"):
        plain_tensors({"bad": bad}, "f", 100, Limits())


def test_limits_on_elements_and_pickle(state: Any, torch_bytes: Maker, as_source: ToSource) -> None:
    source = as_source(torch_bytes(state))
    with pytest.raises(LimitError, match="elements"):
        load_checkpoint(source, limits=Limits(max_tensor_elements=10))
    with pytest.raises(LimitError, match="pickle"):
        load_checkpoint(source, limits=Limits(max_header_bytes=10))


# Damage


@pytest.mark.parametrize("sixteenths", range(16))
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_truncated(kind: str, sixteenths: int, state: Any, torch_bytes: Maker, as_source: ToSource) -> None:
    data = torch_bytes(state) if kind == "torch" else safetensors.torch.save(state)
    with pytest.raises(CorruptFileError):
        load_checkpoint(as_source(data[: len(data) * sixteenths // 16]))


@pytest.mark.parametrize("pickled", [b"", b"\x80\x02}", b"\x80\x02.", b"\x80\x02e.", b"\xff\xff", b"\x80\x02h\x07."])
def test_damaged_pickle(pickled: bytes, pickle_zip: Maker, as_source: ToSource) -> None:
    with pytest.raises((CorruptFileError, UnsafeFileError)):
        load_checkpoint(as_source(pickle_zip(pickled)))


def test_missing_storage(crafted: Maker, as_source: ToSource) -> None:
    with pytest.raises(CorruptFileError):
        load_checkpoint(as_source(crafted().replace(b"archive/data/0", b"archive/data/9")))


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(position=st.integers(0, 2000), new=st.binary(min_size=1, max_size=4))
def test_changed_pickle_gives_weights_or_a_typed_error(
    position: int, new: bytes, state: Any, torch_bytes: Maker, pickle_zip: Maker, as_source: ToSource
) -> None:
    from io import BytesIO
    from zipfile import ZipFile

    with ZipFile(BytesIO(torch_bytes(state))) as archive:
        pickled = archive.read("archive/data.pkl")
        storages = [archive.read(f"archive/data/{i}") for i in range(3)]
    at = position % len(pickled)
    try:
        load_checkpoint(as_source(pickle_zip(pickled[:at] + new + pickled[at + len(new) :], *storages)))
    except InputError as error:
        message = str(error)
    else:
        message = ""
    assert message == "" or message.isprintable()


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (safetensors_bytes({"a": _F32}, bytes(4)), CorruptFileError),
        (safetensors_bytes({"a": _F32}, bytes(12)), CorruptFileError),
        (safetensors_bytes({"a": _F32 | {"shape": [3]}}, bytes(8)), CorruptFileError),
        (safetensors_bytes({"a": _F32 | {"shape": [2**62, 2**62]}}, bytes(8)), CorruptFileError),
        (safetensors_bytes({"a": _F32 | {"shape": [-2]}}, bytes(8)), CorruptFileError),
        (safetensors_bytes({"a": _F32 | {"data_offsets": [8, 0]}}, bytes(8)), CorruptFileError),
        (safetensors_bytes({"a": _F32 | {"dtype": "F33"}}, bytes(8)), CorruptFileError),
        (safetensors_bytes({"a": _F32, "b": _F32}, bytes(8)), CorruptFileError),
        (safetensors_bytes({"a": _F32 | {"dtype": "C64", "shape": [1]}}, bytes(8)), UnsupportedModelError),
        (safetensors_bytes({"a": _F32 | {"dtype": "F8_E4M3", "shape": [8]}}, bytes(8)), UnsupportedModelError),
        (safetensors_bytes({"__metadata__": {"a": 1}}), CorruptFileError),
        (safetensors_bytes({}), UnsupportedModelError),
        (safetensors_bytes(b"{" * 100_000), CorruptFileError),
        (safetensors_bytes(b'{"a":' * 100_000), CorruptFileError),
        (safetensors_bytes(b'{"a": \xff}'), CorruptFileError),
        (safetensors_bytes(b'{"a": 1, "a": 2}'), CorruptFileError),
        (struct.pack("<Q", 90_000_000) + b"{}", LimitError),
    ],
    ids=range(17),
)
def test_bad_safetensors(data: bytes, error: type[EfrapqError], as_source: ToSource) -> None:
    with pytest.raises(error):
        load_checkpoint(as_source(data))


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_non_finite_weights_are_named(value: float, dtype: torch.dtype) -> None:
    tensors = {"good": torch.zeros(3), "bad\n": torch.tensor([[0.0, value]], dtype=dtype), "count": torch.tensor(3)}
    with pytest.raises(BadWeightsError, match=r"infinity in 'bad\\x0a';"):
        require_finite(tensors)


def test_finite_weights_pass(state: Any) -> None:
    require_finite({**state, "empty": torch.zeros(0), "denormal": torch.tensor(1e-45)})
