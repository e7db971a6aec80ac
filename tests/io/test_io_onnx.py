from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import onnx
import pytest
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from efrapq.errors import (
    AlreadyQuantizedError,
    BadWeightsError,
    CorruptFileError,
    EfrapqError,
    LimitError,
    UnsupportedFileError,
    UnsupportedModelError,
)
from efrapq.io import Limits, Source, is_quantized, load_onnx, refuse_quantized

ToSource = Callable[..., Source]
RNG = np.random.default_rng(0)


def model_of(*nodes: Any, initializers: Any = (), functions: Any = (), domains: Any = ()) -> Any:
    """A model with input "x" and output "y", both of shape [1, 4]."""
    graph = helper.make_graph(
        list(nodes) or [helper.make_node("Add", ["x", "w"], ["y"], name="add")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        initializer=list(initializers),
    )
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def weight(values: Any = (1, 2, 3, 4), dtype: Any = np.float32) -> Any:
    return numpy_helper.from_array(np.array(values, dtype=dtype), "w")


def function(name: str, *nodes: Any, domain: str = "local", opsets: Any = ("local",)) -> Any:
    imports = [helper.make_opsetid("", 21), *(helper.make_opsetid(d, 1) for d in opsets)]
    return helper.make_function(domain, name, ["x"], ["y"], list(nodes), imports)


def branch(*nodes: Any, initializers: Any = ()) -> Any:
    """A subgraph with output "b", to be a branch of an If."""
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    return helper.make_graph(list(nodes), "branch", [], [output], initializer=list(initializers))


def if_model(graph: Any) -> Any:
    condition = numpy_helper.from_array(np.array(True), "c")
    return model_of(
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=graph, else_branch=graph),
        initializers=[condition],
    )


def identity(source: str = "x", target: str = "b") -> Any:
    return helper.make_node("Identity", [source], [target])


@pytest.fixture
def load(as_source: ToSource) -> Callable[..., Any]:
    def run(model: Any, **options: Any) -> Any:
        data = model if isinstance(model, bytes) else model.SerializeToString()
        return load_onnx(as_source(data), **options)

    return run


# Good models


def test_good_model_comes_back_as_it_was(load: Any) -> None:
    model = model_of(initializers=[weight()])
    loaded = load(model)
    assert loaded.model == model
    assert loaded.external == {}


def test_subgraphs_functions_and_contrib_operators_are_fine(load: Any) -> None:
    load(if_model(branch(identity())))
    call = helper.make_node("F", ["x"], ["h"], domain="local")
    gelu = helper.make_node("Gelu", ["h"], ["y"], domain="com.microsoft")
    body = function("F", helper.make_node("Relu", ["x"], ["y"]))
    load(model_of(call, gelu, functions=[body], domains=["local", "com.microsoft"]))


def test_unknown_fields_are_dropped(load: Any) -> None:
    model = model_of(initializers=[weight()])
    loaded = load(model.SerializeToString() + b"\xfa\x3e\x05hello")
    assert loaded.model.SerializeToString() == model.SerializeToString()


_TYPES = [
    name for name, _ in TensorProto.DataType.items() if name not in ("UNDEFINED", "STRING", "FLOAT6E2M3", "FLOAT6E3M2")
]


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 3)], ids=str)
@pytest.mark.parametrize("name", _TYPES)
@pytest.mark.filterwarnings("ignore")
def test_every_type_is_measured_as_onnx_stores_it(name: str, shape: Any, raw: bool, load: Any) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(name))
    tensor = numpy_helper.from_array(np.ones(shape, np.float32).astype(dtype), "w")
    if not raw:
        tensor = helper.make_tensor("w", tensor.data_type, shape, np.ones(shape, np.float32).astype(dtype).flatten())
    load(model_of(identity("x", "y"), initializers=[tensor]))
    if raw:
        tensor.raw_data += b"\0"
    else:
        tensor.dims.extend([7] if 0 not in shape else [])
        tensor.ClearField("dims") if 0 in shape else None
    with pytest.raises(CorruptFileError, match="'w'"):
        load(model_of(identity("x", "y"), initializers=[tensor]))


@hypothesis.settings(
    max_examples=20, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=4, max_size=4))
def test_weights_round_trip(values: list[float], load: Any) -> None:
    loaded = load(model_of(initializers=[weight(values)])).model
    np.testing.assert_array_equal(numpy_helper.to_array(loaded.graph.initializer[0]), np.array(values, np.float32))


# Not a model


@pytest.mark.parametrize("sixteenths", range(16))
def test_truncated(sixteenths: int, load: Any) -> None:
    data = model_of(initializers=[weight()]).SerializeToString()
    with pytest.raises(CorruptFileError):
        load(data[: len(data) * sixteenths // 16])


@hypothesis.settings(
    max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(position=st.integers(0, 10_000), new=st.binary(min_size=1, max_size=3))
def test_changed_bytes_give_a_model_or_a_typed_error(position: int, new: bytes, load: Any) -> None:
    data = if_model(branch(helper.make_node("Add", ["x", "w"], ["b"]), initializers=[weight()])).SerializeToString()
    at = position % len(data)
    try:
        load(data[:at] + new + data[at + len(new) :])
    except EfrapqError as error:
        message = str(error)
    else:
        message = ""
    assert message == "" or message.isprintable()


def test_models_that_compute_nothing(load: Any) -> None:
    model = model_of(initializers=[weight()])
    for field in ("graph", "opset_import"):
        bad = onnx.ModelProto.FromString(model.SerializeToString())
        bad.ClearField(field)
        with pytest.raises(CorruptFileError, match="not a complete ONNX model"):
            load(bad)
    for field in ("node", "output"):
        bad = onnx.ModelProto.FromString(model.SerializeToString())
        bad.graph.ClearField(field)
        with pytest.raises(UnsupportedModelError, match=r"no (node|output)s"):
            load(bad)


@pytest.mark.parametrize("dims", [[-1, 4], [4, -1]])
def test_minus_one_is_an_unknown_size(dims: list[int], load: Any) -> None:
    model = model_of(helper.make_node("Identity", ["x"], ["y"]))
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, dims, strict=False):
        dim.dim_value = size
    found = load(model).model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value if dim.HasField("dim_value") else None for dim in found] == [
        None if size == -1 else size for size in dims[: len(found)]
    ]


def test_no_other_size_is_negative(load: Any) -> None:
    model = model_of(helper.make_node("Identity", ["x"], ["y"]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -2
    with pytest.raises(CorruptFileError, match="negative dimension"):
        load(model)


def test_checker_has_the_last_word(load: Any) -> None:
    with pytest.raises(CorruptFileError, match="not a valid ONNX model"):
        load(model_of(helper.make_node("NoSuchOperator", ["x"], ["y"])))
    with pytest.raises(CorruptFileError, match="not a valid ONNX model"):
        load(model_of(identity("nowhere", "y")))


def test_checkpoint_is_not_a_model(torch_bytes: Callable[..., bytes], state: Any, load: Any) -> None:
    with pytest.raises(UnsupportedFileError, match="not an ONNX model"):
        load(torch_bytes(state))


# Tensors


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"dims": [-4]}, CorruptFileError, "negative dimension"),
        ({"dims": [-2, -2]}, CorruptFileError, "negative dimension"),
        ({"dims": [2**62, 4]}, LimitError, "too many elements"),
        ({"dims": [2**32, 2**32]}, LimitError, "too many elements"),
        ({"dims": [0, 2**62]}, LimitError, "too many elements"),
        ({"dims": [5]}, CorruptFileError, "needs 20 bytes and has 16"),
        ({"dims": []}, CorruptFileError, "needs 4 bytes and has 16"),
        ({"raw_data": b""}, CorruptFileError, "needs 16 bytes and has 0"),
        ({"raw_data": bytes(17)}, CorruptFileError, "needs 16 bytes and has 17"),
        ({"data_type": 0}, CorruptFileError, "unknown data type"),
        ({"data_type": 99}, CorruptFileError, "unknown data type"),
        ({"data_type": 27}, UnsupportedModelError, "FLOAT6E2M3"),
        ({"data_type": 8}, CorruptFileError, "wrong field"),
        ({"float_data": [1, 2, 3, 4]}, CorruptFileError, "more than once"),
        ({"name": ""}, CorruptFileError, "without a name"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["initializer", "Constant", "branch", "function"])
def test_tensor_that_contradicts_itself(place: str, change: Any, error: Any, match: str, load: Any) -> None:
    tensor = weight()
    for field, value in change.items():
        if field in ("dims", "float_data"):
            tensor.ClearField(field)
            getattr(tensor, field).extend(value)
        else:
            setattr(tensor, field, value)
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    if place != "initializer" and "name" in change:
        pytest.skip("only initializers need a name")
    model = {
        "initializer": lambda: model_of(initializers=[tensor]),
        "Constant": lambda: model_of(constant, add),
        "branch": lambda: if_model(branch(constant, helper.make_node("Add", ["x", "w"], ["b"]))),
        "function": lambda: model_of(
            helper.make_node("F", ["x"], ["y"], domain="local"),
            functions=[function("F", constant, add)],
            domains=["local"],
        ),
    }[place]()
    with pytest.raises(error, match=match):
        load(model)


def test_typed_data_of_the_wrong_kind_or_length(load: Any) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    for field, values in (("float_data", [1.0] * 3), ("int32_data", [1] * 4), ("double_data", [1.0] * 4)):
        bad = TensorProto()
        bad.CopyFrom(tensor)
        getattr(bad, field).extend(values)
        with pytest.raises(CorruptFileError, match="'w'"):
            load(model_of(initializers=[bad]))


def test_segments_are_refused(load: Any) -> None:
    tensor = weight()
    tensor.segment.begin = 0
    with pytest.raises(CorruptFileError, match="segments"):
        load(model_of(initializers=[tensor]))


def test_initializers_of_one_name(load: Any) -> None:
    with pytest.raises(CorruptFileError, match="twice in the graph: 'w'"):
        load(model_of(initializers=[weight(), weight((5, 6, 7, 8))]))


@pytest.mark.parametrize(("dims", "error"), [([1, -4], CorruptFileError), ([2**40, 2**40], LimitError)])
def test_shapes_of_inputs(dims: list[int], error: type[EfrapqError], load: Any) -> None:
    model = model_of(initializers=[weight()])
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, dims))
    with pytest.raises(error, match="value 'x'"):
        load(model)


def test_sparse_initializer_is_measured(load: Any) -> None:
    def sparse(dims: list[int], values: Any) -> Any:
        indices = numpy_helper.from_array(np.array([0, 2], np.int64), "i")
        return helper.make_sparse_tensor(values, indices, dims)

    model = model_of()
    model.graph.sparse_initializer.append(sparse([4], weight((1, 2))))
    load(model)
    model.graph.sparse_initializer[0].CopyFrom(sparse([2**62], weight((1, 2))))
    with pytest.raises(LimitError, match="sparse initializer 'w'"):
        load(model)
    bad = weight((1, 2))
    bad.raw_data += b"\0"
    model.graph.sparse_initializer[0].CopyFrom(sparse([4], bad))
    with pytest.raises(CorruptFileError, match="sparse initializer 'w'"):
        load(model)


# Values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_non_finite_weights(value: float, place: str, load: Any) -> None:
    tensor = weight((1, value, 3, 4))
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    with pytest.raises(BadWeightsError, match="infinity in 'w'"):
        load(model_of(initializers=[tensor]) if place == "initializer" else model_of(constant, add))


@pytest.mark.parametrize("name", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"])
def test_non_finite_in_typed_fields(name: str, load: Any) -> None:
    number = TensorProto.DataType.Value(name)
    for value, good in ((np.inf, False), (np.nan, False), (65504.0 if name == "FLOAT16" else 3e38, True)):
        tensor = helper.make_tensor("w", number, [2], [1.0, value])
        model = model_of(identity("x", "y"), identity("w", "unused"), initializers=[tensor])
        if good:
            load(model)
        else:
            with pytest.raises(BadWeightsError, match="'w'"):
                load(model)


def test_infinity_may_be_a_bound(load: Any) -> None:
    scalar = numpy_helper.from_array(np.array(np.inf, np.float32), "top")
    load(model_of(helper.make_node("Clip", ["x", "", "top"], ["y"]), initializers=[scalar]))


# Structure


def nested(depth: int) -> Any:
    graph = branch(identity(target="b0"))
    graph.output[0].name = "b0"
    for level in range(1, depth + 1):
        yes = numpy_helper.from_array(np.array(True))
        constant = helper.make_node("Constant", [], [f"c{level}"], value=yes)
        choice = helper.make_node("If", [f"c{level}"], [f"b{level}"], then_branch=graph, else_branch=graph)
        if level > 8:  # the size doubles with each level, so deep ones have one branch only
            del choice.attribute[1]
        graph = branch(constant, choice)
        graph.output[0].name = f"b{level}"
    return graph


def test_nesting(load: Any) -> None:
    load(if_model(nested(6)))
    with pytest.raises(LimitError, match="nested deeper than 6"):
        load(if_model(nested(6)), limits=Limits(max_nesting=6))
    with pytest.raises((LimitError, CorruptFileError), match="deep"):
        load(if_model(nested(31)))


def calls(*names: str) -> list[Any]:
    steps = ["x", *(f"h{i}" for i in range(len(names) - 1)), "y"]
    return [helper.make_node(n, [a], [b], domain="local") for n, a, b in zip(names, steps, steps[1:], strict=False)]


def test_function_cycles(load: Any) -> None:
    for functions in (
        [function("A", *calls("A"))],
        [function("A", *calls("B")), function("B", *calls("A"))],
        [function("A", helper.make_node("Relu", ["x"], ["y"])), function("B", *calls("C")), function("C", *calls("B"))],
    ):
        with pytest.raises(CorruptFileError, match="call themselves"):
            load(model_of(*calls("A"), functions=functions, domains=["local"]))


def test_function_that_calls_itself_from_a_branch(load: Any) -> None:
    graph = branch(helper.make_node("A", ["x"], ["b"], domain="local"))
    body = helper.make_node("If", ["x"], ["y"], then_branch=graph, else_branch=graph)
    with pytest.raises(CorruptFileError, match="call themselves"):
        load(model_of(*calls("A"), functions=[function("A", body)], domains=["local"]))


def chain(length: int, fan: int = 1) -> list[Any]:
    functions = [function(f"F{i}", *calls(*[f"F{i + 1}"] * fan)) for i in range(length)]
    return [*functions, function(f"F{length}", helper.make_node("Relu", ["x"], ["y"]))]


@pytest.mark.parametrize("backwards", [False, True])
def test_function_calls_nested_deep(backwards: bool, load: Any) -> None:
    functions = chain(40)
    with pytest.raises(LimitError, match="nested deeper"):
        load(model_of(*calls("F0"), functions=functions[::-1] if backwards else functions, domains=["local"]))
    # Depth counts even where the inner half was measured before.
    with pytest.raises(LimitError, match="nested deeper"):
        load(model_of(*calls("F20", "F0"), functions=functions, domains=["local"]))


def test_functions_that_expand_without_bounds(load: Any) -> None:
    with pytest.raises(LimitError, match="once its functions are expanded"):
        load(model_of(*calls("F0"), functions=chain(25, fan=8), domains=["local"]))


def test_functions_that_hide_something(load: Any) -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(CorruptFileError, match="'A' is defined twice"):
        load(model_of(*calls("A"), functions=[function("A", relu)] * 2, domains=["local"]))
    for domain in ("", "ai.onnx"):
        with pytest.raises(UnsupportedModelError, match="redefine standard operators: 'Relu'"):
            load(model_of(relu, functions=[function("Relu", identity("x", "y"), domain=domain, opsets=())]))


def test_custom_domains(load: Any) -> None:
    evil = helper.make_node("Run\x1b", ["x"], ["y"], domain="evil")
    with pytest.raises(UnsupportedModelError, match=r"'evil::Run\\x1b'"):
        load(model_of(evil, domains=["evil"]))
    with pytest.raises(UnsupportedModelError, match="evil::Run"):
        # A function makes its own operator known, not its whole domain.
        load(model_of(evil, functions=[function("F", identity("x", "y"), domain="evil")], domains=["evil"]))
    load(model_of(evil, domains=["evil"]), allow_domains=["evil"])
    load(model_of(identity("x", "y"), domains=["evil"]))


def test_too_many_nodes(load: Any) -> None:
    nodes = [helper.make_node("Relu", [f"h{i}"], [f"h{i + 1}"]) for i in range(20)]
    with pytest.raises(LimitError, match="more than 10 nodes"):
        load(model_of(identity("x", "h0"), *nodes, identity("h20", "y")), limits=Limits(max_nodes=10))


def test_model_larger_than_protobuf(load: Any) -> None:
    with pytest.raises(LimitError, match="over the limit of 50 bytes"):
        load(model_of(initializers=[weight()]), limits=Limits(max_onnx_bytes=50))


def test_walk_knows_every_way_to_a_tensor() -> None:
    """Fails when ONNX grows a field that may hold a tensor or a graph, so that the walk can learn it."""
    known = {
        ("ModelProto", "graph"),
        ("ModelProto", "training_info"),
        ("ModelProto", "functions"),
        ("TrainingInfoProto", "initialization"),
        ("TrainingInfoProto", "algorithm"),
        ("GraphProto", "node"),
        ("GraphProto", "initializer"),
        ("GraphProto", "sparse_initializer"),
        ("FunctionProto", "node"),
        ("FunctionProto", "attribute_proto"),
        ("NodeProto", "attribute"),
        ("AttributeProto", "t"),
        ("AttributeProto", "tensors"),
        ("AttributeProto", "g"),
        ("AttributeProto", "graphs"),
        ("AttributeProto", "sparse_tensor"),
        ("AttributeProto", "sparse_tensors"),
        ("SparseTensorProto", "values"),
        ("SparseTensorProto", "indices"),
    }
    leads = {"TensorProto"}
    while True:
        edges = {
            (message.DESCRIPTOR.name, field.name)
            for message in vars(onnx).values()
            if hasattr(message, "DESCRIPTOR") and hasattr(message.DESCRIPTOR, "fields")
            for field in message.DESCRIPTOR.fields
            if field.message_type is not None and field.message_type.name in leads
        }
        parents = {parent for parent, _ in edges}
        if parents <= leads:
            break
        leads |= parents
    # Values outside models, which efrapq does not read.
    elsewhere = {"SequenceProto", "MapProto", "OptionalProto", "OperatorSetProto"}
    assert {edge for edge in edges if edge[0] not in elsewhere} == known


# Quantized models


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        ("QuantizeLinear", ""),
        ("DequantizeLinear", "ai.onnx"),
        ("DynamicQuantizeLinear", ""),
        ("QLinearConv", ""),
        ("QLinearMatMul", ""),
        ("ConvInteger", ""),
        ("MatMulInteger", ""),
        ("QLinearAdd", "com.microsoft"),
        ("QGemm", "com.microsoft"),
        ("MatMulNBits", "com.microsoft"),
        ("DynamicQuantizeMatMul", "com.microsoft"),
    ],
)
@pytest.mark.parametrize("place", ["graph", "branch", "function"])
def test_quantized_models_are_known(op: str, domain: str, place: str) -> None:
    node = helper.make_node(op, ["x"], ["y"], name="quant", domain=domain)
    model = {
        "graph": lambda: model_of(node),
        "branch": lambda: if_model(branch(node)),
        "function": lambda: model_of(*calls("F"), functions=[function("F", node)]),
    }[place]()
    assert is_quantized(model)
    with pytest.raises(AlreadyQuantizedError, match=rf"m\.onnx: already quantized \(node 'quant' \({op}\)"):
        refuse_quantized(model, "m.onnx")


def test_float_models_are_not_quantized() -> None:
    model = if_model(branch(helper.make_node("Quick", ["x"], ["b"], domain="evil"), identity()))
    assert not is_quantized(model)
    refuse_quantized(model, "m.onnx")


def test_quantized_model_loads(load: Any) -> None:
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "s")
    zero = numpy_helper.from_array(np.array(0, np.int8), "z")
    model = model_of(
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        initializers=[scale, zero],
    )
    assert is_quantized(load(model).model)
