"""Kernel sources to machine code, on disk once: NVRTC called directly, with a cache that knows the included headers.

CuPy's own compilation is not used: it appends ``-ftz=true``, which would flush every bfloat16 subnormal, and leaves headers
out of its cache key. NVRTC needs neither a GPU nor a driver, so all of this runs in CI.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

CACHE_VARIABLE: Final = "CUFUSE_CACHE_DIR"
"""Environment variable that names the folder of compiled kernels; by default the platform's cache folder is used."""

ARCHITECTURES: Final = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""Targets for which every kernel that can run there is compiled in CI."""

SHARED_MEMORY_LIMIT: Final = {
    80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376,
}  # fmt: skip
"""Most shared memory of a block by compute capability (CUDA C++ Programming Guide, "Technical Specifications")."""

REGISTERS_PER_BLOCK: Final = 65536

_FLAGS: Final = ("-ftz=false", "-fmad=false", "-std=c++17", "--ptxas-options=-v")
_INCLUDE: Final = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


class KernelCompileError(RuntimeError):
    """NVRTC refused a kernel; the message has the first error with its file and line, ``log`` everything."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Kernel:
    """One configuration that can be launched.

    name : unique among all kernels, for tables and messages.
    source : file in the folder ``kernels``.
    entry : the ``extern "C"`` function.
    defines : macros that make this configuration, ``(("TILE_M", 128), ...)``.
    threads : most threads of a block.
    dynamic_smem : dynamic shared memory of a block in bytes, unless a launch says otherwise.
    capability : smallest compute capability, 10 * major + minor.
    last : largest one (instructions of ``sm_90a`` exist nowhere else; sm_120 has no copies to several CTAs at once).
    """

    name: str
    source: str
    entry: str
    defines: tuple[tuple[str, int | str], ...]
    threads: int
    dynamic_smem: int = 0
    capability: int = 80
    last: int = 999

    def runs_on(self, capability: int) -> bool:
        """Whether instructions and shared memory of this compute capability suffice."""
        return self.capability <= capability <= self.last and self.dynamic_smem <= shared_memory_limit(capability)


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel and what ptxas said about it (bytes; registers a thread)."""

    code: bytes
    registers: int
    static_smem: int
    stack: int
    spills: int


def architecture(capability: int) -> str:
    """The target to compile for: Hopper's has an "a", without which wgmma and setmaxnreg do not exist."""
    return f"sm_{capability}a" if capability == 90 else f"sm_{capability}"


def shared_memory_limit(capability: int) -> int:
    """Most shared memory of a block; the smallest known limit for a chip that is not in the table."""
    return SHARED_MEMORY_LIMIT.get(capability, min(SHARED_MEMORY_LIMIT.values()))


def source_folder() -> Path:
    """Where the CUDA sources are: in the package once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the folder 'kernels' is neither in {package} nor beside it; reinstall cufuse")


def cache_folder() -> Path:
    """$CUFUSE_CACHE_DIR, or ``cufuse`` in the platform's folder for caches."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "cufuse"


def compile_kernel(kernel: Kernel, target: str) -> Cubin:
    """Machine code for ``target`` ("sm_90a"), from the cache or from NVRTC.

    The cache's key is a hash of the source, all headers it includes, flags, target and NVRTC's version. A damaged entry is
    noticed by its checksum and made anew; a folder that cannot be written to costs one warning and the cache.
    Raises KernelCompileError.
    """
    headers = _sources(kernel.source)
    options = _options(kernel, target)
    compiler = _compiler()
    described = json.dumps([headers, kernel.source, options, compiler.version()])
    stem = f"{Path(kernel.source).stem}-{target}-{hashlib.sha256(described.encode()).hexdigest()[:40]}"
    if (found := _read(stem)) is not None:
        return found
    code, log = _run(kernel, headers, options, "cubin")
    cubin = Cubin(code, *_resources(log))
    _write(stem, kernel, cubin)
    return cubin


def compile_ptx(kernel: Kernel, target: str) -> str:
    """The kernel's PTX text, never cached: for tests and for the curious."""
    code, _ = _run(kernel, _sources(kernel.source), _options(kernel, target), "ptx")
    return code.decode()


def _sources(source: str) -> dict[str, str]:
    """The source and all headers that it includes, directly or not, by name."""
    folder = source_folder()
    texts: dict[str, str] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = (folder / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(texts[name])
    return dict(sorted(texts.items()))


def _options(kernel: Kernel, target: str) -> list[str]:
    return [f"--gpu-architecture={target}", *_FLAGS, *(f"-D{name}={value}" for name, value in kernel.defines)]


def _run(kernel: Kernel, sources: dict[str, str], options: list[str], kind: str) -> tuple[bytes, str]:
    headers = {name: text for name, text in sources.items() if name != kernel.source}
    code, log = _compiler().build(kernel.source, sources[kernel.source], headers, options, kind)
    if code is None:
        first = next((line.strip() for line in log.splitlines() if "error" in line), log.strip()[:200])
        raise KernelCompileError(f"kernel {kernel.name!r} does not compile with {' '.join(options)}: {first}", log)
    return code, log


def _resources(log: str) -> tuple[int, int, int, int]:
    """Registers, static shared memory, stack frame and spills from ptxas's report; -1 where it says nothing."""
    registers = _number(r"Used (\d+) registers", log)
    stores, loads = _number(r"(\d+) bytes spill stores", log), _number(r"(\d+) bytes spill loads", log)
    # ptxas leaves shared memory out where there is none
    smem = max(_number(r"(\d+) bytes smem", log), 0) if registers >= 0 else -1
    return registers, smem, _number(r"(\d+) bytes stack frame", log), stores + loads if stores >= 0 else -1


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else -1


def _read(stem: str) -> Cubin | None:
    folder = cache_folder()
    try:
        about = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        code = (folder / f"{stem}.cubin").read_bytes()
        # a whole entry under another's name is sound, but other machine code
        if about["stem"] == stem and hashlib.sha256(code).hexdigest() == about["sha256"]:
            return Cubin(code, *(int(about[key]) for key in ("registers", "static_smem", "stack", "spills")))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, unreadable or damaged: compiled anew
    return None


_cache_is_off = False


def _write(stem: str, kernel: Kernel, cubin: Cubin) -> None:
    global _cache_is_off
    if _cache_is_off:
        return
    about = {
        "kernel": kernel.name, "stem": stem, "sha256": hashlib.sha256(cubin.code).hexdigest(), "registers": cubin.registers,
        "static_smem": cubin.static_smem, "stack": cubin.stack, "spills": cubin.spills,
    }  # fmt: skip
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / f"{stem}.cubin", cubin.code)
        _replace(folder / f"{stem}.json", json.dumps(about).encode())
    except OSError as error:
        _cache_is_off = True
        warnings.warn(
            f"compiled kernels cannot be kept in {folder} ({error}): each process compiles them again; "
            f"set {CACHE_VARIABLE} to a folder that can be written to",
            RuntimeWarning,
            stacklevel=2,
        )


def _replace(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder and rename: no reader sees half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class _Nvrtc(Protocol):
    def version(self) -> tuple[int, int]: ...

    def build(
        self, name: str, source: str, headers: dict[str, str], options: list[str], kind: str
    ) -> tuple[bytes | None, str]:
        """Code of ``kind`` ("cubin" or "ptx"), None where there are errors, and the log."""
        ...


class _CudaBindings:
    """NVRTC through NVIDIA's own Python bindings (package cuda-bindings)."""

    def __init__(self) -> None:
        from cuda.bindings import nvrtc

        self.nvrtc: Any = nvrtc

    def version(self) -> tuple[int, int]:
        _, major, minor = self.nvrtc.nvrtcVersion()
        return int(major), int(minor)

    def build(
        self, name: str, source: str, headers: dict[str, str], options: list[str], kind: str
    ) -> tuple[bytes | None, str]:
        names, texts = [n.encode() for n in headers], [t.encode() for t in headers.values()]
        program = self._call("nvrtcCreateProgram", source.encode(), name.encode(), len(names), texts, names)
        try:
            (status,) = self.nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
            log = self._text(program, "ProgramLog").decode(errors="replace").rstrip("\0 \n")
            good = status == self.nvrtc.nvrtcResult.NVRTC_SUCCESS
            return self._text(program, kind.upper()) if good else None, log
        finally:
            self._call("nvrtcDestroyProgram", program)

    def _text(self, program: Any, what: str) -> bytes:
        text = bytes(self._call(f"nvrtcGet{what}Size", program))
        self._call(f"nvrtcGet{what}", program, text)
        return text.rstrip(b"\0") if what == "PTX" else text

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *results = getattr(self.nvrtc, function)(*arguments)
        if status != self.nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelCompileError(f"{function} answered {status}")
        return results[0] if results else None


class _CupyNvrtc:
    """NVRTC through CuPy."""

    def __init__(self) -> None:
        from cupy.cuda import nvrtc

        self.nvrtc: Any = nvrtc

    def version(self) -> tuple[int, int]:
        major, minor = self.nvrtc.getVersion()
        return int(major), int(minor)

    def build(
        self, name: str, source: str, headers: dict[str, str], options: list[str], kind: str
    ) -> tuple[bytes | None, str]:
        names, texts = [n.encode() for n in headers], [t.encode() for t in headers.values()]
        program = self.nvrtc.createProgram(source, name, texts, names)
        try:
            try:
                self.nvrtc.compileProgram(program, options)
            except self.nvrtc.NVRTCError:
                return None, self.nvrtc.getProgramLog(program)
            log = self.nvrtc.getProgramLog(program)
            if kind == "ptx":
                text = self.nvrtc.getPTX(program)
                return text if isinstance(text, bytes) else text.encode(), log
            # CuPy takes the last byte of a cubin for the end of a string and drops it; it is zero
            return self.nvrtc.getCUBIN(program) + b"\0", log
        finally:
            self.nvrtc.destroyProgram(program)


_found: _Nvrtc | None = None


def _compiler() -> _Nvrtc:
    """CuPy's NVRTC where CuPy is in use (one library in the process), else NVIDIA's bindings, else CuPy's."""
    global _found
    if _found is None:
        _found = _find_compiler()
    return _found


def _find_compiler() -> _Nvrtc:
    ways: list[type[_CudaBindings] | type[_CupyNvrtc]] = [_CudaBindings, _CupyNvrtc]
    reasons = []
    for way in reversed(ways) if "cupy" in sys.modules else ways:
        try:
            compiler = way()
            compiler.version()
            return compiler
        except Exception as error:  # the bindings raise RuntimeError and others where the library is missing
            reasons.append(str(error))
    raise KernelCompileError(f"NVRTC was not found ({'; '.join(reasons)}); install it with pip install 'cufuse[cuda13]'")
