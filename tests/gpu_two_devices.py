"""Every operation on another device than the current one, on a machine with several: python3 -m tests.gpu_two_devices

The cases of tests/sanitizer_cases.py with all arrays on the last device while the first is current, then on both devices from two
threads at once: the emulation's bits each time, and results on the arrays' device. Then what must be refused: arrays of two
devices, ``out`` on another one. Ends with 2 where there is one device only.
"""

import sys
import threading
import time
from typing import Any

import pytest

import cufuse
from tests import gpu_support, sanitizer_cases
from tests.golden import inputs

AREA = "two devices"


def main() -> int:
    cupy = gpu_support.cupy()
    count = cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        print(f"needs two GPUs; here there is {count}", file=sys.stderr)
        return 2
    start, last = time.monotonic(), count - 1
    calls = elsewhere(cupy, last)
    print(f"{calls} calls on device {last} while device 0 was current: {compared()}, {time.monotonic() - start:.0f} s", flush=True)
    calls = on_both(cupy, last)
    print(f"{calls} calls on both from two threads: {compared()}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{refusals(cupy, last)} wrong calls refused by name, {time.monotonic() - start:.0f} s")
    return 0


def compared() -> str:
    return f"{gpu_support.COMPARED[AREA]:,} outputs compared, 0 differing"


def elsewhere(cupy: Any, device: int) -> int:
    """Inputs made on ``device``, calls from device 0."""
    with cupy.cuda.Device(device):
        cases = list(sanitizer_cases.cases())
        gpu_support.rehearse(case.call for case in cases)
    with cupy.cuda.Device(0):
        for case in cases:
            found = case.call()
            assert cupy.cuda.runtime.getDevice() == 0, f"{case.what} left another device current"
            demand(case, found, device)
    return len(cases)


def on_both(cupy: Any, last: int) -> int:
    """The same cases on both devices, each from its thread."""
    per_device: dict[int, list[Any]] = {}
    for device in (0, last):
        with cupy.cuda.Device(device):
            per_device[device] = list(sanitizer_cases.chains())
    found: dict[int, list[Any]] = {0: [], last: []}

    def work(device: int) -> None:
        for case in per_device[device]:
            found[device].append(case.call())

    threads = [threading.Thread(target=work, args=(device,)) for device in per_device]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device, cases in per_device.items():
        for case, results in zip(cases, found[device], strict=True):
            demand(case, results, device)
    return sum(map(len, per_device.values()))


def demand(case: gpu_support.Case, found: Any, device: int) -> None:
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, case.expected()))
    for one, other in zip(found, expected, strict=True):
        assert one.device.id == device, f"{case.what}: the result is on device {one.device.id}, the arrays on {device}"
        with one.device:
            gpu_support.demand_same(AREA, one, other, case.what)


def refusals(cupy: Any, last: int) -> int:
    """Arrays of two devices: a ValueError that names both, nothing written."""
    on_device = {}
    for device in (0, last):
        with cupy.cuda.Device(device):
            on_device[device] = [gpu_support.to_gpu(x) for x in (inputs.heavy((3, 64), 1), inputs.norm_weight(64, 1, 8.0))]
            on_device[device].append(cupy.zeros((3, 64), "u2").view(cufuse.bfloat16))
    here, there = on_device[0], on_device[last]
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("weight", (here[0], there[1]), {}),
        ("out", (here[0], here[1]), {"out": there[2]}),
    ]
    for name, given, options in wrong:
        with pytest.raises(ValueError, match=f"{name}.*device"):
            cufuse.rms_norm(*given, **options)
    for device in (0, last):
        with cupy.cuda.Device(device):
            assert not on_device[device][2].view("u2").any(), "out was written to"
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
