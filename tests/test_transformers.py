"""A BERT-like encoder of token ids: defended with named integer inputs, on integer kernels in ONNX Runtime."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import efrapq
from efrapq.errors import UnsupportedModelError
from efrapq.exporters import read_quantized
from efrapq.graph.executor import Executor
from efrapq.graph.prepare import prepare
from efrapq.pipeline import Defended
from efrapq.verification.codes import compare_codes, nearest_twin
from efrapq.verification.kernels import KernelReport, report_kernels
from efrapq.verification.session import Session, open_session

VOCABULARY, LENGTH, HIDDEN, HEADS, FFN, LAYERS, CLASSES = 50, 16, 64, 4, 128, 2, 3
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
F32 = np.float32


def tokens(count: int, length: int = LENGTH, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Sentences of a few frequent words, padded, in two segments."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.geometric(0.08, (count, length)), VOCABULARY - 1)
    mask = (np.arange(length) < rng.integers(length // 2, length + 1, count)[:, None]).astype(np.int64)
    kinds = (np.arange(length) >= rng.integers(1, length, count)[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": kinds * mask}


# Two ways to say the same network: by hand as older exporters write it, and through torch.


class Graph:
    """Nodes and seeded constants, named after what they make."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}

    def op(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"/{name}/{op}", **attributes))
        return name

    def constant(self, name: str, array: Any) -> str:
        self.constants[name] = np.asarray(array)
        return name

    def random(self, name: str, *shape: int, spread: float = 1.0) -> str:
        return self.constant(name, (spread * self.rng.standard_normal(shape)).astype(F32))

    def linear(self, x: str, name: str, inputs: int, outputs: int, *, bias: bool) -> str:
        weight = self.random(f"onnx::MatMul_{name}", inputs, outputs, spread=inputs**-0.5)
        product = self.op("MatMul", [x, weight], f"{name}.product" if bias else name)
        return self.op("Add", [self.random(f"{name}.bias", outputs, spread=0.1), product], name) if bias else product

    def norm(self, x: str, name: str) -> str:
        scale = self.constant(f"{name}.weight", self.rng.uniform(0.5, 1.5, HIDDEN).astype(F32))
        return self.op("LayerNormalization", [x, scale, self.random(f"{name}.bias", HIDDEN, spread=0.1)], name, axis=-1)


def _attention(g: Graph, x: str, mask: str, at: str, *, bias: bool) -> str:
    split, join = g.constant("split", [0, 0, HEADS, HIDDEN // HEADS]), g.constant("join", [0, 0, HIDDEN])
    heads = []
    for part, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        projected = g.linear(x, f"{at}.{part}", HIDDEN, HIDDEN, bias=bias)
        heads.append(
            g.op("Transpose", [g.op("Reshape", [projected, split], f"{at}.{part}.4d")], f"{at}.{part}.t", perm=perm)
        )
    scores = g.op("MatMul", heads[:2], f"{at}.scores")
    scaled = g.op("Div", [scores, g.constant("root", F32((HIDDEN // HEADS) ** 0.5))], f"{at}.scaled")
    weights = g.op("Softmax", [g.op("Add", [scaled, mask], f"{at}.masked")], f"{at}.weights", axis=-1)
    mixed = g.op("Transpose", [g.op("MatMul", [weights, heads[2]], f"{at}.mixed")], f"{at}.mixed.t", perm=[0, 2, 1, 3])
    return g.linear(g.op("Reshape", [mixed, join], f"{at}.joined"), f"{at}.out", HIDDEN, HIDDEN, bias=bias)


def _gelu(g: Graph, x: str, at: str) -> str:
    inner = g.op("Erf", [g.op("Div", [x, g.constant("sqrt2", F32(2**0.5))], f"{at}.div")], f"{at}.erf")
    half = g.op("Mul", [x, g.op("Add", [inner, g.constant("one", F32(1))], f"{at}.add")], f"{at}.mul")
    return g.op("Mul", [half, g.constant("half", F32(0.5))], f"{at}.gelu")


def by_hand(*, bias: bool, opset: int = 17) -> onnx.ModelProto:
    """Dynamic batch and length. Without bias, the matrices stay MatMul on three-dimensional activations."""
    g = Graph(0)
    words = g.op("Gather", [g.random("words", VOCABULARY, HIDDEN), "input_ids"], "word")
    kinds = g.op("Gather", [g.random("kinds", 2, HIDDEN, spread=0.3), "token_type_ids"], "kind")
    x = g.norm(g.op("Add", [words, kinds], "embedded"), "embedding.norm")
    wide = g.op("Unsqueeze", ["attention_mask", g.constant("axes", [1, 2])], "mask.4d")
    masked = g.op("Equal", [wide, g.constant("zero", np.array(0))], "is.padding")
    mask = g.op("Where", [masked, g.constant("low", F32(-1e4)), g.constant("none", F32(0))], "mask")
    for layer in range(LAYERS):
        at = f"layer.{layer}"
        x = g.norm(g.op("Add", [x, _attention(g, x, mask, at, bias=bias)], f"{at}.sum1"), f"{at}.norm1")
        wide = _gelu(g, g.linear(x, f"{at}.up", HIDDEN, FFN, bias=bias), at)
        x = g.norm(g.op("Add", [x, g.linear(wide, f"{at}.down", FFN, HIDDEN, bias=bias)], f"{at}.sum2"), f"{at}.norm2")
    first = g.op("Gather", [x, g.constant("first", np.array(0))], "first.token", axis=1)
    pooled = g.op("Tanh", [g.linear(first, "pooler", HIDDEN, HIDDEN, bias=True)], "pooled")
    g.linear(pooled, "logits", HIDDEN, CLASSES, bias=True)
    graph = helper.make_graph(
        g.nodes,
        "encoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in INPUTS],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in g.constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.reshape(batch, length, HEADS, HIDDEN // HEADS).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        weights = torch.softmax(q @ k.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5 + mask, -1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, HIDDEN)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(2, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.pooler, self.classifier = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids) + self.kinds(kinds))
        added = (1.0 - mask[:, None, None, :].to(x.dtype)) * -1e4
        for block in self.blocks:
            x = block(x, added)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


def by_torch(opset: int) -> onnx.ModelProto:
    torch.manual_seed(0)
    network = Encoder().eval()
    example = tuple(torch.from_numpy(a) for a in tokens(2).values())
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            example,
            dynamo=True,
            opset_version=opset,
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=(dynamic,) * 3,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


MAKERS: dict[str, Callable[[], onnx.ModelProto]] = {
    "by hand": lambda: by_hand(bias=True),
    "by hand, no biases": lambda: by_hand(bias=False),
    "torch": lambda: by_torch(20),  # Gelu is one operator from here on
}


@pytest.fixture(scope="module", params=MAKERS, ids=str)
def encoder(request: pytest.FixtureRequest) -> onnx.ModelProto:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def file(encoder: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    path.write_bytes(encoder.SerializeToString())
    return path


@pytest.fixture(scope="module")
def made(file: Path) -> Defended:
    return efrapq.defend(file, bits=8, calib=tokens(64))


def logits(session: Session, feeds: dict[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    taken = {i.name for i in session.raw.get_inputs()}
    return np.asarray(session.raw.run(None, {k: v for k, v in feeds.items() if k in taken})[0], np.float64)


def sqnr(reference: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    signal = np.square(reference - reference.mean(0)).sum()
    return float(10 * np.log10(signal / np.square(reference - actual).sum()))


def softmax_products(report: KernelReport) -> bool:
    """Whether all that is left in float is the product of the attention weights with the values."""
    return len(report.unfused) == LAYERS and all("from a float Softmax" in u.reason for u in report.unfused)


def test_the_executor_computes_what_the_file_computes(encoder: onnx.ModelProto) -> None:
    feeds = tokens(5, 11, seed=3)
    expected = logits(open_session(encoder.SerializeToString()), feeds)
    with torch.no_grad():
        found = Executor(prepare(encoder)).run({k: torch.from_numpy(v) for k, v in feeds.items()})["logits"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5)


def test_every_matrix_is_a_layer_and_runs_on_integers(encoder: onnx.ModelProto, made: Defended) -> None:
    assert len(made.quantized.layers) == LAYERS * 6 + 2
    assert {layer.op_type for layer in made.quantized.layers} <= {"Gemm", "MatMul"}
    session = open_session(made.data)
    report = report_kernels(session.optimized)
    # Queries times keys is a product of two quantized activations: integer too.
    assert report.integer == LAYERS * 7 + 2
    assert softmax_products(report)
    left = Counter(node.op_type for node in session.optimized.graph.node)
    assert left["Softmax"] == LAYERS
    assert left["LayerNormalization"] + left["SkipLayerNormalization"] == 2 * LAYERS + 1
    assert left["Erf"] + left["Gelu"] + left["BiasGelu"] == LAYERS
    integer = {"QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
    assert sum(left[op] for op in integer) == report.integer


class _Attention(nn.Module):
    """Self-attention without a mask, its heads split by sizes that are known: as onnxsim knows to fuse it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids))
        batch, length, _ = x.shape
        q, k, v = (
            y.reshape(batch, length, HEADS, HIDDEN // HEADS).transpose(1, 2)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        mixed = torch.softmax(q @ k.transpose(2, 3) / (HIDDEN // HEADS) ** 0.5, -1) @ v
        result: torch.Tensor = x + self.out(mixed.transpose(1, 2).reshape(batch, length, HIDDEN))
        return result


def test_attention_is_not_fused_away(tmp_path: Path) -> None:
    """Its four matrices stay layers: in an operator of the runtime's own they would be float, and nobody told."""
    path = tmp_path / "attention.onnx"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Attention().eval(),
            (torch.zeros(2, LENGTH, dtype=torch.int64),),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["ids"],
            dynamic_axes={"ids": {0: "n"}},
        )
    prepared = prepare(onnx.load(path))
    assert {node.domain for node in prepared.graph} <= {"", "ai.onnx"}
    made = efrapq.defend(path, bits=8, calib={"ids": tokens(24)["input_ids"]})
    assert len(made.quantized.layers) == 4


def test_it_answers_as_the_float_model_does_at_other_lengths(file: Path, made: Defended) -> None:
    before, after = open_session(file.read_bytes()), open_session(made.data)
    assert [i.name for i in after.raw.get_inputs()] == [i.name for i in before.raw.get_inputs()]
    assert [i.type for i in after.raw.get_inputs()] == ["tensor(int64)"] * 3
    assert [i.shape for i in after.raw.get_inputs()] == [i.shape for i in before.raw.get_inputs()]
    feeds = tokens(200, seed=1)
    reference = logits(before, feeds)
    assert sqnr(reference, logits(after, feeds)) > 20
    for count, length in ((7, 9), (1, LENGTH)):
        feeds = tokens(count, length, seed=count)
        error = np.abs(logits(before, feeds) - logits(after, feeds)).max()
        assert error < 0.15 * np.abs(reference).max()


def test_one_large_value_in_what_is_added_up_costs_nothing(tmp_path: Path) -> None:
    """As trained encoders have them: a hundred beside ones, which a normalization makes small again."""
    proto = by_hand(bias=True)
    held = {t.name: t for t in proto.graph.initializer}

    def change(name: str, array: NDArray[np.float32]) -> None:
        held[name].CopyFrom(numpy_helper.from_array(array, name))

    bias, gains = (numpy_helper.to_array(held[f"layer.0.{n}"]).copy() for n in ("down.bias", "norm2.weight"))
    bias[0] = 100
    gains *= HIDDEN**-0.5 * 100  # the deviation of what is normalized
    gains[0] = 0.1
    change("layer.0.down.bias", bias)
    change("layer.0.norm2.weight", gains)
    path = tmp_path / "encoder.onnx"
    path.write_bytes(proto.SerializeToString())
    made = efrapq.defend(path, bits=8, calib=tokens(64))
    feeds = tokens(200, seed=1)
    reference = logits(open_session(path.read_bytes()), feeds)
    assert sqnr(reference, logits(open_session(made.data), feeds)) > 20


def test_codes_come_back_from_the_file(encoder: onnx.ModelProto, made: Defended) -> None:
    proto = onnx.load_from_string(made.data)
    back = read_quantized(proto)
    assert back.digest == made.quantized.digest
    for name, weight in made.quantized.weights.items():
        np.testing.assert_array_equal(back.weights[name].codes, weight.codes)
        np.testing.assert_array_equal(back.weights[name].scale, weight.scale)
    assert back.activations == made.quantized.activations
    reference = prepare(encoder)
    compared = compare_codes(back, reference)
    assert compared is not None
    assert compared.neighbours
    assert len(compared.each) == LAYERS * 6 + 2
    assert abs(compared.flipped - made.evidence["flipped"]) < 0.5
    twin = nearest_twin(back, reference)
    assert twin is not None
    nearest = compare_codes(twin, reference)
    assert nearest is not None
    assert nearest.flipped == 0


def test_only_float_values_have_a_grid(made: Defended) -> None:
    integers = {i.name for i in made.quantized.model.graph.inputs}
    assert integers == set(INPUTS)
    assert integers.isdisjoint(made.quantized.activations)


def test_four_bit_weights_on_integer_kernels(file: Path) -> None:
    made = efrapq.defend(file, bits=4, calib=tokens(64))
    report = report_kernels(open_session(made.data).optimized)
    assert report.integer == LAYERS * 7 + 2
    assert softmax_products(report)
    assert [layer["bits"] for layer in made.evidence["layers"]] == [8, *[4] * (LAYERS * 6), 8]
    assert all(layer["loss"] <= 1.1 * layer["loss_nearest"] for layer in made.evidence["layers"])


def test_the_same_inputs_give_the_same_bytes(file: Path, made: Defended) -> None:
    assert efrapq.defend(file, bits=8, calib=tokens(64)).data == made.data


def test_a_word_out_of_the_vocabulary_is_refused(file: Path) -> None:
    feeds = tokens(8)
    feeds["input_ids"][3, 2] = VOCABULARY
    with pytest.raises(UnsupportedModelError, match=r"\(Gather\) cannot be run: index"):
        efrapq.defend(file, bits=8, calib=feeds)
