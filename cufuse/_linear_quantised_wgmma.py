"""Products of 9 rows and more with quantised weights on Hopper's warpgroup products: kernels/quantised_wgmma_sm90.cu."""

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cufuse import _driver
from cufuse._linear_problem import Launch, ceil_div
from cufuse.compiler import Kernel
from cufuse.quantised import tiles
from cufuse.quantised.formats import FORMATS

if TYPE_CHECKING:
    from cufuse._linear_quantised import Machine, Product

CAPABILITY: Final = 90
"""The only one that has these products."""

COLUMNS: Final = 64
"""Of a CTA: what a warpgroup makes at a time."""
_FEW_TOKENS: Final = 32
_SMALL_BLOCK: Final = 32

_BARRIER_BYTES: Final = 2048
_MAX_DEPTH: Final = 16
_ALIGNMENT: Final = 1024
"""Of a stage: the swizzle's."""
_ROOM: Final = 12 * 1024
"""Shared memory of a multiprocessor that is left to the small kernels of a chain."""
_ARGUMENTS: Final = struct.Struct("10iPP8x")


@dataclass(frozen=True)
class Warpgroups:
    """A configuration: rows of x a CTA, warpgroups that share a block's slices of K."""

    form: str
    tokens: int
    shares: int

    @property
    def warps(self) -> int:
        """That multiply."""
        return 4 * self.shares

    @property
    def stage_pieces(self) -> int:
        """Pieces of a ring's stage: of small ones two, where shared memory has room for that."""
        return 2 if self.tokens == _FEW_TOKENS and FORMATS[self.form].values == _SMALL_BLOCK else 1

    @property
    def kernel(self) -> Kernel:
        """Its entry in the table of kernels. Shared memory is given by the plan: as much as the device has."""
        defines = {
            "FORMAT": list(FORMATS).index(self.form), "TOKENS": self.tokens, "PARTS": 1, "SHARES": self.shares,
            "STAGE_PIECES": self.stage_pieces,
        }  # fmt: skip
        source = "quantised_wgmma_sm90"
        name = f"{source} {self.form} {self.tokens} tokens {self.shares} shares"
        threads = 32 * (self.warps + 4)
        return Kernel(name, f"{source}.cu", source, tuple(defines.items()), threads, capability=CAPABILITY, last=CAPABILITY)

    def grid(self, product: "Product") -> tuple[int, int]:
        """CTAs along columns and along rows of x."""
        return ceil_div(product.n, COLUMNS), ceil_div(product.m, self.tokens)


WGMMA: Final = tuple(
    Warpgroups(form, tokens, shares) for form, shares in (("Q4_0", 4), ("Q8_0", 4), ("Q4_K", 2)) for tokens in (_FEW_TOKENS, 64)
)
"""What ``choose`` picks from."""


def candidates(product: "Product", machine: "Machine") -> list[Warpgroups]:
    """Configurations for a product, the best first."""
    if machine.capability != CAPABILITY or product.parts > 1:
        return []

    def cost(c: Warpgroups) -> int:
        across, down = c.grid(product)
        # instructions of a warp for 64 k: decoding and all that is done once, then scaling, by the number of tokens
        return ceil_div(across * down, machine.multiprocessors) * (70 + c.tokens)

    return sorted((c for c in WGMMA if c.form == product.form.name), key=cost)


def plan_wgmma(product: "Product", configuration: Warpgroups, machine: "Machine") -> Launch | None:
    """The launch, or None where it is for other products or its shared memory does not do."""
    c, p = configuration, product
    if machine.capability != CAPABILITY or p.parts > 1:
        return None
    pieces = c.stage_pieces
    chunks = pieces * tiles.piece_columns(p.form) // 64
    stage = chunks * c.tokens * 128 + 4 * pieces * tiles.piece_bytes(p.form)
    stage = ceil_div(stage, _ALIGNMENT) * _ALIGNMENT
    stages = ceil_div(p.slice_pieces, pieces) * ceil_div(p.slices, c.shares)
    sums = c.warps * 16 * 4 * c.tokens
    left = machine.shared_memory - _ROOM - _BARRIER_BYTES - sums
    depth = min(left // (c.shares * stage), _MAX_DEPTH, stages)
    if depth < min(2, stages):
        return None
    sums_at = _BARRIER_BYTES + c.shares * depth * stage
    programmatic = p.programmatic and p.direct
    numbers = (
        p.m, p.n, p.pieces, p.slice_pieces, p.slices, depth, _BARRIER_BYTES, sums_at, p.out_float32, p.pairs,
    )  # fmt: skip
    shape, strides = (64, p.m, p.padded // 64), (p.row_stride * 2, 128)

    def arguments(x: int, weight: int, out: int) -> bytes:
        x_map = _driver.tensor_map(x, shape, strides, (64, c.tokens, chunks))
        return _ARGUMENTS.pack(*numbers, weight, out) + x_map

    return Launch(c.kernel, (*c.grid(p), 1), arguments, None, sums_at + sums, programmatic=programmatic)

