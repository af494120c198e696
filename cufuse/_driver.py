"""The few calls of NVIDIA's driver that CuPy does not offer: launch attributes and tensor maps, through ctypes.

No package beyond the driver itself is needed, and one launch costs about a microsecond of Python.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

INVALID_CONTEXT: Final = 201
"""CUresult where a thread has not used the GPU before: the runtime has not made its context current there."""

_BFLOAT16: Final = 9  # CUtensorMapDataType
_SWIZZLES: Final = {64: 2, 128: 3}  # CUtensorMapSwizzle of lines of so many bytes
_PROMOTE_256B: Final = 3  # CUtensorMapL2promotion
_ATTRIBUTE_CLUSTER, _ATTRIBUTE_PROGRAMMATIC = 4, 6  # CUlaunchAttributeID
_CAPTURE_RELAXED: Final = 2  # CUstreamCaptureMode
_MAP_BYTES: Final = 128


class DriverError(RuntimeError):
    """A call of the CUDA driver failed; the message has the call and the driver's own words."""


class _AttributeValue(ctypes.Union):
    _fields_ = [("cluster", ctypes.c_uint * 3), ("flag", ctypes.c_int), ("pad", ctypes.c_char * 64)]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _AttributeValue)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The driver's library; DriverError where there is none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise DriverError(f"NVIDIA's driver library {name} cannot be loaded ({error}); is there an NVIDIA GPU?") from error


def check(status: int, call: str) -> None:
    """DriverError unless status is 0."""
    if status != 0:
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        words = text.value.decode() if text.value else "unknown error"
        raise DriverError(f"{call} failed with error {status}: {words}")


def launch_config(
    grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: int, cluster: int, programmatic: bool
) -> LaunchConfig:
    """A launch's shape: ``cluster`` CTAs along x (1: no clusters); ``programmatic``: may begin before its predecessor ends."""
    attributes = []
    if cluster > 1:
        attributes.append(_Attribute(_ATTRIBUTE_CLUSTER, b"", _AttributeValue(cluster=(cluster, 1, 1))))
    if programmatic:
        attributes.append(_Attribute(_ATTRIBUTE_PROGRAMMATIC, b"", _AttributeValue(flag=1)))
    array = (_Attribute * len(attributes))(*attributes) if attributes else None
    return LaunchConfig(grid, (threads, 1, 1), shared_bytes, stream, array, len(attributes))


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """Lets this thread load and allocate although a stream of the process is being captured."""
    mode = ctypes.c_int(_CAPTURE_RELAXED)
    exchange = library().cuThreadExchangeStreamCaptureMode
    check(exchange(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.lru_cache(maxsize=4096)
def tensor_map(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """The 128 bytes of a CUtensorMap over bfloat16 memory.

    shape, box: fastest axis first; strides: bytes of the axes after the first. In shared memory a box lies swizzled: 16-byte unit
    u of line r at u ^ (r & 7) where lines have 128 bytes, at u ^ (r >> 1 & 3) where they have 64. What lies outside the shape
    reads as zero and is not written. A map holds no memory: the same pointer, shape and strides have the same map.
    """
    rank = len(shape)
    space = ctypes.create_string_buffer(_MAP_BYTES + 64)
    address = (ctypes.addressof(space) + 63) & ~63  # the driver wants the map itself aligned
    status = library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        _BFLOAT16,
        ctypes.c_uint(rank),
        ctypes.c_void_p(pointer),
        _array(ctypes.c_uint64, shape),
        _array(ctypes.c_uint64, strides),
        _array(ctypes.c_uint32, box),
        _array(ctypes.c_uint32, (1,) * rank),
        0,  # no interleave
        _SWIZZLES[2 * box[0]],
        _PROMOTE_256B,
        0,  # out of bounds: zeros
    )
    check(status, f"cuTensorMapEncodeTiled(pointer {pointer:#x}, shape {shape}, strides {strides}, box {box})")
    return ctypes.string_at(address, _MAP_BYTES)


def _array(kind: Any, values: Sequence[int]) -> Any:
    return (kind * len(values))(*values)
