"""Rules for deviations that several libraries share, so that each of them is held to the same set of inputs."""

import numpy as np

from tests.witnesses import bits, from_codes


def near_ties() -> np.ndarray:
    """float64: the middle above every finite bfloat16 magnitude, and 2**-9 to 2**-45 of a step to both sides of it; both signs."""
    heads = np.arange(0x7F80)
    value = from_codes(heads).astype(np.float64)
    step = np.ldexp(1.0, np.maximum((heads >> 7) - 127, -126) - 7)
    distances = np.array([0.0, *(sign * 2.0**-power for power in (9, 16, 17, 18, 24, 30, 40, 45) for sign in (1, -1))])
    x = (value[:, None] + step[:, None] * (0.5 + distances)).reshape(-1)
    return np.concatenate([x, -x])


def rounded_twice(x: np.ndarray) -> np.ndarray:
    """Where float64 -> float32 -> bfloat16 goes wrong: float32 has made a tie of what was none, and that goes to the other side."""
    with np.errstate(over="ignore"):
        float32 = x.astype(np.float32)
    codes = bits(float32)
    tie = ((codes & 0xFFFF) == 0x8000) & (float32.astype(np.float64) != x)
    outward = np.abs(x) > np.abs(float32.astype(np.float64))
    goes_outward = (codes >> 16) & 1 == 1  # to the even one
    return np.asarray(tie & (outward != goes_outward))


def demand_exactly(deviating: np.ndarray, expected: np.ndarray, what: str) -> None:
    """The deviation is where it is known to be, nowhere else, and has not vanished."""
    assert expected.any(), f"{what}: no such input was tried"
    elsewhere, gone = np.flatnonzero(deviating & ~expected), np.flatnonzero(expected & ~deviating)
    assert not len(elsewhere), f"{what}: appears at {len(elsewhere)} other inputs, first number {elsewhere[0]}"
    assert not len(gone), f"{what}: has vanished at {len(gone)} of {expected.sum()} inputs, first number {gone[0]}"
