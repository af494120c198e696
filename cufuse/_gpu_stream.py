"""Reading memory and nothing else: kernels/read_only.cu, the floor under every kernel that streams a weight."""

import struct
from dataclasses import dataclass
from typing import Any, Final

from cufuse import launch
from cufuse.compiler import Kernel

_ARGUMENTS: Final = struct.Struct("PqP")
_UNIT_BYTES: Final = 16


@dataclass(frozen=True)
class Reader:
    """One way to read: threads a block, loads of 16 bytes in flight a thread, blocks a multiprocessor."""

    threads: int
    loads: int
    blocks: int

    @property
    def kernel(self) -> Kernel:
        defines = (("THREADS", self.threads), ("LOADS", self.loads))
        return Kernel(f"read_only {self.threads} threads, {self.loads} loads", "read_only.cu", "read_only", defines, self.threads)


READERS: Final = (Reader(1024, 4, 2), Reader(512, 4, 4), Reader(256, 4, 8), Reader(1024, 2, 2), Reader(512, 8, 2))
"""64 or 128 KB in flight on each multiprocessor; which is quickest depends on the size, so the floor is the quickest of them."""

KERNELS: Final = tuple({reader.kernel.name: reader.kernel for reader in READERS}.values())


def read(array: Any, reader: Reader, joined: Any = None) -> None:
    """Read a contiguous CuPy array whose address and size 16 divides, on the current stream.

    joined : uint32 array of one element, into which the exclusive or of all words is joined; None: nothing is written.
    """
    if not array.flags.c_contiguous or array.data.ptr % _UNIT_BYTES or array.nbytes % _UNIT_BYTES:
        raise ValueError(f"array has {array.nbytes} bytes, strides {array.strides}; needed are contiguous units of 16 bytes")
    device = launch.device_of(array=array, joined=joined)
    with launch.on_device(device):
        prepared = launch.prepare(reader.kernel, device, reader.blocks * launch.multiprocessors(device))
        prepared(_ARGUMENTS.pack(array.data.ptr, array.nbytes // _UNIT_BYTES, 0 if joined is None else joined.data.ptr))
