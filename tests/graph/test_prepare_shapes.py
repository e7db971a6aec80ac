"""Outputs that state no shape are legal ONNX."""

from __future__ import annotations

import numpy as np

from efrapq.graph.prepare import prepare


def test_an_output_without_a_shape_is_prepared(residual_net, images, run_ort) -> None:
    import onnx_ir as ir

    proto = residual_net()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    x = images(3)
    prepared = ir.to_proto(prepare(proto))
    assert np.abs(run_ort(prepared, x)[0] - run_ort(proto, x)[0]).max() < 1e-5
