"""kernels/bf16.cuh on the host: the text that the GPU runs, against exact rational arithmetic and the NumPy casts."""

import ctypes
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest

from cufuse import bf16, compiler
from tests.witnesses import bf16_neighbours, bits, round_to_bf16_codes

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to compile the header for the host")

MODES = bf16.ROUNDING_MODES
SOURCE = """
#include "bf16.cuh"
extern "C" void from_float32(const u32* x, const u32* random, u16* out, long count, int mode) {
    for (long i = 0; i < count; ++i) out[i] = round_float32(x[i], mode, random ? random[i] : 0);
}
extern "C" void from_float64(const u64* x, const u32* random, u16* out, long count, int mode) {
    for (long i = 0; i < count; ++i) out[i] = round_float64(x[i], mode, random ? random[i] : 0);
}
extern "C" long differing(u32 first, long count) {  // from the textbook formula for nearest even
    long bad = 0;
    for (long i = 0; i < count; ++i) {
        const u32 u = first + (u32)i;
        const u16 expected = (u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFF : (u16)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
        bad += round_nearest_even(u) != expected;
    }
    return bad;
}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("bf16_header")
    (folder / "casts.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-shared", "-fPIC"]
    command += [f"-I{compiler.source_folder()}", str(folder / "casts.cpp"), "-o", str(folder / "casts.so")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "casts.so"))
    library.differing.restype = ctypes.c_long
    return library


def cast(header: ctypes.CDLL, x: np.ndarray, mode: str, random: np.ndarray | None = None) -> np.ndarray:
    function = header.from_float32 if x.dtype == np.float32 else header.from_float64
    out = np.empty(x.shape, np.uint16)
    given = None if random is None else random.astype(np.uint32).ctypes.data_as(ctypes.c_void_p)
    held = np.ascontiguousarray(x)
    function(
        held.ctypes.data_as(ctypes.c_void_p), given, out.ctypes.data_as(ctypes.c_void_p), ctypes.c_long(x.size), MODES.index(mode)
    )
    return out


def samples(dtype: type) -> np.ndarray:
    """Beside every tie and code of a few binades, at both ends of the range and among the subnormals; then any bits."""
    rng = np.random.default_rng(5)
    heads = np.array([0, 1, 2, 0x7F, 0x80, 0x81, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F], np.uint32)
    near = ((heads[:, None] << 16) | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1).view(np.float32)
    near = near.astype(dtype)
    with np.errstate(over="ignore"):
        exact = np.concatenate([near, np.nextafter(near, dtype(np.inf)), np.nextafter(near, dtype(-np.inf))])
    unsigned = np.uint32 if dtype is np.float32 else np.uint64
    anything = rng.integers(0, np.iinfo(unsigned).max, 3000, unsigned, endpoint=True).view(dtype)
    sized = np.ldexp(rng.uniform(-1, 1, 3000), rng.integers(-160, 129, 3000)).astype(dtype)
    subnormals = np.array([5e-324, 2.0**-1074, 2.0**-151, 2.0**-150, 2.0**-149, 2.0**-134, 2.0**-133], np.float64)
    x = np.concatenate([exact, -exact, anything, sized, subnormals.astype(dtype)])
    return x[np.isfinite(x)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_definition_of_every_mode(header: ctypes.CDLL, dtype: type) -> None:
    x = samples(dtype)
    modes = [mode for mode in MODES if mode != "stochastic"]
    found = np.stack([cast(header, x, mode) for mode in modes], axis=-1)
    for value, negative, codes in zip(x.tolist(), np.signbit(x).tolist(), found.tolist(), strict=True):
        expected = round_to_bf16_codes(Fraction(abs(value)), negative)
        assert codes == [expected[mode] for mode in modes], value.hex()


@pytest.mark.parametrize(("dtype", "width"), [(np.float32, 16), (np.float64, 32)])
def test_stochastic_definition(header: ctypes.CDLL, dtype: type, width: int) -> None:
    x = samples(dtype)
    rng = np.random.default_rng(6)
    random = rng.integers(0, 2**width, x.size, np.uint64).astype(np.uint32)
    random[::3] = 2**width - 1
    for value, drawn, code in zip(x.tolist(), random.tolist(), cast(header, x, "stochastic", random).tolist(), strict=True):
        below, above, place = bf16_neighbours(Fraction(abs(value)))
        fraction = (place.numerator << width) // place.denominator  # truncated to the width of the random bits
        expected = above if fraction + drawn >= 2**width or place == 1 else below
        assert code & 0x7FFF == expected, (value.hex(), drawn)
        assert code >> 15 == np.signbit(value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", MODES)
def test_special_values(header: ctypes.CDLL, dtype: type, mode: str) -> None:
    unsigned = np.uint32 if dtype is np.float32 else np.uint64
    quiet = np.array([np.nan], dtype).view(unsigned)[0]
    sign = unsigned(1) << unsigned(8 * dtype().itemsize - 1)
    signalling = np.array([np.inf], dtype).view(unsigned)[0] | unsigned(1)
    nans = np.array([quiet, quiet | sign, signalling, signalling | sign, ~unsigned(0)], unsigned).view(dtype)
    random = np.full(9, 0xFFFFFFFF, np.uint32)
    assert cast(header, nans, mode, random).tolist() == [0x7FFF] * 5
    x = np.array([np.inf, -np.inf, 0.0, -0.0], dtype)
    assert cast(header, x, mode, random).tolist() == [0x7F80, 0xFF80, 0x0000, 0x8000]


def test_agrees_with_the_numpy_casts(header: ctypes.CDLL) -> None:
    rng = np.random.default_rng(7)
    for dtype, drawn in ((np.float32, np.uint16), (np.float64, np.uint32)):
        unsigned = np.uint32 if dtype is np.float32 else np.uint64
        x = rng.integers(0, np.iinfo(unsigned).max, 200_000, unsigned, endpoint=True).view(dtype)
        random = rng.integers(0, np.iinfo(drawn).max, x.size, drawn, endpoint=True)
        for mode in MODES:
            given = random if mode == "stochastic" else None
            assert np.array_equal(cast(header, x, mode, given), bits(bf16.round_to_bf16(x, mode=mode, random_bits=given)))


def test_nearest_even_on_all_float32(header: ctypes.CDLL) -> None:
    assert header.differing(0, ctypes.c_long(2**32)) == 0
