"""Random networks of the operators that most models are made of: whatever their order, the whole path holds."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CHANNELS = 4
# What may come next, given the values so far, all of CHANNELS channels and of one size; None where it needs no other.
STEPS = ("conv", "depthwise", "batchnorm", "relu", "clip", "add", "concat", "gate", "pool", "output")
DRAWN = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 99)), min_size=2, max_size=9)


def network(steps: list[tuple[str, int]]) -> tuple[str, dict[str, Any], int]:
    """Graph text, weights and the number of convolutions of a network that takes these steps in turn."""
    lines, outputs = ["v0 = Conv <pads=[1,1,1,1]> (x, w0)"], []
    weights: dict[str, Any] = {"w0": (CHANNELS, 3, 3, 3)}
    values, size, convolutions = ["v0"], 8, 1
    for number, (step, pick) in enumerate(steps, 1):
        last, new, other = values[-1], f"v{number}", values[pick % len(values)]
        if step == "conv":
            lines.append(f"{new} = Conv <pads=[1,1,1,1]> ({other}, w{number}, b{number})")
            weights |= {f"w{number}": (CHANNELS, CHANNELS, 3, 3), f"b{number}": (CHANNELS,)}
            convolutions += 1
        elif step == "depthwise":
            lines.append(f"{new} = Conv <pads=[1,1,1,1], group={CHANNELS}> ({last}, w{number})")
            weights[f"w{number}"] = (CHANNELS, 1, 3, 3)
            convolutions += 1
        elif step == "batchnorm":
            n = f"n{number}"
            lines.append(f"{new} = BatchNormalization ({other}, {n}_s, {n}_b, {n}_m, {n}_v)")
            weights[n] = CHANNELS
        elif step == "relu":
            lines.append(f"{new} = Relu ({last})")
        elif step == "clip":
            lines.append(f"low{number} = Constant <value_float = 0.0> ()")
            lines.append(f"high{number} = Constant <value_float = {1.0 + pick % 5}> ()")
            lines.append(f"{new} = Clip ({last}, low{number}, high{number})")
        elif step == "add":
            lines.append(f"{new} = Add ({last}, {other})")
        elif step == "concat":
            lines.append(f"j{number} = Concat <axis=1> ({last}, {other})")
            lines.append(f"{new} = Conv (j{number}, w{number})")
            weights[f"w{number}"] = (CHANNELS, 2 * CHANNELS, 1, 1)
            convolutions += 1
        elif step == "gate":
            lines += [f"s{number} = Sigmoid ({other})", f"{new} = Mul ({last}, s{number})"]
        elif step == "pool" and size > 2:
            lines.append(f"{new} = MaxPool <kernel_shape=[2,2], strides=[2,2]> ({last})")
            values, size = [], size // 2
        else:
            if last not in outputs:
                outputs.append(last)
            continue
        values.append(new)
    declared = ", ".join(f"float[N,{CHANNELS},?,?] {name}" for name in outputs)
    body = "\n".join(lines)
    text = f"""
    net (float[N,3,8,8] x) => (float[N,5] y{f", {declared}" if outputs else ""})
    {{
        {body}
        p = GlobalAveragePool ({values[-1]})
        f = Flatten (p)
        y = Gemm <transB=1> (f, fc, fcb)
    }}
    """
    return text, weights | {"fc": (5, CHANNELS), "fcb": (5,)}, convolutions


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # each example takes a whole defence: a failing one is read as it is
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(DRAWN)
def test_random_networks(foreign: Any, defended: Any, images: Any, steps: list[tuple[str, int]]) -> None:
    text, weights, convolutions = network(steps)
    # A chance output may be all but constant, so that noise is large beside what varies.
    result = defended(foreign(text, weights), images(16), floor=10)
    assert sum(kind == "Conv" for kind in result.layers.values()) <= convolutions  # dead branches go
    assert result.kinds["Gemm"] == 1
    assert result.left_float == {}
