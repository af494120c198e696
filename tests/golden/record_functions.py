"""Measure exponentials, silu and softmax on a GPU: python3 -m tests.golden.record_functions --out FOLDER

Nothing of cufuse takes part. Written are

- ex2_sm90.xz, ex2.json (for cufuse/emulation/data): ``ex2.approx.ftz.f32``, the instruction inside CUDA's expf, for every value of
  the fixed-point fraction on which it was found to depend, as differences from ``ex2_reference``; and the counts of the search for
  that fraction over all float32 in [0, 1), [1, 4) and [-26, 0), and of comparing expf with its reduction to ex2 for every float32;
- functions.safetensors (for tests/golden): torch.exp on a sample, silu on all 65,536 bfloat16, softmax rows of 1 to 40,000 values.
"""

import argparse
import json
import lzma
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import torch

from . import inputs
from .record import DEVICE, to_gpu, to_numpy, versions

SOURCE = r"""
#define EACH long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; if (i >= n) return;
extern "C" __global__ void ex2(const float* x, float* y, long long n) {
    EACH asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[i]) : "f"(x[i]));
}
extern "C" __global__ void exponential(const float* x, float* y, long long n) { EACH y[i] = expf(x[i]); }
// what nvcc makes of expf (read in its PTX), up to the instruction: expf(x) = ex2(fraction) * scale
extern "C" __global__ void reduce(const float* x, float* fraction, float* scale, long long n) {
    EACH float a = x[i];
    float shifted = __fmaf_rd(__saturatef(__fmaf_rn(a, __int_as_float(0x3BBB989D), 0.5f)), 252.0f, __int_as_float(0x4B400001));
    float whole = __fadd_rn(shifted, __int_as_float(0xCB40007F));
    fraction[i] = __fmaf_rn(a, __int_as_float(0x32A57060), __fmaf_rn(a, __int_as_float(0x3FB8AA3B), -whole));
    scale[i] = __int_as_float(__float_as_int(shifted) << 23);
}
extern "C" __global__ void times(const float* x, const float* s, float* y, long long n) { EACH y[i] = __fmul_rn(x[i], s[i]); }
"""
CHUNK = 1 << 26
BITS = (22, 23, 24)
MODES = ("complement", "floor", "toward_zero", "nearest")

SOFTMAX_LENGTHS = (*range(1, 1025),)
SOFTMAX_LONG = (
    1025, 1026, 1027, 1028, 1100, 1536, 2000, 2047, 2048, 2049, 2050, 3000, 4095, 4096, 4097, 5000, 8192, 9215, 9216, 9217, 9220,
    10000, 12252, 12256, 12260, 12288, 12289, 16384, 16387, 40000,
)  # fmt: skip
SOFTMAX_ROWS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    provenance = versions() | {"script": "tests/golden/record_functions.py"}
    start = time.time()
    functions = Functions()
    tensors = silu() | softmax() | exponentials(functions)
    safetensors.numpy.save_file(tensors, arguments.out / "functions.safetensors", metadata=provenance)
    print(f"silu, softmax, exp samples: {time.time() - start:.1f} s", flush=True)
    found = {"expf": check_reduction(functions)}
    print(f"expf over all inputs: {time.time() - start:.1f} s\n{json.dumps(found['expf'])}", flush=True)
    found |= search(functions)
    print(f"search for the fraction: {time.time() - start:.1f} s\n{json.dumps(found['search'])}", flush=True)
    found |= write_table(functions, found["bits"], arguments.out)
    if not found["fits"]:
        write_binades(functions, arguments.out)
    (arguments.out / "ex2.json").write_text(json.dumps(provenance | found, indent=1) + "\n")
    print(f"table: {time.time() - start:.1f} s", flush=True)


class Functions:
    """Kernels compiled by NVRTC without CuPy's options, which would flush subnormal numbers; memory is PyTorch's."""

    def __init__(self) -> None:
        import cupy
        from cupy.cuda import nvrtc

        program = nvrtc.createProgram(SOURCE, "functions.cu", [], [])
        major, minor = torch.cuda.get_device_capability()
        nvrtc.compileProgram(program, [f"--gpu-architecture=sm_{major}{minor}", "-ftz=false", "-fmad=false"])
        self.module = cupy.cuda.function.Module()
        self.module.load(nvrtc.getCUBIN(program))
        self.device = cupy.cuda.Device(0)

    def call(self, name: str, *tensors: torch.Tensor) -> None:
        count = tensors[0].numel()
        assert all(one.is_contiguous() and one.dtype == torch.float32 and one.numel() == count for one in tensors)
        torch.cuda.synchronize()
        with self.device:
            arguments = (*(np.uint64(one.data_ptr()) for one in tensors), np.int64(count))
            self.module.get_function(name)((-(-count // 256), 1, 1), (256, 1, 1), arguments)
            self.device.synchronize()

    def ex2(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        self.call("ex2", x, out)
        return out


def differ(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


def codes(first: int, last: int) -> Iterator[torch.Tensor]:
    """The float32 with codes first ... last - 1 (as unsigned integers), in chunks."""
    for start in range(first, last, CHUNK):
        span = torch.arange(start, min(start + CHUNK, last), dtype=torch.int64, device=DEVICE)
        yield torch.where(span >= 1 << 31, span - (1 << 32), span).to(torch.int32).view(torch.float32)


def code_of(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def check_reduction(functions: Functions) -> dict[str, Any]:
    """For every float32 but NaN: how often torch.exp differs from expf, and expf from the reduction; and which fractions occur."""
    counts = {"inputs": 0, "torch.exp_differs_from_expf": 0, "expf_differs_from_reduction": 0}
    least, most = np.inf, -np.inf
    for first, last in ((0, 0x7F800001), (0x80000000, 0xFF800001)):
        for x in codes(first, last):
            y, fraction, scale, product = (torch.empty_like(x) for _ in range(4))
            functions.call("exponential", x, y)
            functions.call("reduce", x, fraction, scale)
            functions.call("times", functions.ex2(fraction), scale, product)
            counts["inputs"] += x.numel()
            counts["torch.exp_differs_from_expf"] += differ(torch.exp(x), y)
            counts["expf_differs_from_reduction"] += differ(product, y)
            # where neither end saturates the fraction is that of x * log2(e)
            inner = (x > -86.0) & (x < 87.0)
            if bool(inner.any()):
                least, most = min(least, float(fraction[inner].min())), max(most, float(fraction[inner].max()))
    special = torch.tensor([0.0, -0.0, np.inf, -np.inf, np.nan, 89.0, -104.5, -87.4, 88.72284], device=DEVICE)
    y = torch.empty_like(special)
    functions.call("exponential", special, y)
    shown = {str(a): hex(b & 0xFFFFFFFF) for a, b in zip(special.tolist(), y.view(torch.int32).tolist(), strict=True)}
    return counts | {"least_fraction": least, "largest_fraction": most, "special": shown}


RANGES = {"[0, 1)": (0, code_of(1.0)), "[1, 4)": (code_of(1.0), code_of(4.0)), "[-26, -0]": (0x80000000, code_of(-26.0))}


def search(functions: Functions) -> dict[str, Any]:
    """On how many bits of the fraction ex2 depends, and how the others are cut off: the number of inputs that contradict."""
    found: dict[str, dict[str, int]] = {}
    for bits in BITS:
        for mode in MODES:
            contradictions = dict.fromkeys(RANGES, 0)
            for name, (first, last) in RANGES.items():
                for x in codes(first, last):
                    contradictions[name] += contradicting(functions, x, bits, mode)
            found[f"{bits} bits, {mode}"] = contradictions
    fitting = [key for key, counts in found.items() if not any(counts.values())]
    best = fitting[0] if fitting else min(found, key=lambda key: sum(found[key].values()))
    contradictions = sum(found[best].values())
    return {"search": found, "fits": bool(fitting), "contradictions": contradictions, "rule": best, "bits": int(best.split()[0])}


def contradicting(functions: Functions, x: torch.Tensor, bits: int, mode: str) -> int:
    cut = cut_off(x.double() * 2.0**bits, bits, mode)
    whole = torch.floor(cut * 2.0**-bits)
    fraction = cut * 2.0**-bits - whole  # exact, and a float32 as long as it has at most 24 bits
    power = ((whole.long() + 1023) << 52).view(torch.float64)
    expected = (functions.ex2(fraction.float()).double() * power).float()
    return differ(functions.ex2(x), expected)


def cut_off(scaled: torch.Tensor, bits: int, mode: str) -> torch.Tensor:
    """The integer that is left of an operand times 2**bits. "complement": the magnitude cut off and, where the operand is negative,
    all bits inverted, as in one's complement, unless those of the fraction are all zero."""
    if mode == "complement":
        magnitude = torch.floor(scaled.abs())
        inverted = torch.where(torch.remainder(magnitude, 2.0**bits) == 0, -magnitude, -magnitude - 1)
        return torch.where(scaled >= 0, magnitude, inverted)
    return {"floor": torch.floor, "toward_zero": torch.trunc, "nearest": torch.round}[mode](scaled)


def ex2_reference(q: np.ndarray, bits: int) -> np.ndarray:
    """2**(q / 2**bits) for integers 0 <= q < 2**bits, float32: float64 roots of two, multiplied, rounded once.

    Only square roots and products, which IEEE 754 defines, so that every machine finds the same.
    """
    half = bits // 2
    high, low = products(bits - half, 0), products(half, bits - half)
    return (high[q >> half] * low[q & ((1 << half) - 1)]).astype(np.float32)


def products(count: int, skipped: int) -> np.ndarray:
    """2**(i / 2**(skipped + count)) for 0 <= i < 2**count, from the roots 2**(2**-k), k = skipped + 1 ... skipped + count."""
    root, roots = np.float64(2), []
    for _ in range(skipped + count):
        root = np.sqrt(root)
        roots.append(root)
    table = np.ones(1)
    for root in reversed(roots[skipped:]):  # the lowest bit first
        table = np.concatenate([table, table * root])
    return table


def write_table(functions: Functions, bits: int, folder: Path) -> dict[str, Any]:
    bits = min(bits, 24)
    q = np.arange(1 << bits)
    x = torch.from_numpy((q * 2.0**-bits).astype(np.float32)).to(DEVICE)
    measured = functions.ex2(x).cpu().numpy()
    difference = measured.view(np.int32) - ex2_reference(q, bits).view(np.int32)
    counts = {int(d): int(n) for d, n in zip(*np.unique(difference, return_counts=True), strict=True)}
    print("ex2 differences from the reference:", counts, flush=True)
    data = lzma.compress((difference + 4).astype(np.uint8).tobytes(), preset=9)
    (folder / "ex2_sm90.xz").write_bytes(data)
    return {"counts": counts, "table_bits": bits, "bytes": len(data), "offset": 4}


def write_binades(functions: Functions, folder: Path) -> None:
    """What is needed to go on where no rule fits: [2**-4, 1), every float32, as differences from the rounded float64 value."""
    found = [
        (functions.ex2(x).view(torch.int32) - torch.exp2(x.double()).float().view(torch.int32)).cpu().numpy()
        for x in codes(code_of(2.0**-4), code_of(1.0))
    ]
    data = lzma.compress((np.concatenate(found) + 4).astype(np.uint8).tobytes(), preset=1)
    (folder / "ex2_binades.xz").write_bytes(data)
    print(f"no rule fits: ex2_binades.xz, {len(data)} bytes", flush=True)


def sample() -> np.ndarray:
    """float32 of both signs with magnitudes from 2**-30 to 110: every 2,731st code, and all bfloat16 among them."""
    magnitudes = np.arange(code_of(2.0**-30), code_of(110.0), 2731, dtype=np.uint32)
    bfloat16 = np.arange(code_of(2.0**-30) >> 16, code_of(110.0) >> 16, dtype=np.uint32) << np.uint32(16)
    both = np.concatenate([magnitudes, bfloat16])
    both = np.concatenate([both, both | np.uint32(0x80000000)])
    return both[: len(both) // 256 * 256].view(np.float32)


def exponentials(functions: Functions) -> dict[str, np.ndarray]:
    x = to_gpu(sample())
    y = torch.empty_like(x)
    functions.call("exponential", x, y)
    assert differ(torch.exp(x), y) == 0
    return {"exp/digest": inputs.row_digests(to_numpy(y).reshape(256, -1))}


def silu() -> dict[str, np.ndarray]:
    every = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    return {"silu": to_numpy(torch.nn.functional.silu(to_gpu(every))).view(np.uint16)}


def softmax_input(length: int) -> np.ndarray:
    """bfloat16 scores [SOFTMAX_ROWS, length], spread as attention scores are; of the last row some are masked."""
    scores = inputs.bell((SOFTMAX_ROWS, length), inputs.seed_of("softmax", length), 3.0)
    scores[-1, 1 + length // 2 :] = ml_dtypes.finfo(ml_dtypes.bfloat16).min
    return scores


def softmax() -> dict[str, np.ndarray]:
    tensors = {}
    for name, lengths in (("short", SOFTMAX_LENGTHS), ("long", SOFTMAX_LONG)):
        digests, largest = [], []
        for length in lengths:
            scores = to_gpu(softmax_input(length))
            weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
            digests.append(inputs.row_digests(to_numpy(weights)))
            largest.append(to_numpy(weights.max(-1).values))  # 1 / sum
        tensors[f"softmax_{name}/digest"] = np.stack(digests)
        tensors[f"softmax_{name}/largest"] = np.stack(largest).view(np.uint32)
    return tensors


if __name__ == "__main__":
    main()
