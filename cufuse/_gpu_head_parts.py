"""What follows a projection of a few rows in its own launch: kernels/head_parts.cuh."""

import math
import struct
from typing import Any, Final

from cufuse import _layout
from cufuse._gpu_heads import Block, Ends, Unsuited
from cufuse._linear_problem import ceil_div
from cufuse._norm_kernels import mean_operand, order_defines, point_defines
from cufuse.compiler import Kernel
from cufuse.recipe import Norm

KERNELS: Final[tuple[Kernel, ...]] = ()
"""None of its own."""

_HEAD: Final = 128
_LEAST_CLUSTER: Final = 2
_LEAST_EPS: Final = 2.0**-80
"""Below it a sum of squares of tiny elements may show whether they were rounded (head_fragment.cuh)."""
_SUMS: Final = {"SUM_THREADS": 32, "SUM_VECTOR": 4, "SUM_EDGES": 0, "SUM_TREE": 0}
_ONE_VECTOR: Final = (0, 2)  # CHAIN_ONE, CHAIN_BY_POSITION of sums.cuh
_MOST_STRIDE: Final = 2**31 - 1
_ARGUMENTS: Final = struct.Struct("PiiPiiPii5P5i2fi8x")


class HeadParts:
    """The heads of a few rows' projection, finished by clusters. Raises Unsuited where the kernel's part cannot do it."""

    __slots__ = ("_numbers", "_strides", "_tokens", "columns", "defines", "words")

    def __init__(self, block: Block, ends: Ends, row_norm: Norm, eps: float, alignment: int) -> None:
        """block: q, k and v as targets, weights, tables and slots, or their layouts; its source is not looked at. row_norm: of the
        rows, whose rounding points the kernel has. alignment: the bits below 16 of all the block's pointers, or-ed."""
        *leading, heads, _ = block.target[0].shape
        kv_heads, tokens = block.target[1].shape[-2], math.prod(leading)
        _require(block, ends, row_norm, tokens, eps, alignment)
        self._tokens, self.columns = tokens, (heads + 2 * kv_heads) * _HEAD
        self._strides = _strides(block)
        norm, rotates = ends.norm, ends.rope is not None
        operands = [float(mean_operand(norm, tokens * count, _HEAD)) if norm else 0.0 for count in (heads, kv_heads)]
        capacity = block.target[1].shape[0] if block.slots is not None else 0
        self._numbers = (*self._strides[6:], capacity, heads, kv_heads, *operands)
        self.defines = {"HEAD_NORM": int(norm is not None), "ROTATE": int(rotates)}
        self.words = "heads of " + ", ".join(["normed"] * (norm is not None) + ["rotated"] * rotates or ["plain"])

    def smem(self, cluster: int, tile_n: int) -> int:
        """Bytes of shared memory."""
        own = ceil_div(self._tokens, cluster)
        return 2 * _HEAD * (3 + 2 * own + own * (cluster * tile_n // _HEAD))

    def pack(self, pointers: tuple[int, ...], at: int) -> bytes:
        """The kernel's HeadArguments. pointers: q, k, v, cos, sin, q_weight, k_weight, slots; 0 where there is none."""
        places = [one for index in range(3) for one in (pointers[index], *self._strides[2 * index : 2 * index + 2])]
        return _ARGUMENTS.pack(*places, *pointers[3:], *self._numbers, at)


def cluster_size(tile_n: int) -> int:
    """The fewest CTAs, each with ``tile_n`` columns, a multiple of 16, that have whole heads between them."""
    return max(_LEAST_CLUSTER, _HEAD // math.gcd(_HEAD, tile_n))


def _require(block: Block, ends: Ends, row_norm: Norm, tokens: int, eps: float, alignment: int) -> None:
    q, k, _ = block.target
    norm, rope = ends.norm, ends.rope
    small = [one for one in (*block.target, block.q_weight, block.k_weight, block.cos, block.sin) if one is not None]
    reasons = {
        "heads of another size than 128": q.shape[-1] != _HEAD,
        "v at its place": not block.move_v,
        "float32 somewhere": ends.out_float32 or any(one.itemsize != 2 for one in small),
        "alignment of q, k, v, tables or weights": alignment % 16 != 0,
        "a rotation without PyTorch's rounding points": rope is not None
        and not (rope.tables == "bfloat16" and rope.round_products and rope.round_sum and not rope.contract),
    }
    for reason, holds in reasons.items():
        if holds:
            raise Unsuited(reason)
    if norm is None:
        return
    if point_defines(norm) != point_defines(row_norm) or not norm.round_weighted or eps < _LEAST_EPS:
        raise Unsuited(f"a head norm that is not rounded as the rows' is, or eps below {_LEAST_EPS}")
    for heads in (q.shape[-2], k.shape[-2]):
        sums = order_defines(norm.sum_order, tokens * heads, _HEAD)
        if sums | _SUMS != sums or sums["SUM_CHAINS"] not in _ONE_VECTOR:
            raise Unsuited(f"order {norm.sum_order!r} does not give 32 threads four elements each")


def _strides(block: Block) -> tuple[int, ...]:
    """Elements from head to head and from token to token of q, k and v, then from token to token of cos and sin."""
    target: tuple[Any, ...] = block.target
    walked: dict[str, Any] = dict(zip("qkv", target, strict=True)) | {"cos": block.cos, "sin": block.sin}
    if block.slots is not None:
        walked |= {"k": None, "v": None}
    try:
        rows = _layout.walk(target[0].shape[:-2], walked)
        heads = [_layout.element_stride("out", array, -2) for array in target]
        tokens = list(rows.inner_strides)
        if block.slots is not None:
            tokens[1:3] = [_layout.element_stride("out", array, 0) for array in target[1:]]
    except ValueError as error:
        raise Unsuited(str(error)) from error
    if rows.outer != 1:
        raise Unsuited("tokens at two levels of strides")
    found = [stride for both in zip(heads, tokens[:3], strict=True) for stride in both]
    if any(stride % 4 for stride in found) or any(stride % 8 for stride in tokens[3:]):
        raise Unsuited("strides that are no multiples of what a lane takes")
    if max(map(abs, (*found, *tokens[3:]))) > _MOST_STRIDE:
        raise Unsuited("strides beyond 31 bits")
    return (*found, *tokens[3:])
