"""The attention front of the six Qwen3 sizes: weights and tokens that are hard on rounding, and Hugging Face's own modules."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import cufuse
from tests import gpu_support
from tests.gpu_support import EPS, from_torch, to_gpu, to_torch

HEAD = 128


@dataclass(frozen=True)
class Model:
    """The projections of a Qwen3: hidden size, query heads; eight key and value heads of 128 in all of them."""

    name: str
    hidden: int
    heads: int
    kv_heads: int = 8

    @property
    def rows(self) -> tuple[int, int, int]:
        return self.heads * HEAD, self.kv_heads * HEAD, self.kv_heads * HEAD

    @cached_property
    def weights(self) -> dict[str, Any]:
        """norm, qkv, q_norm and k_norm weights on the GPU; a key norm's weights go up to 96.5."""
        return {
            "norm": norm_weight(self.hidden, 1, 8.0),
            "qkv": bell((sum(self.rows), self.hidden), 2, self.hidden**-0.5),
            "q_norm": norm_weight(HEAD, 3, 6.0),
            "k_norm": norm_weight(HEAD, 4, 96.5),
        }

    def forget(self) -> None:
        """Give the weights' memory back."""
        self.__dict__.pop("weights", None)

    def split(self, packed: Any) -> tuple[Any, Any, Any]:
        """Hugging Face's three weights, as parts of the packed one."""
        q, k, _ = self.rows
        return packed[:q], packed[q : q + k], packed[q + k :]

    def given(self, x: Any, form: str = "packed") -> tuple[Any, ...]:
        """The arrays of a call: x, norm weight, projection ("packed" or "separate"), head norms."""
        weights = self.weights
        qkv = weights["qkv"] if form == "packed" else self.split(weights["qkv"])
        return x, weights["norm"], qkv, weights["q_norm"], weights["k_norm"]

    def tokens(self, count: int, seed: int = 0) -> Any:
        """[count, hidden], heavy-tailed."""
        return heavy_tailed((count, self.hidden), 1000 * count + seed)


MODELS = {
    model.name: model
    for model in (
        Model("0.6B", 1024, 16),
        Model("1.7B", 2048, 16),
        Model("4B", 2560, 32),
        Model("8B", 4096, 32),
        Model("14B", 5120, 40),
        Model("32B", 5120, 64),
    )
}


def bell(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Any:
    """bfloat16 normal values, made on the GPU."""
    torch = gpu_support.torch()
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return from_torch((torch.randn(shape, generator=generator, device="cuda") * scale).to(torch.bfloat16))


def heavy_tailed(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Any:
    """bfloat16 values of Student's t with three degrees of freedom, a few of them 1024 times as large."""
    torch = gpu_support.torch()
    generator = torch.Generator(device="cuda").manual_seed(seed)
    squares = torch.zeros(shape, device="cuda")
    for _ in range(3):
        squares += torch.randn(shape, generator=generator, device="cuda").square_()
    x = torch.randn(shape, generator=generator, device="cuda") * scale / torch.sqrt(squares / 3)
    outliers = torch.rand(shape, generator=generator, device="cuda") < 1 / 3000
    return from_torch(torch.where(outliers, x * 1024, x).to(torch.bfloat16))


def norm_weight(size: int, seed: int, largest: float) -> Any:
    """bfloat16 norm weights around 1, one in 32 of them large, the largest of these as given."""
    torch = gpu_support.torch()
    generator = torch.Generator(device="cuda").manual_seed(seed)
    weight = 1 + 0.25 * torch.randn(size, generator=generator, device="cuda")
    large = torch.linspace(largest, largest / 8, len(weight[seed::32]), device="cuda")
    weight[seed::32] = large
    return from_torch(weight.to(torch.bfloat16))


def tables(count: int, first: int = 1000, dtype: Any = cufuse.bfloat16, head: int = HEAD) -> dict[str, Any]:
    """cos and sin of neighbouring positions, on the GPU."""
    pair = cufuse.rope_tables(np.arange(first, first + count), head, dtype=dtype)
    return dict(zip(("cos", "sin"), map(to_gpu, pair), strict=True))


class Peer:
    """The front of transformers' Qwen3 attention, eager: norm, projections, head norms, rotation."""

    def __init__(self, model: Model, weights: dict[str, Any] | None = None) -> None:
        """weights: norm, qkv (packed), q_norm and k_norm, CuPy arrays; the model's own unless given."""
        torch = gpu_support.torch()
        self.model = model
        self.weights = {name: to_torch(weight) for name, weight in (weights or model.weights).items()}
        self.norms = {}
        for name in ("norm", "q_norm", "k_norm"):
            norm = gpu_support.qwen3().Qwen3RMSNorm(len(self.weights[name]), eps=EPS).to("cuda")
            norm.weight = torch.nn.Parameter(self.weights[name], requires_grad=False)
            self.norms[name] = norm

    def __call__(self, form: str, x: Any, cos: Any, sin: Any, residual: Any = None) -> tuple[Any, ...]:
        """q, k, v [M, H, D], and the new residual if there was one, as CuPy arrays. form: "packed" or "separate"."""
        torch = gpu_support.torch()
        linear = torch.nn.functional.linear
        with torch.no_grad():
            tensors = [to_torch(array)[None] for array in (x, cos, sin)]
            total = tensors[0] if residual is None else to_torch(residual)[None] + tensors[0]
            y = self.norms["norm"](total)
            if form == "packed":
                projected = linear(y, self.weights["qkv"]).split(self.model.rows, dim=-1)
            else:
                projected = [linear(y, weight) for weight in self.model.split(self.weights["qkv"])]
            q, k, v = (one.reshape(1, len(x), -1, HEAD) for one in projected)
            q, k = self.norms["q_norm"](q), self.norms["k_norm"](k)
            rotated = gpu_support.qwen3().apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *tensors[1:])
            found = [one.transpose(1, 2)[0] for one in rotated] + [v[0]] + ([] if residual is None else [total[0]])
            return tuple(from_torch(one.contiguous()) for one in found)
