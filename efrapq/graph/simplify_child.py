"""onnxsim on a model, in this process or, under limits, as a program of its own.

The program imports nothing of efrapq: `python -P simplify_child.py MEMORY SECONDS`, a model on its standard input. It
writes one byte, whether onnxsim found its result to compute the same, and the simplified model; or exits with FAILED
and the reason on its standard error, or with TOO_LARGE.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["FAILED", "TOO_LARGE", "run_onnxsim"]

FAILED, TOO_LARGE = 3, 4
# Of onnxsim, not to be made: they join the weights of several layers, whose names and grids are what a user asks about,
# or hide them in an operator of ONNX Runtime's own, where they would stay float.
FUSIONS = ("fuse_attention", "fuse_gqa", "fuse_qkv")


def run_onnxsim(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """The simplified model, and whether it computes the same; BatchNorm stays. Raises what onnxsim raises."""
    import onnxsim
    from onnx import shape_inference

    if not all(o.type.tensor_type.HasField("shape") for o in proto.graph.output):
        # onnxsim refuses outputs without a shape, which ONNX Runtime runs.
        proto = shape_inference.infer_shapes(proto)
    try:
        simplified, ok = onnxsim.simplify(proto, skip_fuse_bn=True, skipped_optimizers=list(FUSIONS))
    except RuntimeError:
        # Taking an If apart, it may put nodes ahead of what they read; then the If stays.
        skipped = [*FUSIONS, "eliminate_if_with_const_cond"]
        simplified, ok = onnxsim.simplify(proto, skip_fuse_bn=True, skipped_optimizers=skipped)
    return simplified, bool(ok)


def main() -> int:
    """The program; its exit code."""
    memory, seconds = (int(argument) for argument in sys.argv[1:])
    try:
        import resource
    except ImportError:
        pass  # Windows: the parent's clock is what is left
    else:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        # The signal at the first limit is one of its own, and not that of a system without memory.
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    # onnxsim imports it where it is there, which takes seconds, and does without.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import onnx

        simplified, ok = run_onnxsim(onnx.ModelProto.FromString(sys.stdin.buffer.read()))
        sys.stdout.buffer.write(bytes([ok]) + simplified.SerializeToString())
        sys.stdout.buffer.flush()
    except MemoryError:
        return TOO_LARGE
    except Exception as exc:  # noqa: BLE001  whatever it is, the parent says it
        if "bad_alloc" in str(exc) or "allocate memory" in str(exc):
            return TOO_LARGE
        print(exc, file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
