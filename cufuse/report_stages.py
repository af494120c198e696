"""How far one stage of a block is from a reference and from the truth."""

from dataclasses import dataclass

import numpy as np

from cufuse import oracle
from cufuse.bf16 import nearest, to_bits, ulp_distance


@dataclass(frozen=True)
class Stage:
    """One stage of one recipe.

    ``mismatches``, ``max_abs_diff`` and ``max_ulp_diff`` compare with the reference recipe, on bfloat16: a stage that a recipe
    leaves in float32 is rounded for this, as its next reader would do. ``max_abs_error`` and ``rms_error`` are the distance of
    the stage as it is (unrounded where float32) from the float64 oracle; ``max_ulp_error`` that of its bfloat16 from the
    oracle's, rounded once.
    """

    outputs: int
    mismatches: int
    max_abs_diff: float
    max_ulp_diff: int
    max_abs_error: float
    rms_error: float
    max_ulp_error: int

    @property
    def share(self) -> float:
        """The mismatches' share of the outputs."""
        return self.mismatches / self.outputs if self.outputs else 0.0


def compare(value: np.ndarray, expected: np.ndarray, truth: np.ndarray) -> Stage:
    """A stage's value against the reference recipe's and the float64 oracle's."""
    a, b = as_bfloat16(value), as_bfloat16(expected)
    wide = value.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
        error = np.abs(wide - truth.reshape(wide.shape))
    return Stage(
        outputs=a.size,
        mismatches=int(np.count_nonzero(to_bits(a) != to_bits(b))),
        max_abs_diff=float(difference.max(initial=0.0)),
        max_ulp_diff=int(ulp_distance(a, b).max(initial=0)),
        max_abs_error=float(error.max(initial=0.0)),
        rms_error=float(np.sqrt(np.mean(error * error))) if error.size else 0.0,
        max_ulp_error=int(ulp_distance(a, oracle.rounded(truth).reshape(a.shape)).max(initial=0)),
    )


def as_bfloat16(value: np.ndarray) -> np.ndarray:
    """A stage as its next reader in bfloat16 sees it."""
    return nearest(value) if value.dtype == np.float32 else value
