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
"""Of a block: what a warpgroup makes at a time."""

_STAGE_PIECES: Final = {"Q4_0": 2, "Q8_0": 1, "Q4_K": 1, "Q6_K": 1}
_BARRIER_BYTES: Final = 4096
_MAX_DEPTH: Final = 16
_MAX_X_DEPTH: Final = 16
_X_BUDGET: Final = 96 * 1024
"""Shared memory that x may take; the rings of the weight want the rest."""
_ROOM: Final = 12 * 1024
"""Shared memory of a multiprocessor that is left to the small kernels of a chain."""
_ARGUMENTS: Final = struct.Struct("12iPP")


@dataclass(frozen=True)
class Warpgroups:
    """A configuration: rows of x a CTA, warpgroups that share a block's slices of K, blocks a CTA, CTAs of a cluster."""

    form: str
    tokens: int
    shares: int
    blocks: int
    cluster: int = 1

    @property
    def warps(self) -> int:
        """That multiply."""
        return 4 * self.shares * self.blocks

    @property
    def kernel(self) -> Kernel:
        """Its entry in the table of kernels. Shared memory is given by the plan: as much as the device has."""
        defines = {
            "FORMAT": list(FORMATS).index(self.form), "TOKENS": self.tokens, "PARTS": 1, "SHARES": self.shares,
            "BLOCKS": self.blocks, "CLUSTER": self.cluster, "STAGE_PIECES": _STAGE_PIECES[self.form],
        }  # fmt: skip
        source = "quantised_wgmma_sm90"
        name = f"{source} {self.form} {self.tokens} tokens {self.shares} shares {self.blocks} blocks by {self.cluster}"
        threads = 32 * (self.warps + 4)
        return Kernel(name, f"{source}.cu", source, tuple(defines.items()), threads, capability=CAPABILITY, last=CAPABILITY)

    def grid(self, product: "Product") -> tuple[int, int]:
        """CTAs along columns, in whole clusters, and along rows of x."""
        across = ceil_div(product.n, COLUMNS * self.blocks * self.cluster) * self.cluster
        return across, ceil_div(product.m, self.tokens)


_SHAPES: Final = ((32, 4, 1, 1), (32, 2, 2, 1), (64, 4, 1, 1), (64, 4, 1, 2), (64, 2, 2, 1), (64, 2, 2, 2))
WGMMA: Final = tuple(Warpgroups(form, *shape) for form in ("Q4_0", "Q8_0", "Q4_K") for shape in _SHAPES)
"""What ``choose`` picks from."""


def candidates(product: "Product", machine: "Machine") -> list[Warpgroups]:
    """Configurations for a product, the best first."""
    if machine.capability != CAPABILITY or product.parts > 1:
        return []

    def cost(c: Warpgroups) -> tuple[int, int, int]:
        across, down = c.grid(product)
        turns = ceil_div(across * down, machine.multiprocessors)
        # instructions of a warp for 64 k: decoding and all that is done once, then scaling, by the number of tokens
        return turns * c.blocks * (70 + c.tokens), turns, c.cluster

    return sorted((c for c in WGMMA if c.form == product.form.name), key=cost)


def plan_wgmma(product: "Product", configuration: Warpgroups, machine: "Machine") -> Launch | None:
    """The launch, or None where it is for other products or its shared memory does not do."""
    c, p = configuration, product
    if machine.capability != CAPABILITY or p.parts > 1:
        return None
    piece_chunks = tiles.piece_columns(p.form) // 64
    chunks = p.slice_pieces * piece_chunks * ceil_div(p.slices, c.shares)
    x_stage = c.shares * c.tokens * 128
    stages = ceil_div(p.slice_pieces, _STAGE_PIECES[c.form]) * ceil_div(p.slices, c.shares)
    stage = c.warps * _STAGE_PIECES[c.form] * tiles.piece_bytes(p.form)
    sums = c.warps * 16 * 4 * c.tokens
    room = _ROOM if c.tokens < 64 else 0  # there are no registers left then
    left = machine.shared_memory - room - _BARRIER_BYTES - sums - 1024
    for x_depth in range(min(_X_BUDGET // x_stage, _MAX_X_DEPTH, chunks), 0, -1):
        depth = min((left - x_depth * x_stage) // stage, _MAX_DEPTH, stages)
        # room for weights is known by x's: the ring of x must not be the longer one
        if depth >= min(2, stages) and _least_pieces(p, c, depth) * piece_chunks >= x_depth:
            break
    else:
        return None
    x_at = ceil_div(_BARRIER_BYTES + depth * stage, 1024) * 1024
    sums_at = x_at + x_depth * x_stage
    programmatic = p.programmatic and p.direct
    numbers = (
        p.m, p.n, p.pieces, p.slice_pieces, p.slices, depth, x_depth, _BARRIER_BYTES, x_at, sums_at, p.out_float32, p.pairs,
    )  # fmt: skip
    shape, strides = (64, p.m, p.padded // 64), (p.row_stride * 2, 128)

    def arguments(x: int, weight: int, out: int) -> bytes:
        x_map = _driver.tensor_map(x, shape, strides, (64, c.tokens // c.cluster, 1))
        return _ARGUMENTS.pack(*numbers, weight, out) + x_map

    return Launch(c.kernel, (*c.grid(p), 1), arguments, None, sums_at + sums, c.cluster, programmatic=programmatic)


def _least_pieces(p: "Product", c: Warpgroups, depth: int) -> int:
    """Of ``depth`` stages of a share one after the other, where it has more; a stage has pieces of one slice."""
    least = p.pieces
    for share in range(c.shares):
        sizes = []
        for first in range(share * p.slice_pieces, p.pieces, c.shares * p.slice_pieces):
            end = min(first + p.slice_pieces, p.pieces)
            sizes += [min(_STAGE_PIECES[c.form], end - piece) for piece in range(first, end, _STAGE_PIECES[c.form])]
        if len(sizes) > depth:
            least = min(least, *(sum(sizes[first : first + depth]) for first in range(len(sizes) - depth + 1)))
    return least
