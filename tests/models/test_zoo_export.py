"""The zoo through torch's exporter: which operators come out, and that ONNX Runtime computes the same."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import onnxsim
import pytest
import torch
from torch import nn

from efrapq.models import zoo

SHARED = Path(os.environ.get("EFRAPQ_SHARED", Path(__file__).resolve().parents[3] / "shared"))
RESIDUAL = {"Conv", "Relu", "Add", "ReduceMean", "Reshape", "Gemm"}


def export(model: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """A simplified ONNX model with a dynamic batch, BatchNorm folded by the exporter."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *input_shape),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["input"],
                output_names=["logits"],
                verbose=False,
            )
            assert program is not None
            simplified, sound = onnxsim.simplify(program.model_proto)
    finally:
        logging.disable(logging.NOTSET)
    assert sound
    return simplified


def run(model: onnx.ModelProto | Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.asarray(logits)


def give_statistics(model: nn.Module) -> None:
    """BatchNorm that does something, as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


@pytest.mark.parametrize(
    ("name", "width", "operators"),
    [
        pytest.param("resnet20", 4, RESIDUAL | {"Slice", "Pad"}, id="resnet20"),
        pytest.param("resnet18-cifar", 8, RESIDUAL, id="resnet18"),
        pytest.param("vgg16-bn-cifar", 0.125, {"Conv", "Relu", "MaxPool", "Reshape", "Gemm"}, id="vgg16"),
        pytest.param("mobilenetv2-cifar", 0.25, RESIDUAL - {"Relu"} | {"Clip"}, id="mobilenetv2"),
        pytest.param("smallresnet28", 4, RESIDUAL, id="smallresnet28"),
    ],
)
def test_exported_graph_is_clean_and_computes_the_same(name: str, width: float, operators: set[str]) -> None:
    model = zoo.build(name, width=width, seed=0).eval()
    give_statistics(model)
    input_shape = zoo.get(name).input_shape
    exported = export(model, input_shape)
    assert {node.op_type for node in exported.graph.node} == operators
    assert exported.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for batch in (1, 3):
        x = torch.rand(batch, *input_shape, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = model(x).numpy()
        assert np.abs(run(exported, x.numpy()) - expected).max() < 1e-4


@pytest.mark.shared
def test_a_real_state_dict_computes_what_its_onnx_twin_does() -> None:
    folder = SHARED / "data" / "models"
    if not (folder / "cifar10_resnet20.onnx").is_file():
        pytest.skip(f"no development data in {SHARED}")
    match = zoo.recognize(torch.load(folder / "cifar10_resnet20_state_dict.pt", weights_only=True))
    assert match.architecture.name == "resnet20"
    assert match.kwargs == {"num_classes": 10, "in_channels": 3, "width": 16}
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = zoo.load(match)(x).numpy()
    assert np.abs(run(folder / "cifar10_resnet20.onnx", x.numpy()) - logits).max() < 1e-3
