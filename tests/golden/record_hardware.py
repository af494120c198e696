"""Measure what only a GPU knows: python3 -m tests.golden.record_hardware --out cufuse/emulation/data

- rsqrt: ``rsqrt.approx.f32`` over all 2^24 significands of [1, 4) as differences from the correctly rounded result, after a
  proof over every positive float32 that the other binades repeat it, shifted by powers of four;
- cublas: into how many slices cuBLASLt cuts K for the Qwen3 projections, for every M from 1 to 8192;
- division: whether division under -use_fast_math (``div.approx.ftz.f32``) is multiplication by the rounded reciprocal, for the row
  lengths of norms: llama.cpp and FlashInfer divide so;
- rope: the cos and sin that transformers' Qwen3RotaryEmbedding gives for every position up to 40,959, as the list of exceptions
  from the bfloat16 of the float64 value of the float32 angle.
"""

import argparse
import json
import lzma
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from cufuse import cublaslt

from .record import DEVICE, to_numpy, versions

MODELS = {
    "0.6b": (1024, 16, 3072),
    "1.7b": (2048, 16, 6144),
    "4b": (2560, 32, 9728),
    "8b": (4096, 32, 12288),
    "14b": (5120, 40, 17408),
    "32b": (5120, 64, 25600),
}
POSITIONS = 40960


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("what", nargs="*", default=["rsqrt", "division", "rope", "cublas"])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    provenance = versions() | {"script": "tests/golden/record_hardware.py"}
    for what in arguments.what:
        start = time.time()
        {"rsqrt": rsqrt, "division": division, "rope": rope, "cublas": cublas}[what](arguments.out, provenance)
        print(f"{what}: {time.time() - start:.1f} s", flush=True)


def rsqrt(folder: Path, provenance: dict[str, str]) -> None:
    one, four = 0x3F800000, 0x40800000
    codes = torch.arange(one, four, dtype=torch.int32, device=DEVICE)
    values = codes.view(torch.float32)
    measured = torch.rsqrt(values).view(torch.int32)
    correct = (1 / values.double().sqrt()).float().view(torch.int32)
    difference = (measured - correct).cpu().numpy()
    counts = {int(d): int(n) for d, n in zip(*np.unique(difference, return_counts=True), strict=True)}
    print("rsqrt differences:", counts)
    deviating = check_other_binades(measured)
    packed = (difference + 2).astype(np.uint8)
    data = lzma.compress(packed.tobytes(), preset=9)
    (folder / "rsqrt_sm90.xz").write_bytes(data)
    record = provenance | {"counts": counts, "binades_deviating": deviating, "bytes": len(data)}
    (folder / "rsqrt.json").write_text(json.dumps(record, indent=1) + "\n")


def check_other_binades(measured: torch.Tensor) -> dict[str, int]:
    """How many results in each pair of binades (subnormals: shifted up exactly first) differ from the shifted table."""
    table = measured.view(torch.float32).double()
    deviating = {}
    for power in range(-63, 64):
        codes = torch.arange(0x3F800000, 0x40800000, dtype=torch.int32, device=DEVICE)
        scaled = codes.view(torch.float32).double() * 4.0**power
        as_float = scaled.float()
        same = as_float.double() == scaled  # subnormals: only those that exist
        same &= torch.isfinite(as_float) & (as_float > 0)
        expected = (table * 2.0**-power).float()
        wrong = same & (torch.rsqrt(as_float).view(torch.int32) != expected.view(torch.int32))
        deviating[str(power)] = int(wrong.sum())
    for power in range(-75, -63):
        scaled = torch.arange(0x3F800000, 0x40800000, dtype=torch.int32, device=DEVICE).view(torch.float32).double() * 4.0**power
        as_float = scaled.float()
        same = (as_float.double() == scaled) & (as_float > 0)
        expected = (table * 2.0**-power).float()
        deviating[str(power)] = int((same & (torch.rsqrt(as_float).view(torch.int32) != expected.view(torch.int32))).sum())
    special = torch.tensor([0.0, -0.0, float("inf"), -1.0, float("nan"), -1e-45], device=DEVICE)
    print("specials:", [hex(v & 0xFFFFFFFF) for v in torch.rsqrt(special).view(torch.int32).tolist()])
    print("binades that deviate:", {key: value for key, value in deviating.items() if value})
    return {key: value for key, value in deviating.items() if value}


def division(folder: Path, provenance: dict[str, str]) -> None:
    import cupy

    source = """extern "C" __global__ void divide(const float* s, float k, float* out, int n) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) out[i] = s[i] / k;
    }"""
    kernel = cupy.RawKernel(source, "divide", options=("--use_fast_math",))
    sums = cupy.arange(0x3F800000, 0x40000000, dtype=cupy.int32).view(cupy.float32)  # every significand
    counts = {}
    for k in (64, 128, 256, 896, 1024, 1536, 2048, 2560, 3584, 4096, 5120, 6144, 7168, 8192, 12288):
        out = cupy.empty_like(sums)
        kernel((-(-sums.size // 256),), (256,), (sums, np.float32(k), out, np.int32(sums.size)))
        reciprocal = sums * (np.float32(1) / np.float32(k))
        divided = sums / np.float32(k)
        counts[k] = [int((out.view(cupy.int32) != other.view(cupy.int32)).sum()) for other in (reciprocal, divided)]
    print("fast-math s / K, of 2^23 significands differ from s * (1/K), from s / K:", counts)
    record = provenance | {"significands": 2**23, "differ_from_reciprocal_and_from_division": counts}
    (folder / "division.json").write_text(json.dumps(record, indent=1) + "\n")


def rope(folder: Path, provenance: dict[str, str]) -> None:
    exceptions: dict[str, list[list[int]]] = {}
    for head_dim in (64, 128, 256):
        config = transformers.Qwen3Config(
            hidden_size=1024,
            num_attention_heads=8,
            head_dim=head_dim,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
        module = qwen3.Qwen3RotaryEmbedding(config).to(DEVICE)
        dummy = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
        cos, sin = module(dummy, torch.arange(POSITIONS, device=DEVICE)[None])
        power = np.float32(1e6 ** (np.arange(0, head_dim, 2) / head_dim))
        frequency = np.float32(1) / power
        print("inv_freq equal:", bool((to_numpy(module.inv_freq) == frequency).all()))
        angle = np.arange(POSITIONS, dtype=np.float32)[:, None] * frequency[None, :]
        half = head_dim // 2
        found: list[list[int]] = []
        for which, (table, function) in enumerate(((cos, np.cos), (sin, np.sin))):
            given = to_numpy(table[0])
            assert (given[:, :half].view(np.uint16) == given[:, half:].view(np.uint16)).all()
            model = function(angle.astype(np.float64)).astype(np.float32).astype(given.dtype)
            differ = np.argwhere(model.view(np.uint16) != given[:, :half].view(np.uint16))
            found += [[which, int(p), int(i), int(given[p, i].view(np.uint16))] for p, i in differ]
        exceptions[str(head_dim)] = found
        print(f"rope head_dim {head_dim}: {len(found)} exceptions of {2 * POSITIONS * half}")
    record = provenance | {"base": 1e6, "positions": POSITIONS, "exceptions": exceptions}
    (folder / "rope.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")


def cublas(folder: Path, provenance: dict[str, str]) -> None:
    shapes = set()
    for hidden, heads, mlp in MODELS.values():
        q = heads * 128
        shapes |= {(q, hidden), (1024, hidden), (q + 2048, hidden), (hidden, q), (mlp, hidden), (2 * mlp, hidden), (hidden, mlp)}
    table = {}
    reductions: dict[str, int] = {}
    for n, k in sorted(shapes):
        runs: list[list[int]] = []
        for m in range(1, 8193):
            algorithm = cublaslt.algorithm(m, n, k)
            if algorithm.k_slices > 1:
                key = f"scheme {algorithm.reduction_scheme}"
                reductions[key] = reductions.get(key, 0) + 1
            if not runs or runs[-1][1] != algorithm.k_slices:
                runs.append([m, algorithm.k_slices])
        table[f"{n}x{k}"] = runs
    print("split-K reduction schemes:", reductions)
    record = provenance | {
        "cublaslt": cublaslt.version(),
        "workspace_bytes": cublaslt.WORKSPACE_BYTES,
        "rows": [1, 8192],
        "meaning": "NxK: [[first M, slices of K], ...] up to the next entry's M",
        "slices": table,
    }
    (folder / "cublas_slices.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
