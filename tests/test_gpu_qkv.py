"""``rms_norm_qkv`` on a GPU: bits of transformers' Qwen3 modules and of the emulation."""

import itertools
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse.bf16 import bfloat16
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import EPS, Case, Guarded, against_numpy, demand_cases, demand_same, to_gpu, values

pytestmark = gpu_support.MARKS

HEAD = 128
ROWS = (1, 2, 3, 8, 16, 17, 64, 130, 512, 2048)


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
    def host(self) -> dict[str, np.ndarray]:
        """norm, qkv, q_norm and k_norm weights; a key norm's weight is 96.5."""
        return {
            "norm": inputs.norm_weight(self.hidden, 1, 8.0),
            "qkv": inputs.bell((sum(self.rows), self.hidden), 2, 0.03),
            "q_norm": inputs.norm_weight(HEAD, 3, 6.0),
            "k_norm": inputs.norm_weight(HEAD, 4, 96.5),
        }

    def split(self, packed: Any) -> tuple[Any, Any, Any]:
        """Hugging Face's three weights, as parts of the packed one."""
        q, k, _ = self.rows
        return packed[:q], packed[q : q + k], packed[q + k :]


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


class Peer:
    """The front of transformers' Qwen3 attention, eager: norm, projections, head norms, rotation."""

    def __init__(self, weights: dict[str, Any], model: Model) -> None:
        torch = gpu_support.torch()
        self.model = model
        self.weights = {name: gpu_support.to_torch(weight) for name, weight in weights.items()}
        self.norms = {}
        for name in ("norm", "q_norm", "k_norm"):
            norm = gpu_support.qwen3().Qwen3RMSNorm(len(weights[name]), eps=EPS).to("cuda")
            norm.weight = torch.nn.Parameter(self.weights[name], requires_grad=False)
            self.norms[name] = norm

    def __call__(self, packed: bool, x: Any, cos: Any, sin: Any, residual: Any = None) -> tuple[Any, ...]:
        torch = gpu_support.torch()
        linear = torch.nn.functional.linear
        with torch.no_grad():
            tensors = [gpu_support.to_torch(array)[None] for array in (x, cos, sin)]
            total = tensors[0] if residual is None else gpu_support.to_torch(residual)[None] + tensors[0]
            y = self.norms["norm"](total)
            if packed:
                projected = linear(y, self.weights["qkv"]).split(self.model.rows, dim=-1)
            else:
                projected = [linear(y, weight) for weight in self.model.split(self.weights["qkv"])]
            q, k, v = (one.reshape(1, len(x), -1, HEAD) for one in projected)
            q, k = self.norms["q_norm"](q), self.norms["k_norm"](k)
            rotated = gpu_support.qwen3().apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *tensors[1:])
            found = [one.transpose(1, 2)[0] for one in rotated] + [v[0]] + ([] if residual is None else [total[0]])
            return tuple(gpu_support.from_torch(one.contiguous()) for one in found)


@pytest.mark.parametrize("form", ["separate", "packed"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_hugging_face(model: Model, form: str) -> None:
    weights = {name: to_gpu(weight) for name, weight in model.host.items()}
    peer = partial(Peer(weights, model), form == "packed")
    qkv = weights["qkv"] if form == "packed" else model.split(weights["qkv"])
    block = partial(cufuse.rms_norm_qkv, eps=EPS, heads=model.heads)
    cases = []
    for count in ROWS:
        x, residual = values((count, model.hidden), count), values((count, model.hidden), count + 1, scale=3.0)
        cos, sin = map(to_gpu, cufuse.rope_tables(np.arange(1000, 1000 + count), HEAD))
        given = (x, weights["norm"], qkv, weights["q_norm"], weights["k_norm"])
        call = partial(block, *given, cos=cos, sin=sin)
        cases.append(Case(f"{model.name}, {form}, {count} tokens", call, partial(peer, x, cos, sin)))
        if count in (1, 17, 512):
            what = f"{model.name}, {form}, {count} tokens, residual"
            call = partial(block, *given, cos=cos, sin=sin, residual=residual)
            cases.append(Case(what, call, partial(peer, x, cos, sin, residual)))
    demand_cases(f"block, Hugging Face, {form}", cases)


@pytest.mark.parametrize("name", cufuse.recipes)
def test_every_recipe_against_the_emulation(name: str) -> None:
    recipe, model = cufuse.recipes[name], MODELS["0.6B"]
    host = model.host
    cases = []
    for count, packed, residual in itertools.product((1, 3, 16), (True, False), (True, False)):
        x = inputs.heavy((count, model.hidden), count)
        dtype = np.float32 if recipe.rope.tables == "float32" else bfloat16
        cos, sin = cufuse.rope_tables(np.arange(1000, 1000 + count), HEAD, dtype=dtype)
        options: dict[str, Any] = {"cos": cos, "sin": sin, "heads": model.heads, "recipe": recipe, "eps": EPS}
        if residual:
            options["residual"] = inputs.heavy((count, model.hidden), count + 1, 3.0)
        qkv = host["qkv"] if packed else model.split(host["qkv"])
        what = f"{name}, {count} tokens, {'packed' if packed else 'separate'}{', residual' if residual else ''}"
        given = (x, host["norm"], qkv, host["q_norm"], host["k_norm"])
        cases.append(against_numpy(what, cufuse.rms_norm_qkv, *given, **options))
    demand_cases("block, emulation", cases)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
def test_4b_against_the_emulation(packed: bool) -> None:
    model = MODELS["4B"]
    host, cases = model.host, []
    for name, count in itertools.product(("torch", "late-rounding"), (1, 3, 16)):
        dtype = np.float32 if name == "late-rounding" else bfloat16
        cos, sin = cufuse.rope_tables(np.arange(count), HEAD, dtype=dtype)
        qkv = host["qkv"] if packed else model.split(host["qkv"])
        given = (inputs.heavy((count, model.hidden), count), host["norm"], qkv, host["q_norm"], host["k_norm"])
        block = partial(cufuse.rms_norm_qkv, cos=cos, sin=sin, heads=model.heads, recipe=name)
        on_gpu = partial(cufuse.rms_norm_qkv, cos=to_gpu(cos), sin=to_gpu(sin), heads=model.heads, recipe=name)
        what = f"4B, {name}, {count} tokens"
        cases.append(Case(what, partial(on_gpu, *map(to_gpu, given)), partial(block, *given)))
    demand_cases("block, emulation", cases)


def small(leading: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arrays and options of a block with six heads of 64, with all that may be left out."""
    x, residual = (inputs.heavy((*leading, 192), seed) for seed in (1, 2))
    weights = inputs.norm_weight(192, 1, 8.0), inputs.bell((6 * 64, 192), 2, 0.05)
    cos, sin = cufuse.rope_tables(np.arange(int(np.prod(leading))).reshape(leading), 64)
    given = (x, *weights, inputs.norm_weight(64, 3, 6.0), inputs.norm_weight(64, 4, 96.5))
    return given, {"cos": cos, "sin": sin, "residual": residual, "heads": 4, "k_slices": 1}


@pytest.mark.parametrize("name", ["torch", "separate-k-norm", "late-rounding", "float32"])
def test_what_may_be_left_out(name: str) -> None:
    recipe = cufuse.recipes[name]
    cases = []
    for norms, rotation, residual, packed in itertools.product((True, False), repeat=4):
        (x, norm, qkv, *head_norms), options = small((2, 5))
        if recipe.rope.tables == "float32":
            options |= dict(zip(("cos", "sin"), cufuse.rope_tables(np.arange(10).reshape(2, 5), 64, dtype=np.float32), strict=True))
        options |= {} if rotation else {"cos": None, "sin": None}
        options |= {"head_dim": 64, "residual": options["residual"] if residual else None}
        weights = qkv if packed else (qkv[:256], qkv[256:320], qkv[320:])
        what = f"{name}: norms {norms}, rotation {rotation}, residual {residual}, packed {packed}"
        given = (x, norm, weights, *(head_norms if norms else (None, None)))
        cases.append(against_numpy(what, cufuse.rms_norm_qkv, *given, recipe=name, **options))
    demand_cases("block, emulation", cases)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
def test_outputs_in_one_buffer_and_replayed(packed: bool) -> None:
    """q, k and v as views of one guarded buffer, launched, captured and replayed while the memory pool is in other use."""
    gpu = gpu_support.cupy()
    (x, norm, qkv, *head_norms), options = small((9,))
    weights = qkv if packed else (qkv[:256], qkv[256:320], qkv[320:])
    given = (x, norm, weights, *head_norms)
    expected = cufuse.rms_norm_qkv(*given, **options)
    on_gpu, named = tuple(map(to_gpu, given)), {key: to_gpu(value) for key, value in options.items()}
    guard, total = Guarded((9, 6, 64), bfloat16, gap=0), gpu.empty((9, 192), bfloat16)
    outs = (guard.out[:, :4], guard.out[:, 4:5], guard.out[:, 5:], total)
    found = cufuse.rms_norm_qkv(*on_gpu, **named, out=outs)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one is outs[index]
        demand_same("block, emulation", one, other, f"one buffer, result {index}")
    graph, stream = gpu_support.captured(lambda: cufuse.rms_norm_qkv(*on_gpu, **named, out=outs))
    others = [gpu.full(size, 0x5A, np.uint8) for size in (1 << 12, 1 << 14, 1 << 16) * 20]
    for turn in range(3):
        for out in outs:
            out.view(np.uint16)[...] = 0
        gpu.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for index, (one, other) in enumerate(zip(outs, expected, strict=True)):
            demand_same("block, emulation", one, other, f"replay {turn}, result {index}")
    assert all(bool((other == 0x5A).all()) for other in others), "a replay wrote to memory that was given to others"
    guard.demand_intact("block")
    with pytest.raises(ValueError, match=r"out\[3\] overlaps residual in memory"):
        cufuse.rms_norm_qkv(*on_gpu, **named, out=(None, None, None, named["residual"]))
