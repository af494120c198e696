"""On what ``cufuse bench`` measures: the GPU, its driver, cuBLAS, and the packages that take part."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any, Final

import cufuse

_PACKAGES: Final = ("numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "torch", "triton", "transformers", "liger-kernel")


def machine() -> dict[str, Any]:
    """The GPU, its driver and cuBLAS."""
    import cupy

    from cufuse import cublaslt, launch

    device = launch.current_device()
    properties = cupy.cuda.runtime.getDeviceProperties(device)
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", driver.read_text()) if driver.exists() else None
    try:
        cublas = str(cublaslt.version())
    except cublaslt.CublasLtError as error:
        cublas = f"unknown ({error})"
    return {
        "name": properties["name"].decode(),
        "capability": launch.capability(device),
        "multiprocessors": launch.multiprocessors(device),
        "l2_bytes": int(properties["l2CacheSize"]),
        "driver": found.group(1) if found else "unknown",
        "cuda_driver": int(cupy.cuda.runtime.driverGetVersion()),
        "cublas": cublas,
    }


def versions() -> dict[str, str]:
    """Versions of cufuse and of the packages that take part."""
    found = {"cufuse": cufuse.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
