"""Record what PyTorch and transformers give on a GPU: python3 -m tests.golden.record --out tests/golden/data

Nothing of cufuse takes part: inputs come from seeds (inputs.py), outputs from PyTorch's eager kernels and from transformers'
own Qwen3 modules. Small outputs are stored as bits, larger ones as one digest a row (inputs.row_digests).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
import transformers
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from . import cases, inputs

RAW_LIMIT = 8192
DEVICE = torch.device("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    metadata = versions()
    print(json.dumps(metadata))
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, record in (("norms", norms), ("casts", casts), ("residual", residual), ("linear", linear), ("blocks", blocks)):
        start = time.time()
        tensors = {key: np.ascontiguousarray(cases.as_bits(value)) for key, value in record().items()}
        file = arguments.out / f"{name}.safetensors"
        safetensors.numpy.save_file(tensors, file, metadata=metadata)
        print(f"{name}: {len(tensors)} tensors, {file.stat().st_size} bytes, {time.time() - start:.1f} s", flush=True)


def versions() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(),
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "driver": driver_version(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "script": "tests/golden/record.py",
    }


def driver_version() -> str:
    text = Path("/proc/driver/nvidia/version")
    return text.read_text().split("  ")[1].strip() if text.exists() else "unknown"


def to_gpu(x: np.ndarray) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).to(DEVICE).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    return x.contiguous().cpu().numpy()


def hugging_face_norm(weight: torch.Tensor) -> Any:
    module = qwen3.Qwen3RMSNorm(weight.shape[0], eps=cases.EPS).to(DEVICE)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def store(tensors: dict[str, np.ndarray], key: str, value: np.ndarray) -> None:
    tensors[f"{key}/digest"] = inputs.row_digests(value)
    if value.size <= RAW_LIMIT:
        tensors[f"{key}/bits"] = value


@torch.no_grad()
def norms() -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for m, k in cases.NORM_CASES:
        x, weight = cases.norm_input(m, k)
        xg, wg = to_gpu(x), to_gpu(weight)
        store(tensors, f"hf/m{m}_k{k}", to_numpy(hugging_face_norm(wg)(xg)))
        store(tensors, f"f/m{m}_k{k}", to_numpy(F.rms_norm(xg, (k,), wg, eps=cases.EPS)))
        tensors[f"input/m{m}_k{k}"] = inputs.row_digests(x)
        # the factors themselves: a wrong last bit of a sum shows here, and only now and then in the rounded outputs
        tensors[f"hf/m{m}_k{k}/factor"] = to_numpy(torch.rsqrt(xg.float().pow(2).mean(-1) + cases.EPS))
        tensors[f"f/m{m}_k{k}/factor"] = to_numpy(torch.ops.aten._fused_rms_norm(xg, [k], wg, cases.EPS)[1]).reshape(-1)
    for k in (64, 128, 1000, 1024, 4096):
        rows = inputs.special_rows(k)
        weight = cases.norm_input(8, k)[1]
        xg, wg = to_gpu(rows), to_gpu(weight)
        tensors[f"special_hf/k{k}"] = to_numpy(hugging_face_norm(wg)(xg))
        tensors[f"special_f/k{k}"] = to_numpy(F.rms_norm(xg, (k,), wg, eps=cases.EPS))
        x = cases.norm_input(5, k)[0]
        promoted = hugging_face_norm(to_gpu(weight.astype(np.float32) * np.float32(1.001)))(to_gpu(x))
        tensors[f"float32_weight_hf/k{k}"] = to_numpy(promoted)
    return tensors


@torch.no_grad()
def casts() -> dict[str, np.ndarray]:
    x = cases.cast_input()
    codes = {"cpu": torch.from_numpy(x.copy()).to(torch.bfloat16), "cuda": to_gpu(x).to(torch.bfloat16)}
    tensors = {key: to_numpy(value.cpu()) for key, value in codes.items()}
    # the float64 cast goes through float32 (double rounding): recorded as a known deviation, not as a model
    near = np.float64(1) + np.ldexp(1.0, -8) + np.ldexp(1.0, -40)
    tensors["float64_near_tie_cuda"] = to_numpy(to_gpu(np.array([near])).to(torch.bfloat16))
    return tensors


@torch.no_grad()
def residual() -> dict[str, np.ndarray]:
    tensors = {}
    for m, k in cases.RESIDUAL_SHAPES:
        x, other = cases.residual_input(m, k)
        total = to_gpu(x) + to_gpu(other)
        weight = cases.norm_input(m, k)[1]
        tensors[f"sum/m{m}_k{k}"] = to_numpy(total)
        tensors[f"normalised/m{m}_k{k}"] = to_numpy(hugging_face_norm(to_gpu(weight))(total))
    return tensors


@torch.no_grad()
def linear() -> dict[str, np.ndarray]:
    tensors = {}
    for case in cases.products():
        x, weight = case.inputs()
        product = to_numpy(F.linear(to_gpu(x), to_gpu(weight)))
        tensors[case.name] = product[:, case.chosen()]
    return tensors


@torch.no_grad()
def blocks() -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for block in cases.BLOCKS:
        given = {key: to_gpu(value) for key, value in block.inputs().items()}
        q_rows, kv_rows = block.heads * block.head_dim, block.kv_heads * block.head_dim
        positions = torch.arange(1000, 1000 + block.tokens, device=DEVICE)[None]
        rotary = qwen3.Qwen3RotaryEmbedding(rotary_config(block)).to(DEVICE)
        normalised = hugging_face_norm(given["norm_weight"])(given["x"][None])
        cos, sin = rotary(normalised, positions)
        for key, value in (("cos", cos), ("sin", sin)):
            tensors[f"{block.name}/{key}"] = to_numpy(value[0])
        weights = given["qkv_weight"].split([q_rows, kv_rows, kv_rows])
        separate = [F.linear(normalised, w.contiguous().clone()) for w in weights]
        packed = list(F.linear(normalised, given["qkv_weight"]).split([q_rows, kv_rows, kv_rows], dim=-1))
        for form, (q, k, v) in (("separate", separate), ("packed", packed)):
            heads = {"normalised": normalised}
            for key, value in (("q", q), ("k", k), ("v", v)):
                heads[key] = value.reshape(1, block.tokens, -1, block.head_dim)
            heads["q_normed"] = hugging_face_norm(given["q_norm_weight"])(heads["q"])
            heads["k_normed"] = hugging_face_norm(given["k_norm_weight"])(heads["k"])
            rotated = qwen3.apply_rotary_pos_emb(
                heads["q_normed"].transpose(1, 2), heads["k_normed"].transpose(1, 2), cos, sin
            )
            heads["q_rotated"], heads["k_rotated"] = (value.transpose(1, 2) for value in rotated)
            for stage in cases.STAGES:
                rows = to_numpy(heads[stage][0]).reshape(block.tokens, -1)
                tensors[f"{block.name}/{form}/{stage}/digest"] = inputs.row_digests(rows)
                if block.tokens == 3:
                    tensors[f"{block.name}/{form}/{stage}/bits"] = rows
    return tensors


def rotary_config(block: cases.Block) -> Any:
    return transformers.Qwen3Config(
        hidden_size=block.hidden,
        num_attention_heads=block.heads,
        num_key_value_heads=block.kv_heads,
        head_dim=block.head_dim,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


if __name__ == "__main__":
    main()
