"""Calls of a second thread while the first one's imports what launches kernels."""

import subprocess
import sys

_SECOND_THREAD = """
import sys, threading, types
import numpy as np
import cufuse


class Array:  # as CuPy's, and refused by the first check
    shape, strides, dtype, ndim, size, itemsize = (4, 64), (128, 2), np.dtype(cufuse.bfloat16), 2, 256, 2
    data = types.SimpleNamespace(ptr=4096, device_id=0)


space = types.SimpleNamespace
runtime = space(getDevice=lambda: 0, getDeviceCount=lambda: 1, CUDARuntimeError=RuntimeError)
sys.modules["cupy"] = space(ndarray=Array, cuda=space(runtime=runtime, get_current_stream=lambda: space(ptr=0)))
x, seen, imported, started = Array(), set(), threading.Event(), threading.Event()


def call():
    while not imported.is_set():
        for operation in (
            lambda: cufuse.rms_norm(x, x, eps=-1.0, out=x),
            lambda: cufuse.rms_norm_qkv(x, x, x, x, x, heads=4, eps=-1.0),
        ):
            try:
                operation()
            except Exception as error:
                seen.add(f"{type(error).__name__}: {error}")
        started.set()


other = threading.Thread(target=call)
other.start()
started.wait()
import cufuse._gpu_norm, cufuse._gpu_qkv
imported.set()
other.join()
print(*sorted(seen), sep="\\n")
"""


def test_a_second_threads_call_while_the_first_imports() -> None:
    """A module stands in sys.modules before it is complete."""
    command = [sys.executable, "-c", _SECOND_THREAD]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("ValueError: eps is -1.0")
    assert all(line.startswith("ValueError: eps is -1.0") for line in done.stdout.splitlines()), done.stdout
