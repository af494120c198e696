"""Around the tensor core: splitting float32, progress, memory, what is refused, life without Numba."""

import sys
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from cufuse.emulation.tensor_core import TENSOR_CORES, TensorCore, block, matmul, split_float32

bfloat16 = np.dtype(ml_dtypes.bfloat16)


# Splitting float32.


def test_split_is_exact():
    rng = np.random.default_rng(4)
    fractions = np.concatenate(
        [rng.integers(0, 1 << 23, 200), [0, 1, 0x7F8000, 0x7F7FFF, 0x7FFFFF, 0x008000, 0x018000]]
    )
    x = (np.arange(255)[:, None] << 23 | fractions).astype(np.uint32).view(np.float32)
    x = np.stack([x, -x])
    parts = split_float32(x)
    assert all(part.dtype == bfloat16 and np.isfinite(part.astype(np.float32)).all() for part in parts)
    hi, mid, lo = (part.astype(np.float64) for part in parts)
    error = (hi + mid + lo) - x  # exact in float64: everything is a multiple of 2**-149 and of x's last place
    wide = np.abs(x) >= 2.0**-110
    assert (error[wide] == 0).all()
    on_grid = np.ldexp(x.astype(np.float64), 133) % 1 == 0
    assert (~wide & on_grid).any() and (error[on_grid] == 0).all()
    assert (error[~on_grid] != 0).all() and np.abs(error).max() <= 2.0**-134


def test_split_rounds_to_nearest_even_and_never_overflows():
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4028235e38, -3.4028235e38, 3.3961775e38], np.float32)
    hi, mid, lo = split_float32(x)
    # 1 + 2**-8 lies halfway between 1 and 1 + 2**-7; 0x1.FFp127 would round to infinity
    assert hi.view(np.uint16).tolist() == [0x3F80, 0x3F82, 0x7F7F, 0xFF7F, 0x7F7F]
    assert (hi.astype(np.float64) + mid.astype(np.float64) + lo.astype(np.float64) == x).all()


def test_split_of_special_values():
    x = np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0], np.float32)
    hi, mid, lo = split_float32(x)
    assert hi.view(np.uint16).tolist() == [0x7F80, 0xFF80, 0x7FFF, 0x7FFF, 0x0000, 0x8000]
    assert not mid.view(np.uint16).any() and not lo.view(np.uint16).any()
    scalar = split_float32(np.array(1.0, np.float32))
    assert [part.shape for part in scalar] == [()] * 3 and split_float32(x[:0])[0].shape == (0,)


# Work in pieces.


def test_empty():
    assert matmul(np.zeros((0, 8), bfloat16), np.zeros((3, 8), bfloat16)).shape == (0, 3)
    assert matmul(np.zeros((2, 8), bfloat16), np.zeros((0, 8), bfloat16)).shape == (2, 0)
    nothing_to_add = matmul(np.zeros((2, 0), bfloat16), np.zeros((3, 0), bfloat16))
    assert nothing_to_add.shape == (2, 3) and not nothing_to_add.view(np.uint32).any()


def test_memory_does_not_grow_with_the_operands():
    weight = np.broadcast_to(np.ones((), bfloat16), (12288, 5120))
    tracemalloc.start()
    try:
        result = matmul(weight[:2], weight, engine="numpy", threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (result == 5120).all()
    assert peak < 64 << 20  # a float32 copy of the weight alone would be 240 MiB


def test_progress():
    a, b = np.ones((300, 16), bfloat16), np.ones((3000, 16), bfloat16)
    for threads in (1, 3):
        seen, callers = [], set()

        def note(fraction, seen=seen, callers=callers):
            seen.append(fraction)
            callers.add(threading.get_ident())

        matmul(a, b, engine="numpy", threads=threads, progress=note)
        assert seen == sorted(seen) and len(seen) > 1 and seen[-1] == 1.0
        assert callers == {threading.get_ident()}

    def stop(fraction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        matmul(a, b, engine="numpy", threads=2, progress=stop)


# What is refused.

A, B = np.ones((2, 16), bfloat16), np.ones((3, 16), bfloat16)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "a is a value of type list", lambda: matmul([[1.0]], B)),
        (TypeError, "a has dtype float32; .*round_to_bf16", lambda: matmul(A.astype(np.float32), B)),
        (TypeError, "one dtype", lambda: matmul(A.astype(np.float16), B)),
        (TypeError, "sm_70 multiplies float16", lambda: matmul(A, B, core="sm_70")),
        (TypeError, "core is a value of type int", lambda: matmul(A, B, core=90)),
        (ValueError, "known are sm_70", lambda: matmul(A, B, core="sm_60")),
        (ValueError, r"a has shape \(16,\)", lambda: matmul(A[0], B)),
        (ValueError, "a has K = 16 and b has K = 8", lambda: matmul(A, B[:, :8])),
        (ValueError, "empty tuple", lambda: matmul((), B)),
        (ValueError, r"a\[1\] has shape", lambda: matmul((A, A[:1]), B)),
        (ValueError, "k_slices is 0", lambda: matmul(A, B, k_slices=0)),
        (TypeError, "k_slices is 1.5", lambda: matmul(A, B, k_slices=1.5)),
        (ValueError, "threads is 0", lambda: matmul(A, B, threads=0)),
        (ValueError, "engine is 'cuda'", lambda: matmul(A, B, engine="cuda")),
        (ValueError, r"needed is \[..., 8\]", lambda: block(A, A, np.float32(0), core="sm_80")),
        (TypeError, "c is an array of float64", lambda: block(A, A, np.float64(0), core="sm_90")),
        (TypeError, "x is an array of float64", lambda: split_float32(np.zeros(3))),
        (ValueError, "terms is 5", lambda: TensorCore("x", 5, 24, -133, ("float16",), "")),
        (ValueError, "fraction_bits is 26", lambda: TensorCore("x", 16, 26, -133, ("float16",), "")),
        (ValueError, "floor is 0", lambda: TensorCore("x", 16, 25, 0, ("float16",), "")),
        (ValueError, "dtypes names", lambda: TensorCore("x", 16, 25, -133, ("float8",), "")),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "cufuse.emulation._tiles_numba", raising=False)
    with pytest.raises(ImportError, match=r"cufuse\[fast\]"):
        matmul(A, B, engine="numba")
    assert (matmul(A, B) == 16).all()


def test_table():
    assert set(TENSOR_CORES) == {"sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert all(core.name == name and core.known for name, core in TENSOR_CORES.items())
    with pytest.raises(TypeError):
        TENSOR_CORES["sm_90"] = TENSOR_CORES["sm_80"]
