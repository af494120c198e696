"""What the operations refuse: the kind of error, what its message names, and that nothing was written to ``out``."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cufuse
from tests.witnesses import bits, random_bf16

BF16 = ml_dtypes.bfloat16
F32 = np.float32
SENTINEL = 7.0


class NotAnArray:
    """Stands for an array of another library."""

    shape, dtype, ndim = (3, 16), np.dtype(BF16), 2


def sentinel(*shape: int, dtype: Any = BF16) -> np.ndarray:
    return np.full(shape, SENTINEL, dtype)


def rms_norm() -> dict[str, Any]:
    return {"x": random_bf16(1, 3, 16), "weight": random_bf16(2, 16), "out": sentinel(3, 16)}


def add_rms_norm() -> dict[str, Any]:
    return rms_norm() | {"residual": random_bf16(3, 3, 16), "out": (sentinel(3, 16), sentinel(3, 16))}


def linear() -> dict[str, Any]:
    return {"x": random_bf16(1, 3, 16), "weight": random_bf16(2, 5, 16), "k_slices": 1, "out": sentinel(3, 5)}


def rope() -> dict[str, Any]:
    cos, sin = cufuse.rope_tables(np.arange(3), 8)
    q, k = random_bf16(1, 3, 4, 8), random_bf16(2, 3, 2, 8)
    return {"q": q, "k": k, "cos": cos, "sin": sin, "out": (sentinel(3, 4, 8), sentinel(3, 2, 8))}


def block() -> dict[str, Any]:
    cos, sin = cufuse.rope_tables(np.arange(3), 8)
    return {
        "x": random_bf16(1, 3, 16),
        "norm_weight": random_bf16(2, 16),
        "qkv_weight": random_bf16(3, 64, 16),
        "q_norm_weight": random_bf16(4, 8),
        "k_norm_weight": random_bf16(5, 8),
        "cos": cos,
        "sin": sin,
        "residual": random_bf16(6, 3, 16),
        "heads": 4,
        "k_slices": 1,
        "out": (sentinel(3, 4, 8), sentinel(3, 2, 8), sentinel(3, 2, 8), sentinel(3, 16)),
    }


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "rms_norm": (cufuse.rms_norm, rms_norm),
    "add_rms_norm": (cufuse.add_rms_norm, add_rms_norm),
    "linear": (cufuse.linear, linear),
    "rope": (cufuse.rope, rope),
    "rms_norm_qkv": (cufuse.rms_norm_qkv, block),
}


def demand_error(operation: str, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    """The operation with some arguments changed raises this, and every ``out`` that it was given is as before."""
    function, arguments = OPERATIONS[operation]
    given = arguments()
    outs = given["out"] if isinstance(given["out"], tuple) else (given["out"],)
    with pytest.raises(kind, match=message):
        function(**given | changes)
    for out in (*outs, changes.get("out")):
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, np.ndarray):
                assert (one.astype(F32) == SENTINEL).all(), "written to before the error"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_arguments_are_right_before_they_are_made_wrong(operation: str) -> None:
    function, arguments = OPERATIONS[operation]
    given = arguments()
    function(**given)
    for out in given["out"] if isinstance(given["out"], tuple) else (given["out"],):
        assert (out.astype(F32) != SENTINEL).any()


WRONG = [
    # kinds
    ("rms_norm", {"x": [[1.0] * 16] * 3}, TypeError, "x is a builtins.list; needed is a NumPy or CuPy array: numpy.asarray"),
    ("rms_norm", {"weight": (1.0,) * 16}, TypeError, "weight is a builtins.tuple"),
    ("rms_norm", {"x": NotAnArray()}, TypeError, "x is a .*NotAnArray; needed is a NumPy or CuPy array.*from_dlpack"),
    ("rms_norm", {"out": [[0.0] * 16] * 3}, TypeError, "out is a builtins.list"),
    ("add_rms_norm", {"residual": NotAnArray()}, TypeError, "residual is a .*NotAnArray"),
    *(
        (operation, {name: None}, TypeError, rf"{name}(\[0\])? is a builtins.NoneType; needed is a NumPy or CuPy array")
        for operation, names in {
            "rms_norm": "x weight", "add_rms_norm": "x residual weight", "linear": "x weight", "rope": "q k cos sin",
            "rms_norm_qkv": "x norm_weight qkv_weight",
        }.items()
        for name in names.split()
    ),
    ("add_rms_norm", {"out": sentinel(3, 16)}, TypeError, "out is a ndarray; needed is a tuple of 2 arrays: normalised, new"),
    ("add_rms_norm", {"out": (sentinel(3, 16),)}, TypeError, "tuple of 2"),
    ("linear", {"weight": 3.0}, TypeError, "weight is a builtins.float"),
    ("rope", {"cos": [1.0]}, TypeError, "cos is a builtins.list"),
    ("rope", {"out": (NotAnArray(), None)}, TypeError, r"out\[0\] is a .*NotAnArray"),
    ("rms_norm_qkv", {"qkv_weight": [[1.0] * 16] * 64}, TypeError, r"qkv_weight\[0\] is a builtins.list"),
    ("rms_norm_qkv", {"sin": "sin"}, TypeError, "sin is a builtins.str"),
    ("rms_norm_qkv", {"out": (None, None, None)}, TypeError, "tuple of 4 arrays: q, k, v, new residual"),
    ("rms_norm_qkv", {"heads": 4.0}, TypeError, "heads is a float; needed is an integer"),
    ("rms_norm_qkv", {"head_dim": "8"}, TypeError, "head_dim is a str"),
    # dtypes, and the remedy
    ("rms_norm", {"x": np.ones((3, 16), F32)}, TypeError, "x has dtype float32.*'torch' takes bfloat16: round it .*'float32'"),
    ("rms_norm", {"x": np.ones((3, 16))}, TypeError, "x has dtype float64.*round it with cufuse.round_to_bf16"),
    ("rms_norm", {"x": np.ones((3, 16), np.float16)}, TypeError, r"x has dtype float16.*astype\(numpy.float32\).*round_to_bf16"),
    ("rms_norm", {"x": np.ones((3, 16), int)}, TypeError, r"x has dtype int64.*astype\(numpy.float32\)"),
    ("rms_norm", {"weight": np.ones(16)}, TypeError, "weight has dtype float64.*takes bfloat16 or float32: round it"),
    ("rms_norm", {"weight": np.ones(16, np.float16)}, TypeError, r"weight has dtype float16.*astype\(numpy.float32\)"),
    ("rms_norm", {"weight": np.ones(16, F32), "recipe": "vllm-0.20"}, TypeError, "weight .* recipe 'vllm-0.20' takes bfloat16:"),
    ("rms_norm", {"weight": np.ones(16, F32)}, TypeError, "out has dtype bfloat16; needed is float32"),
    ("rms_norm", {"recipe": "float32"}, TypeError, "out has dtype bfloat16; needed is float32"),
    ("rms_norm", {"out": sentinel(3, 16, dtype=F32)}, TypeError, "out has dtype float32; needed is bfloat16"),
    ("add_rms_norm", {"residual": np.ones((3, 16), F32)}, TypeError, "residual has dtype float32; recipe 'torch'"),
    ("add_rms_norm", {"out": (sentinel(3, 16), sentinel(3, 16, dtype=F32))}, TypeError, r"out\[1\] has dtype float32"),
    ("linear", {"x": np.ones((3, 16), F32)}, TypeError, "x has dtype float32; the projection of recipe 'torch' takes bfloat16: "),
    ("linear", {"x": np.ones((3, 16), np.float16)}, TypeError, "x has dtype float16.*astype"),
    ("linear", {"weight": np.ones((5, 16), F32)}, TypeError, "weight has dtype float32; needed is bfloat16: round it"),
    ("linear", {"weight": np.ones((5, 16), np.float16)}, TypeError, "weight has dtype float16; needed is bfloat16: convert it"),
    ("linear", {"x": np.ones((3, 16)), "recipe": "float32"}, TypeError, "x has dtype float64.*takes bfloat16 or float32"),
    ("rope", {"q": np.ones((3, 4, 8), F32)}, TypeError, "q has dtype float32; the rotation of recipe 'torch' takes bfloat16"),
    ("rope", {"cos": np.ones((3, 8))}, TypeError, "cos has dtype float64; recipe 'torch' takes bfloat16 or float32: "),
    ("rope", {"recipe": "flashinfer"}, TypeError, "cos .* recipe 'flashinfer' takes float32: .*dtype=numpy.float32"),
    ("rms_norm_qkv", {"norm_weight": np.ones(16, F32)}, TypeError, "norm_weight has dtype float32.*its projection takes bfloat16"),
    ("rms_norm_qkv", {"q_norm_weight": np.ones(8, F32)}, TypeError, "q_norm_weight has dtype float32"),
    ("rms_norm_qkv", {"qkv_weight": np.ones((64, 16), np.float16)}, TypeError, r"qkv_weight\[0\] has dtype float16"),
    ("rms_norm_qkv", {"x": np.ones((3, 16), F32)}, TypeError, "x has dtype float32"),
    ("rms_norm_qkv", {"recipe": "float32"}, TypeError, "cos has dtype bfloat16; recipe 'float32' takes float32"),
    # values
    *(
        (operation, {"eps": eps}, ValueError, "eps is .*needed is a finite number >= 0")
        for operation in ("rms_norm", "add_rms_norm", "rms_norm_qkv")
        for eps in (-1e-6, float("nan"), float("inf"), 1e39, 10**400, "1e-6", None)
    ),
    *((operation, {"recipe": "pytorch"}, ValueError, "recipe is 'pytorch'; known are torch") for operation in OPERATIONS),
    *((operation, {"recipe": 1}, TypeError, "recipe is a int; needed is a name or a cufuse.Recipe") for operation in OPERATIONS),
    *(
        (operation, {"k_slices": slices}, ValueError, "k_slices is .*needed is an integer >= 1")
        for operation in ("linear", "rms_norm_qkv")
        for slices in (0, -1, True, 1.0, "cublas")
    ),
    # shapes
    ("rms_norm", {"x": np.ones((), BF16)}, ValueError, r"x has shape \(\); needed is \[..., K\]"),
    ("rms_norm", {"x": np.ones((3, 0), BF16)}, ValueError, "K >= 1"),
    ("rms_norm", {"weight": np.ones(15, BF16)}, ValueError, r"weight has shape \(15,\); needed is \(16,\)"),
    ("rms_norm", {"weight": np.ones((1, 16), BF16)}, ValueError, r"weight has shape \(1, 16\)"),
    ("rms_norm", {"out": sentinel(16, 3)}, ValueError, r"out has shape \(16, 3\); needed is \(3, 16\)"),
    ("add_rms_norm", {"residual": np.ones((1, 16), BF16)}, ValueError, r"residual has shape \(1, 16\); needed is \(3, 16\)"),
    ("add_rms_norm", {"out": (sentinel(3, 16), sentinel(3, 15))}, ValueError, r"out\[1\] has shape \(3, 15\)"),
    ("linear", {"weight": np.ones((5, 15), BF16)}, ValueError, r"x has shape \(3, 16\); needed is \[..., 15\]"),
    ("linear", {"weight": np.ones(16, BF16)}, ValueError, r"weight has shape \(16,\); needed is \[N, K\]"),
    ("linear", {"x": np.ones((3, 0), BF16), "weight": np.ones((5, 0), BF16)}, ValueError, "K >= 1"),
    ("linear", {"out": sentinel(5, 3)}, ValueError, "out has shape"),
    ("rope", {"q": random_bf16(1, 3, 4, 7)}, ValueError, "even D"),
    ("rope", {"k": random_bf16(1, 2, 2, 8)}, ValueError, r"cos has shape \(3, 8\); for k of shape \(2, 2, 8\) needed is \(2, 8\)"),
    ("rope", {"sin": random_bf16(1, 3, 4)}, ValueError, "sin has shape"),
    ("rope", {"q": random_bf16(1, 8)}, ValueError, "q has shape"),
    ("rms_norm_qkv", {"cos": None}, ValueError, "cos and sin go together"),
    ("rms_norm_qkv", {"sin": None}, ValueError, "cos and sin go together"),
    ("rms_norm_qkv", {"k_norm_weight": None}, ValueError, "q_norm_weight and k_norm_weight go together"),
    ("rms_norm_qkv", {"q_norm_weight": None, "k_norm_weight": None}, ValueError, "head_dim is None.*needed"),
    ("rms_norm_qkv", {"k_norm_weight": random_bf16(1, 4)}, ValueError, "k_norm_weight has shape"),
    ("rms_norm_qkv", {"q_norm_weight": random_bf16(1, 0), "k_norm_weight": random_bf16(1, 0)}, ValueError, r"shape \(0,\)"),
    ("rms_norm_qkv", {"head_dim": 4}, ValueError, "head_dim is 4, but q_norm_weight has shape"),
    ("rms_norm_qkv", {"heads": 5}, ValueError, "heads = 5 and kv_heads = None do not divide 8 heads"),
    ("rms_norm_qkv", {"heads": 8}, ValueError, "do not divide 8 heads"),
    ("rms_norm_qkv", {"heads": 0}, ValueError, "do not divide 8 heads"),
    ("rms_norm_qkv", {"heads": 4, "kv_heads": 3}, ValueError, "do not divide 8 heads"),
    ("rms_norm_qkv", {"heads": None, "kv_heads": 4}, ValueError, "do not divide 8 heads"),
    ("rms_norm_qkv", {"heads": None}, ValueError, "give heads .of q. or kv_heads"),
    ("rms_norm_qkv", {"qkv_weight": random_bf16(1, 60, 16)}, ValueError, r"qkv_weight has \[60\] rows.*multiples of .* 8"),
    ("rms_norm_qkv", {"qkv_weight": random_bf16(1, 64, 15)}, ValueError, r"qkv_weight\[0\] has shape \(64, 15\)"),
    ("rms_norm_qkv", {"qkv_weight": (random_bf16(1, 32, 16), random_bf16(1, 32, 16))}, ValueError, "tuple of 2"),
    ("rms_norm_qkv", {"qkv_weight": ()}, ValueError, "tuple of 0"),
    (
        "rms_norm_qkv",
        {"qkv_weight": tuple(random_bf16(1, n, 16) for n in (32, 16, 8))},
        ValueError,
        "2 key heads and 1 value heads; needed are as many",
    ),
    (
        "rms_norm_qkv",
        {"qkv_weight": tuple(random_bf16(1, n, 16) for n in (32, 16, 16)), "kv_heads": 1},
        ValueError,
        "kv_heads is 1, but the weights have 2",
    ),
    ("rms_norm_qkv", {"residual": random_bf16(1, 2, 16)}, ValueError, "residual has shape"),
    ("rms_norm_qkv", {"norm_weight": random_bf16(1, 17)}, ValueError, "norm_weight has shape"),
    ("rms_norm_qkv", {"cos": random_bf16(1, 2, 8)}, ValueError, r"cos has shape \(2, 8\); needed is \(3, 8\)"),
    ("rms_norm_qkv", {"x": np.ones((), BF16)}, ValueError, "x has shape"),
    (
        "rms_norm_qkv",
        {name: random_bf16(1, 1) for name in ("q_norm_weight", "k_norm_weight")}
        | {name: random_bf16(1, 3, 1) for name in ("cos", "sin")}
        | {"heads": 32},
        ValueError,
        "head_dim is 1; rotation needs an even number",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "changes", "kind", "message"), WRONG, ids=[f"{one[0]}-{one[3][:30]}" for one in WRONG])
def test_wrong_arguments(operation: str, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    demand_error(operation, changes, kind, message)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_read_only_out(operation: str) -> None:
    given = OPERATIONS[operation][1]()
    several = isinstance(given["out"], tuple)
    outs = given["out"] if several else (given["out"],)
    for number in range(len(outs)):
        changed = [one.copy() for one in outs]
        changed[number].flags.writeable = False
        demand_error(operation, {"out": tuple(changed) if several else changed[0]}, ValueError, "out.* is read-only")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_that_overlaps_an_input_or_another_out(operation: str) -> None:
    """Every output against every input of which it can be a view, and the outputs with one another."""
    function, arguments = OPERATIONS[operation]
    given = arguments()
    several = isinstance(given["out"], tuple)
    count = len(given["out"]) if several else 1
    inputs = [name for name, value in given.items() if isinstance(value, np.ndarray) and name != "out"]
    for number in range(count):
        for name in inputs:
            given = arguments()
            outs = list(given["out"]) if several else [given["out"]]
            shared = sentinel(outs[number].size + given[name].size)
            outs[number] = shared[: outs[number].size].reshape(outs[number].shape)
            overlapping = shared[outs[number].size - 1 :][: given[name].size].reshape(given[name].shape)
            before = shared.copy()
            with pytest.raises(ValueError, match=rf"out.* overlaps {name}"):
                function(**given | {name: overlapping, "out": tuple(outs) if several else outs[0]})
            assert (bits(shared) == bits(before)).all()
        for other in range(number):
            outs = list(arguments()["out"])
            shared = sentinel(outs[number].size + outs[other].size - 1)
            outs[other] = shared[: outs[other].size].reshape(outs[other].shape)
            outs[number] = shared[outs[other].size - 1 :].reshape(outs[number].shape)
            demand_error(operation, {"out": tuple(outs)}, ValueError, rf"out\[{number}\] overlaps out\[{other}\]")


def test_interleaved_memory_is_no_overlap() -> None:
    """Input and output in alternate columns of one buffer share bounds, but no element."""
    buffer = np.zeros((3, 32), BF16)
    buffer[:, ::2] = random_bf16(1, 3, 16)
    weight = random_bf16(2, 16)
    found = cufuse.rms_norm(buffer[:, ::2], weight, out=buffer[:, 1::2])
    assert (bits(found) == bits(cufuse.rms_norm(buffer[:, ::2].copy(), weight))).all()


def test_rotary_table_arguments() -> None:
    wrong = [
        (TypeError, "positions have dtype float64", (np.arange(3.0), 8), {}),
        (ValueError, "positions go down to -1", ([-1], 8), {}),
        (ValueError, "head_dim is 7", ([1], 7), {}),
        (ValueError, "head_dim is 0", ([1], 0), {}),
        (ValueError, "base is 0", ([1], 8), {"base": 0}),
        (ValueError, "base is nan", ([1], 8), {"base": float("nan")}),
        (TypeError, "dtype is .*float64", ([1], 8), {"dtype": np.float64}),
    ]
    for kind, message, positional, named in wrong:
        with pytest.raises(kind, match=message):
            cufuse.rope_tables(*positional, **named)


def test_errors_of_another_library_say_which_array_is_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy and CuPy mixed: a stand-in for CuPy, since the real one needs a GPU to make an array."""
    import sys
    import types

    class CupyArray(NotAnArray):
        pass

    module = types.ModuleType("cupy")
    module.ndarray = CupyArray
    monkeypatch.setitem(sys.modules, "cupy", module)
    with pytest.raises(TypeError, match=r"x is a numpy array, weight is a cupy array.*cupy\.asarray or cupy\.asnumpy"):
        cufuse.rms_norm(random_bf16(1, 3, 16), CupyArray())
    with pytest.raises(TypeError, match="x is a cupy array, weight is a numpy array"):
        cufuse.linear(CupyArray(), random_bf16(1, 3, 16))
    with pytest.raises(TypeError, match="x is a numpy array, out is a cupy array"):
        cufuse.round_to_bf16(np.ones((3, 16), F32), out=CupyArray())
