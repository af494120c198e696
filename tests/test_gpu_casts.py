"""``round_to_bf16`` on a GPU: every float32 in every mode against the definition, against PyTorch and against the emulation."""

from functools import partial
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse.bf16 import ROUNDING_MODES, bfloat16
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import Case, Guarded, against_numpy, demand_cases, demand_same, to_gpu

pytestmark = gpu_support.MARKS

MODES = [mode for mode in ROUNDING_MODES if mode != "stochastic"]
AT_A_TIME = 1 << 26
NAN = 0x7FFF


def neighbours(x: Any) -> tuple[Any, Any, Any]:
    """For a tensor of float32 or float64: the code of the bfloat16 magnitude below, how far on the way to the next one the value
    is (exact, 0 <= place < 1), and the sign bit. From the numbers' definition in float64, not from bits cut off.

    From 2**128 on the place is 1 above the largest finite code.
    """
    torch = gpu_support.torch()
    magnitude = x.double().abs()
    exponent = (((magnitude.view(torch.int64) >> 52) & 0x7FF) - 1023).clamp(min=-126)
    # a step is 2**(exponent - 7), also below the smallest normal; powers of two by their bits, so nothing is rounded
    in_steps = magnitude * ((1023 + 7 - exponent.clamp(max=128)) << 52).view(torch.float64)
    below = in_steps.floor()
    code, place = (exponent + 126) * 128 + below.long(), in_steps - below
    beyond = magnitude >= 2.0**128
    code = torch.where(beyond, 0x7F7F, code)
    place = torch.where(beyond, 1.0, place)
    infinite = magnitude == float("inf")
    return torch.where(infinite, 0x7F80, code), torch.where(infinite, 0.0, place), torch.signbit(x)


def by_definition(x: Any, mode: str, found: tuple[Any, Any, Any], random_bits: Any = None) -> Any:
    """The codes that a mode's definition asks for, as a CuPy bfloat16 array."""
    torch = gpu_support.torch()
    code, place, negative = found
    if mode == "nearest_even":
        outward = (place > 0.5) | ((place == 0.5) & (code % 2 == 1))
    elif mode == "nearest_away":
        outward = place >= 0.5
    elif mode == "stochastic":
        one = 2**16 if x.dtype == torch.float32 else 2**32
        outward = (place * one).floor().long() + random_bits >= one
    else:
        side = {"toward_zero": torch.zeros_like(negative), "up": ~negative, "down": negative}[mode]
        outward = (place > 0) & side
    result = code + outward.long() + negative.long() * 0x8000
    result = torch.where(torch.isnan(x), NAN, result)
    return gpu_support.from_torch(result).astype(np.uint16).view(bfloat16)


def test_all_float32_in_every_mode() -> None:
    """2**32 inputs, five modes, against the definition; nearest_even against PyTorch's cast too."""
    torch = gpu_support.torch()
    for first in range(-(2**31), 2**31, AT_A_TIME):
        x = torch.arange(first, first + AT_A_TIME, dtype=torch.int64, device="cuda").to(torch.int32).view(torch.float32)
        given, found = gpu_support.from_torch(x), neighbours(x)
        for mode in MODES:
            rounded = cufuse.round_to_bf16(given, mode=mode)
            demand_same("casts of float32", rounded, by_definition(x, mode, found), f"{mode} from {first:#x}")
            if mode == "nearest_even":
                cast = gpu_support.from_torch(x.to(torch.bfloat16))
                demand_same("casts of float32, PyTorch", rounded, cast, f"from {first:#x}")


def float64_values() -> np.ndarray:
    """Beside every bfloat16 and every tie between two: the neighbouring float64 and some farther away; and any bits."""
    codes = np.arange(65536, dtype=np.uint32) << np.uint32(16)
    places = [codes.view(np.float32), (codes | np.uint32(0x8000)).view(np.float32)]
    with np.errstate(all="ignore"):
        wide = np.concatenate(places).astype(np.float64)
        beside = [np.nextafter(wide, -np.inf), wide, np.nextafter(wide, np.inf), wide * (1 + 2.0**-40), wide * (1 - 2.0**-40)]
    raw = np.random.default_rng(11).integers(0, 2**64, 1 << 21, np.uint64)
    # the same significands and signs in the range of bfloat16 and a little beyond: 2**-155 to 2**164
    exponents = (raw >> np.uint64(53)) % np.uint64(320) + np.uint64(1023 - 155)
    within = (raw & np.uint64(0x800FFFFFFFFFFFFF)) | exponents << np.uint64(52)
    return np.concatenate([*beside, raw.view(np.float64), within.view(np.float64)])


@pytest.mark.parametrize("mode", ROUNDING_MODES)
def test_float64(mode: str) -> None:
    torch = gpu_support.torch()
    x = float64_values()
    random_bits = np.random.default_rng(12).integers(0, 2**32, x.size, np.uint32) if mode == "stochastic" else None
    found = cufuse.round_to_bf16(to_gpu(x), mode=mode, random_bits=to_gpu(random_bits))
    tensor = torch.from_numpy(x).to("cuda")
    bits = None if random_bits is None else torch.from_numpy(random_bits.astype(np.int64)).to("cuda")
    demand_same("casts of float64", found, by_definition(tensor, mode, neighbours(tensor), bits), mode)
    demand_same("casts of float64", found, cufuse.round_to_bf16(x, mode=mode, random_bits=random_bits), f"{mode}, emulation")


@pytest.mark.parametrize("mode", ROUNDING_MODES)
def test_the_emulation_agrees(mode: str) -> None:
    """Every code with the tie above it and the ties' neighbours, and any bits."""
    rng = np.random.default_rng(13)
    x = np.concatenate([inputs.special_float32(), rng.integers(0, 2**32, 1 << 22, np.uint32).view(np.float32)])
    random_bits = rng.integers(0, 2**16, x.size, np.uint16) if mode == "stochastic" else None
    demand_cases("casts, emulation", [against_numpy(mode, cufuse.round_to_bf16, x, mode=mode, random_bits=random_bits)])
    if random_bits is not None:
        torch = gpu_support.torch()
        tensor, bits = torch.from_numpy(x).to("cuda"), torch.from_numpy(random_bits.astype(np.int64)).to("cuda")
        expected = by_definition(tensor, mode, neighbours(tensor), bits)
        demand_same("casts of float32", cufuse.round_to_bf16(to_gpu(x), mode=mode, random_bits=to_gpu(random_bits)), expected, mode)


def test_shapes_and_outputs() -> None:
    """Odd lengths, strides, no element, nothing written beside the output."""
    rng = np.random.default_rng(14)
    cases, guards = [], []
    for shape in ((1,), (3,), (257,), (1, 1, 7), (1000, 3), (0, 4), ()):
        x = np.asarray(rng.standard_normal(shape), np.float32)
        cases.append(against_numpy(f"shape {shape}", cufuse.round_to_bf16, x))
    x = rng.standard_normal((64, 48)).astype(np.float64)
    for view in (lambda a: a.T, lambda a: a[::3, ::-2], lambda a: a[:, 5:6]):
        host, given = view(x), view(to_gpu(x))
        for gap, misplaced in ((0, 0), (5, 3)):
            guards.append(Guarded(host.shape, bfloat16, gap=gap, misplaced=misplaced))
            call = partial(cufuse.round_to_bf16, given, out=guards[-1].out)
            cases.append(Case(f"strides {host.strides}, gap {gap}", call, partial(cufuse.round_to_bf16, host)))
    demand_cases("casts, emulation", cases)
    for guard in guards:
        guard.demand_intact("cast")
    with pytest.raises(TypeError, match="two libraries"):
        cufuse.round_to_bf16(to_gpu(x), out=np.empty(x.shape, bfloat16))
    with pytest.raises(ValueError, match="out has shape"):
        cufuse.round_to_bf16(to_gpu(x), out=gpu_support.cupy().empty((48, 64), bfloat16))
