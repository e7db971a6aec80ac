"""What exporting a torch network leaves behind, and where it runs."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from efrapq.errors import UnsupportedModelError
from efrapq.graph.from_torch import _device_and_type, export_module
from efrapq.graph.widen import widen
from efrapq.loading import load


class Branching(nn.Module):
    """Its control flow depends on the data, which torch.export cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if x.sum() > 0 else x


@pytest.mark.parametrize("works", [True, False], ids=["exported", "refused"])
def test_each_part_keeps_its_mode(works: bool) -> None:
    """A network in training whose BatchNorm is frozen in evaluation mode comes back as it was."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) if works else Branching()
    network.train()
    frozen = next(part for part in network.modules() if isinstance(part, nn.BatchNorm2d))
    frozen.eval()
    before = {name: part.training for name, part in network.named_modules()}
    if works:
        export_module(network, (3, 8, 8))
    else:
        with pytest.raises(UnsupportedModelError):
            export_module(network, (3, 8, 8))
    assert {name: part.training for name, part in network.named_modules()} == before
    assert set(before.values()) == {True, False}


def test_the_graph_says_nothing_of_this_installation() -> None:
    """torch's exporter writes a stack trace into every node, with the folders of who ran it."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    exported = export_module(network, (3, 8, 8)).SerializeToString()
    assert b".py" not in exported
    assert export_module(network, (3, 8, 8)).SerializeToString() == exported


def test_the_sample_is_where_and_what_the_network_is() -> None:
    meta = torch.device("meta")
    assert _device_and_type(nn.Linear(2, 2, device="meta")) == (meta, torch.float32)
    assert _device_and_type(nn.BatchNorm2d(2, affine=False, device="meta")) == (meta, torch.float32)
    assert _device_and_type(nn.ReLU()) == (torch.device("cpu"), torch.float32)
    assert _device_and_type(nn.BatchNorm2d(2, affine=False).half()) == (torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision(dtype: torch.dtype) -> None:
    """Its graph is of one type; traced with a float32 sample it would be of two, and no valid graph."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(dtype)
    found = load(network, input_shape=(3, 8, 8))
    expected = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}[dtype]
    graph = found.proto.graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {expected}
    assert any(str(dtype).removeprefix("torch.") in note for note in found.notes)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(widen(found.proto), strict_mode=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_on_the_gpu() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).cuda()
    assert export_module(network, (3, 8, 8)).graph.initializer
    assert next(network.parameters()).is_cuda
