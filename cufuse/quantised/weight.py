"""A quantised weight: raw blocks, or the same in the order that the kernels read, with format and shape."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cufuse import _arrays
from cufuse.bf16 import bfloat16, nearest
from cufuse.norm import rounding_remedy
from cufuse.quantised import encode, formats, tiles
from cufuse.quantised.formats import Format

Layout = Literal["blocks", "tiles"]


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight [N, K] in a block format, as a NumPy or CuPy array of bytes.

    data : uint8; layout "blocks": [N, bytes of a row], as GGUF stores them; layout "tiles": [ceil(N / 16), pieces, bytes of a
        piece], as the kernels read them (``cufuse.quantised.tiles``).
    format : a ``Format``, or its name.
    shape : (N, K).

    Raises TypeError for kinds and dtypes; ValueError for an unknown format, K that is no multiple of the block, and data that does
    not have the bytes of this shape.
    """

    data: Any
    format: Format
    shape: tuple[int, int]
    layout: Layout = "blocks"

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", formats.get(self.format))
        _arrays.backend({}, data=self.data)
        if self.data.dtype != np.uint8:
            raise TypeError(f"data has dtype {self.data.dtype}; needed is uint8: the blocks as they are stored")
        shape = tuple(self.shape)
        if len(shape) != 2 or any(isinstance(one, bool) or not isinstance(one, (int, np.integer)) or one < 1 for one in shape):
            raise ValueError(f"shape is {self.shape!r}; needed are two integers >= 1, (N, K)")
        object.__setattr__(self, "shape", (int(shape[0]), int(shape[1])))
        rows, columns = self.shape
        row_bytes = self.format.bytes_of(columns)
        if self.layout == "blocks":
            wanted: tuple[int, ...] = (rows, row_bytes)
        elif self.layout == "tiles":
            pieces = tiles.padded_columns(columns, self.format) // tiles.piece_columns(self.format)
            wanted = (-(-rows // tiles.ROWS), pieces, tiles.piece_bytes(self.format))
        else:
            raise ValueError(f"layout is {self.layout!r}; needed is 'blocks' or 'tiles'")
        if self.data.shape != wanted:
            raise ValueError(
                f"data has shape {self.data.shape}; {self.format.name} of shape {self.shape} as {self.layout} needs {wanted}"
            )

    @property
    def ndim(self) -> int:
        return 2

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.data.nbytes)

    def packed(self) -> "QuantisedWeight":
        """This weight as "tiles" (itself where it is): once, at load. The kernels then need no other copy.

        ValueError where a CuPy array would have to be packed in a stream capture, as for ``unpacked``.
        """
        if self.layout == "tiles":
            return self
        self._refuse_in_capture("packed")
        return QuantisedWeight(tiles.pack(self.data, self.format), self.format, self.shape, "tiles")

    def unpacked(self) -> "QuantisedWeight":
        """This weight as "blocks": the inverse of ``packed``, bit for bit.

        ValueError where a CuPy array would have to be unpacked in a stream capture: the graph would hold the address of memory
        that goes back to CuPy's pool.
        """
        if self.layout == "blocks":
            return self
        self._refuse_in_capture("unpacked")
        return QuantisedWeight(tiles.unpack(self.data, self.format, *self.shape), self.format, self.shape)

    def _refuse_in_capture(self, wanted: str) -> None:
        cupy = sys.modules.get("cupy")
        if cupy is not None and not isinstance(self.data, np.ndarray) and cupy.cuda.get_current_stream().is_capturing():
            raise ValueError(
                f'the weight has layout "{self.layout}", and a stream is being captured: call weight.{wanted}() before the '
                "capture, so that the graph does not hold memory that others are given"
            )

    def on_gpu(self) -> "QuantisedWeight":
        """A copy on CuPy's current device, packed; NoGpuError without one."""
        if not isinstance(self.data, np.ndarray):
            return self.packed()
        from cufuse import launch

        launch.current_device()
        cupy = sys.modules["cupy"]
        packed = self.packed()
        return QuantisedWeight(cupy.asarray(packed.data), self.format, self.shape, packed.layout)

    def on_cpu(self) -> "QuantisedWeight":
        """A NumPy copy, unpacked; itself where it is that."""
        data = self.data if isinstance(self.data, np.ndarray) else self.data.get()
        return QuantisedWeight(data, self.format, self.shape, self.layout).unpacked()

    def rows(self, first: int, end: int) -> "QuantisedWeight":
        """Rows ``first`` to ``end``, as raw blocks."""
        data = self.unpacked().data[first:end]
        return QuantisedWeight(data, self.format, (len(data), self.shape[1]))

    def content(self) -> formats.Content:
        """Integers int8 [N, K], scales float32 [N, K / group], offsets alike or None; NumPy arrays only."""
        return formats.split(self.unpacked().data, self.format)


def quantise(weight: np.ndarray, format: str | Format) -> QuantisedWeight:
    """Quantise a weight [N, K] of float32 or bfloat16 values, a NumPy array.

    "Q4_0" and "Q8_0" have the bits of the ``gguf`` package; "Q4_K" and "Q6_K" are cufuse's own, without llama.cpp's search
    (``cufuse.quantised.encode``). K must be a multiple of the block's weights (32, or 256). A NaN or an infinity spoils its block:
    what decodes from there is NaN or infinite.

    Raises TypeError for kinds and dtypes, ValueError for shapes and formats.
    """
    form = formats.get(format)
    if not isinstance(weight, np.ndarray):
        raise TypeError(f"weight is a {type(weight).__name__}; needed is a NumPy array: weights are quantised on the CPU")
    if weight.dtype not in (np.float32, bfloat16):
        raise TypeError(f"weight has dtype {weight.dtype}; needed is float32 or bfloat16: {rounding_remedy(weight)}")
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"weight has shape {weight.shape}; needed is [N, K] with N and K >= 1")
    return QuantisedWeight(encode.encode(weight.astype(np.float32), form), form, weight.shape)


def dequantise(weight: QuantisedWeight, *, dtype: Any = np.float32, out: Any = None) -> Any:
    """The values [N, K] of a quantised weight.

    Formula: ``scale * integer``, or ``scale * integer - offset``, each operation rounded to float32
    (``cufuse.quantised.formats``); with dtype bfloat16 the result is rounded once more, to nearest even.

    Parameters
    ----------
    weight : a QuantisedWeight; NumPy data gives a NumPy array, CuPy data a CuPy array on its device.
    dtype : float32 or bfloat16.
    out : [N, K] array of that dtype to write to. It may not overlap the weight.

    Special values: a scale that is NaN or infinite makes its group NaN (infinity times a zero integer too) or infinite. float32
    has the bits of ``gguf.quants.dequantize`` on x86: NaN keep sign and payload of the scale, those that an operation makes are
    0xFFC00000. bfloat16: 0x7FFF.

    Raises TypeError for kinds and dtypes, ValueError for an ``out`` that does not fit.
    """
    require("weight", weight)
    if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(bfloat16)):
        raise TypeError(f"dtype is {np.dtype(dtype)}; needed is float32 or bfloat16")
    backend = _arrays.backend({"out": out}, weight=weight.data)
    result = _arrays.output(out, weight.shape, np.dtype(dtype), backend, weight.data)
    if backend == "cupy":
        from cufuse import _gpu_quantised

        return _gpu_quantised.dequantise(weight, result)
    _arrays.refuse_overlap(out, weight=weight.data)
    values = formats.decode(weight.unpacked().data, weight.format)
    result[...] = values if result.dtype == np.float32 else nearest(values)
    return result


def concatenate(weights: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """One packed projection of several, rows below rows. ValueError for several formats or widths: those stay a tuple."""
    if not weights:
        raise ValueError("weights is empty; needed is at least one QuantisedWeight")
    for index, weight in enumerate(weights):
        require(f"weights[{index}]", weight)
    found = {(weight.format.name, weight.shape[1]) for weight in weights}
    if len(found) > 1:
        listed = ", ".join(f"weights[{index}] is {w.format.name} {w.shape}" for index, w in enumerate(weights))
        raise ValueError(f"{listed}; a packed projection has one format and width: give the projections as a tuple of three")
    data = np.concatenate([weight.unpacked().data for weight in weights])
    return QuantisedWeight(data, weights[0].format, (len(data), weights[0].shape[1]))


def require(name: str, weight: Any) -> None:
    """TypeError unless it is a QuantisedWeight."""
    if not isinstance(weight, QuantisedWeight):
        raise TypeError(f"{name} is a {type(weight).__name__}; needed is a QuantisedWeight: cufuse.quantised.quantise makes one")
