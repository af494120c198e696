"""Products with quantised weights: what they are asked to do, and how work is dealt out to the multiprocessors."""

import struct
from dataclasses import dataclass
from typing import Final

from cufuse import _driver
from cufuse._linear_problem import Launch, ceil_div
from cufuse._linear_quantised_wgmma import WGMMA, Warpgroups, candidates, plan_wgmma
from cufuse.compiler import Kernel
from cufuse.quantised import tiles
from cufuse.quantised.formats import FORMATS, Format

MOST_SLICES: Final = 8
"""Slices of K: warps that work on a tile together."""

_NUMBERS: Final = {"Q4_0": 0, "Q8_0": 1, "Q4_K": 2, "Q6_K": 3}
_STAGE_PIECES: Final = {"Q4_0": 2, "Q8_0": 1, "Q4_K": 1, "Q6_K": 1}
_IN_FLIGHT: Final = 84 * 1024
"""Bytes of the weight that a multiprocessor asks for ahead."""
_FIRST_WITH_COPIES: Final = 90
_LAST_WITH_MULTICAST: Final = 119
_PART_BYTES: Final = 16 * 32
"""Eight tokens' accumulators of one warp."""
_BARRIER_BYTES: Final = 2048
_MAX_DEPTH: Final = 9
_MAX_X_DEPTH: Final = 6
_ROOM: Final = 12 * 1024
"""Shared memory of a multiprocessor that is left to the small kernels of a chain."""
_X_BUDGET: Final = 98304
"""Shared memory that x may take; the rings of the weight want the rest."""

_STREAMED: Final = struct.Struct("15i4xPPPq32x")
_ANYWHERE: Final = struct.Struct("PPPq6i")


@dataclass(frozen=True)
class Product:
    """out[m, n] = sum over k of x[m, k] w[n, k]: sizes, and how x and out lie in memory.

    parts : bfloat16 parts of an activation. x_stride : in elements. direct : x is read where it lies (bfloat16, whole pieces,
    multiples of 16 bytes); otherwise it is padded or split first. pairs : two neighbouring outputs may be stored at once.
    """

    form: Format
    m: int
    n: int
    k: int
    k_slices: int
    parts: int
    x_stride: int
    direct: bool
    out_float32: bool
    pairs: bool
    programmatic: bool = False

    @property
    def padded(self) -> int:
        """K in whole pieces."""
        return tiles.padded_columns(self.k, self.form)

    @property
    def pieces(self) -> int:
        return self.padded // tiles.piece_columns(self.form)

    @property
    def slice_pieces(self) -> int:
        return ceil_div(self.pieces, self.k_slices)

    @property
    def slices(self) -> int:
        """Slices that are not empty."""
        return ceil_div(self.pieces, self.slice_pieces)

    @property
    def row_stride(self) -> int:
        """Distance of two rows of x as the product reads it, in elements."""
        return self.x_stride if self.direct else self.padded * self.parts

    @property
    def workspace_bytes(self) -> int:
        """Of padded or split activations."""
        return 0 if self.direct else ceil_div(self.m * self.padded * self.parts * 2, 256) * 256


@dataclass(frozen=True)
class Anywhere:
    """kernels/quantised_linear.cu: a CTA makes 16 columns for ``tokens`` rows of x."""

    form: str
    tokens: int
    parts: int

    @property
    def kernel(self) -> Kernel:
        """Its entry in the table of kernels."""
        threads = 32 * MOST_SLICES
        defines = {"FORMAT": _NUMBERS[self.form], "TOKENS": self.tokens, "PARTS": self.parts, "MAX_THREADS": threads}
        name = f"quantised_linear {self.form} {self.tokens} tokens{' float32' if self.parts == 3 else ''}"
        smem = MOST_SLICES * self.tokens // 8 * _PART_BYTES
        return Kernel(name, "quantised_linear.cu", "quantised_linear", tuple(defines.items()), threads, smem)


@dataclass(frozen=True)
class Streamed:
    """kernels/quantised_linear_sm90.cu: rows of x a CTA, whether x is resident, CTAs of a cluster."""

    form: str
    tokens: int
    parts: int
    resident: bool
    cluster: int = 1

    @property
    def warps(self) -> int:
        """Most warps that multiply: registers decide, which a multiprocessor's four parts give out each for itself."""
        if self.tokens == 8:
            return 24 if self.parts == 1 else 16
        if self.tokens == 16:
            return 24 if FORMATS[self.form].values == 32 else 16
        return 16 if self.form == "Q4_0" and self.parts == 1 else 8

    @property
    def kernel(self) -> Kernel:
        """Its entry in the table of kernels. Shared memory is given by the plan: as much as the device has."""
        threads = 32 * (self.warps + (0 if self.resident else 1))
        defines = {
            "FORMAT": _NUMBERS[self.form], "TOKENS": self.tokens, "PARTS": self.parts, "RESIDENT": int(self.resident),
            "CLUSTER": self.cluster, "STAGE_PIECES": _STAGE_PIECES[self.form], "MAX_THREADS": threads,
        }  # fmt: skip
        where = "resident" if self.resident else f"streamed by {self.cluster}"
        name = f"quantised_linear_sm90 {self.form} {self.tokens} tokens {where}{' float32' if self.parts == 3 else ''}"
        last = 999 if self.cluster == 1 else _LAST_WITH_MULTICAST
        source, capability = "quantised_linear_sm90", _FIRST_WITH_COPIES
        return Kernel(name, f"{source}.cu", source, tuple(defines.items()), threads, capability=capability, last=last)

    @property
    def stage_bytes(self) -> int:
        """Of a warp's ring."""
        return _STAGE_PIECES[self.form] * tiles.piece_bytes(FORMATS[self.form])


_MANY_TOKENS: Final = {1: 64, 3: 32}
"""By parts: what registers allow."""

ANYWHERE: Final = tuple(
    Anywhere(form, tokens, parts) for form in FORMATS for parts, many in _MANY_TOKENS.items() for tokens in (8, many)
)
STREAMED: Final = tuple(
    [Streamed(form, 8, parts, True) for form in FORMATS for parts in (1, 3)]
    + [Streamed(form, 16, 1, False) for form in FORMATS]
    + [Streamed(form, 32, 1, False, cluster) for form in FORMATS for cluster in (1, 2)]
    + [Streamed(form, 32, 3, False, 2) for form in ("Q4_0", "Q8_0")]
)
"""What ``choose`` picks from, beside ``ANYWHERE`` and ``_linear_quantised_wgmma.WGMMA``."""


Configuration = Anywhere | Streamed | Warpgroups


@dataclass(frozen=True)
class Machine:
    """A device's limits."""

    capability: int
    multiprocessors: int
    shared_memory: int


def choose(product: Product, machine: Machine) -> Configuration:
    """The kernel for a product."""
    form = product.form.name
    if machine.capability >= _FIRST_WITH_COPIES:
        for candidate in _candidates(product, machine):
            if candidate in (*STREAMED, *WGMMA) and plan(product, candidate, machine) is not None:
                return candidate
    return Anywhere(form, 8 if product.m <= 8 else _MANY_TOKENS[product.parts], product.parts)


def _candidates(product: Product, machine: Machine) -> list[Streamed | Warpgroups]:
    form, parts = product.form.name, product.parts
    if product.m <= 8:
        return [Streamed(form, 8, parts, True)]
    cluster = 2 if machine.capability <= _LAST_WITH_MULTICAST else 1
    # measured on an H200: up to 16 rows are faster so than by warpgroups
    few = [Streamed(form, 16, parts, False)] if product.m <= 16 else []
    return [
        *few,
        *candidates(product, machine),
        Streamed(form, 32, parts, False, cluster),
        Streamed(form, 32, parts, False),
    ]


def plan(product: Product, configuration: Configuration, machine: Machine) -> Launch | None:
    """The launch of a configuration, or None where it cannot do it. Its arguments are x as the product reads it, weight, out."""
    if isinstance(configuration, Warpgroups):
        return plan_wgmma(product, configuration, machine)
    if isinstance(configuration, Streamed):
        return plan_streamed(product, configuration, machine)
    return plan_anywhere(product, configuration)


def plan_anywhere(product: Product, configuration: Anywhere) -> Launch | None:
    """The launch of quantised_linear."""
    p, tokens = product, configuration.tokens
    if p.slices > MOST_SLICES:
        return None
    tail = (p.row_stride, p.m, p.n, p.pieces, p.slice_pieces, p.out_float32, p.pairs)

    def arguments(x: int, weight: int, out: int) -> bytes:
        return _ANYWHERE.pack(x, weight, out, *tail)

    grid = (ceil_div(p.n, tiles.ROWS), ceil_div(p.m, tokens), 1)
    smem = p.slices * tokens // 8 * _PART_BYTES
    return Launch(configuration.kernel, grid, arguments, 32 * p.slices, smem)


@dataclass(frozen=True)
class Deal:
    """Shared memory and work of a launch of quantised_linear_sm90."""

    grid: int
    groups: int
    rounds: int
    depth: int
    x_depth: int
    x_at: int
    sums_at: int
    size: int


def plan_streamed(product: Product, configuration: Streamed, machine: Machine) -> Launch | None:
    """The launch of quantised_linear_sm90, or None where its shared memory does not do."""
    c, p = configuration, product
    deal = deal_out(p, c, machine)
    if deal is None or machine.capability < _FIRST_WITH_COPIES or (c.resident and p.m > c.tokens):
        return None
    numbers = (
        p.m, p.n, p.pieces, p.slice_pieces, p.slices, deal.groups, deal.rounds, deal.depth, deal.x_depth, _BARRIER_BYTES, deal.x_at,
        deal.sums_at, p.out_float32, p.pairs, p.programmatic and p.direct,
    )  # fmt: skip
    shape, strides = (64, p.m, p.padded * p.parts // 64), (p.row_stride * 2, 128)

    def arguments(x: int, weight: int, out: int) -> bytes:
        x_map = bytes(128) if c.resident else _driver.tensor_map(x, shape, strides, (64, c.tokens, 1))
        return _STREAMED.pack(*numbers, x, weight, out, p.row_stride) + x_map

    threads = 32 * (deal.groups * p.slices + (0 if c.resident else 1))
    grid = (deal.grid, ceil_div(p.m, c.tokens), 1)
    return Launch(c.kernel, grid, arguments, threads, deal.size, c.cluster, programmatic=p.programmatic and p.direct)


def deal_out(p: Product, c: Streamed, machine: Machine) -> Deal | None:
    """Tiles to CTAs and groups: a CTA for each multiprocessor at most, as many groups as there are registers and tiles for."""
    if p.slices > MOST_SLICES:
        return None
    high = ceil_div(p.n, tiles.ROWS)
    most = max(machine.multiprocessors // ceil_div(p.m, c.tokens) // c.cluster, 1) * c.cluster
    grid = min(ceil_div(high, c.cluster) * c.cluster, most)
    each = ceil_div(high, grid)
    for groups in range(min(c.warps // p.slices, each), 0, -1):
        rounds = ceil_div(each, groups)
        found = _lay_out(p, c, machine, grid, ceil_div(each, rounds), rounds)
        if found is not None:
            return found
    return None


def _lay_out(p: Product, c: Streamed, machine: Machine, grid: int, groups: int, rounds: int) -> Deal | None:
    """Barriers, rings (from a multiple of 1024 bytes on), x, then sums of slices."""
    warps = groups * p.slices
    stages = ceil_div(p.slice_pieces, _STAGE_PIECES[c.form]) * rounds
    chunks = p.slice_pieces * (tiles.piece_columns(p.form) // 64) * rounds
    if c.resident:
        x_depth = 1
        x_bytes = (p.m if c.tokens == 8 else c.tokens) * (p.padded * p.parts * 2 + 16)
    else:
        stage = p.slices * p.parts * c.tokens * 128
        x_depth = min(max(_X_BUDGET // stage, 2), _MAX_X_DEPTH, chunks)
        x_bytes = x_depth * stage
    sums = warps * c.tokens // 8 * _PART_BYTES if p.slices > 1 else 0
    left = machine.shared_memory - _ROOM - _BARRIER_BYTES - x_bytes - sums - 2048
    depth = min(left // (warps * c.stage_bytes), _MAX_DEPTH, stages, max(2, _IN_FLIGHT // (warps * c.stage_bytes)))
    if depth < min(2, stages):
        return None
    x_at = ceil_div(_BARRIER_BYTES + warps * depth * c.stage_bytes, 1024) * 1024
    sums_at = ceil_div(x_at + x_bytes, 1024) * 1024
    return Deal(grid, groups, rounds, depth, x_depth, x_at, sums_at, sums_at + sums)
