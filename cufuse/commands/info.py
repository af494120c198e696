"""``cufuse info``: versions, device, cache folder, and what each kernel takes."""

import argparse
import importlib.metadata
import platform
from typing import Any

import cufuse
from cufuse import compiler

_PACKAGES = (
    "numpy",
    "ml_dtypes",
    "safetensors",
    "numba",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cublas",
    "torch",
    "transformers",
)


def add(commands: Any) -> None:
    """Describe the command to the parser."""
    parser = commands.add_parser(
        "info",
        help="versions, device, cache folder; with --kernels what every kernel takes",
        description="Versions of the packages that matter, the GPU that CuPy sees, the folder of compiled kernels. Needs no GPU.",
    )
    parser.add_argument(
        "--kernels", action="store_true", help="compile every kernel (no GPU needed) and list registers and shared memory"
    )
    target_help = "target of --kernels (default: %(default)s)"
    parser.add_argument("--arch", choices=compiler.ARCHITECTURES, default="sm_90a", help=target_help)
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> None:
    lines = {"cufuse": cufuse.__version__, "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    lines["GPU"] = _gpu()
    lines["kernel sources"] = str(compiler.source_folder())
    lines["compiled kernels"] = f"{compiler.cache_folder()} (set {compiler.CACHE_VARIABLE} for another folder)"
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    if given.kernels:
        _print_kernels(given.arch)


def _gpu() -> str:
    from cufuse import launch

    try:
        count = launch.device_count()
    except launch.NoGpuError as error:
        return f"none: {error}"
    except OSError as error:  # CuPy makes the folder of its own cache while it is imported
        return f"unknown: CuPy cannot be imported ({error}); set CUPY_CACHE_DIR to a folder that can be written to"
    return "; ".join(launch.device_name(device) for device in range(count))


def _print_kernels(target: str) -> None:
    from cufuse import launch
    from cufuse.commands.progress import progress_bar

    kernels = [kernel for kernel in launch.kernels() if kernel.runs_on(int(target.removeprefix("sm_").rstrip("a")))]
    rows = []
    with progress_bar() as show:
        for number, kernel in enumerate(kernels):
            show(kernel.name, number / len(kernels))
            rows += launch.resource_table([target], [kernel])
    width = max(len(row.kernel.name) for row in rows)
    print(f"\n{'kernel':{width}}  threads  registers  shared memory  spills   ({target})")
    for row in rows:
        smem = row.static_smem + row.kernel.dynamic_smem
        print(f"{row.kernel.name:{width}}  {row.kernel.threads:7}  {row.registers:9}  {smem:13}  {row.spills:6}")
