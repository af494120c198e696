"""``find_first_difference`` and ``recipe_stages``: the first stage, element and rounding at which two computations part."""

import doctest
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import testing
from cufuse.emulation.rsqrt import rsqrt
from cufuse.testing._stages import OPERATIONS, POINTS
from tests.witnesses import bits, demand_bits, random_bf16

F32 = np.float32
BF16 = cufuse.bfloat16


def norm_inputs(rows: int = 3, columns: int = 256) -> dict[str, Any]:
    return {"x": random_bf16(1, rows, columns), "weight": random_bf16(2, columns, scale=20), "eps": 1e-6}


def block_inputs() -> dict[str, Any]:
    cos, sin = cufuse.rope_tables(np.arange(3), 16, dtype=F32)
    return {
        "x": random_bf16(1, 3, 64),
        "norm_weight": random_bf16(2, 64),
        "qkv_weight": (random_bf16(3, 32, 64), random_bf16(4, 16, 64), random_bf16(5, 16, 64)),
        "q_norm_weight": random_bf16(6, 16),
        "k_norm_weight": random_bf16(7, 16, scale=90),
        "cos": cos,
        "sin": sin,
        "k_slices": 1,
    }


def test_the_worked_example() -> None:
    """The documentation of cufuse.testing, as printed there."""
    assert doctest.testmod(testing) == doctest.TestResults(failed=0, attempted=13)


CALLS = {
    "rms_norm": (norm_inputs(), lambda inputs, recipe: {"y": cufuse.rms_norm(**inputs, recipe=recipe)}),
    "add_rms_norm": (
        norm_inputs() | {"residual": random_bf16(9, 3, 256)},
        lambda inputs, recipe: dict(zip(("y", "new residual"), cufuse.add_rms_norm(**inputs, recipe=recipe), strict=True)),
    ),
    "linear": (
        {"x": random_bf16(1, 3, 100), "weight": random_bf16(2, 5, 100), "k_slices": 2},
        lambda inputs, recipe: {"product": cufuse.linear(**inputs, recipe=recipe)},
    ),
    "rope": (
        {"q": random_bf16(1, 3, 4, 16), "k": random_bf16(2, 3, 2, 16), "cos": block_inputs()["cos"], "sin": block_inputs()["sin"]},
        lambda inputs, recipe: dict(zip(("q_rotated", "k_rotated"), cufuse.rope(**inputs, recipe=recipe), strict=True)),
    ),
    "rms_norm_qkv": (
        block_inputs(),
        lambda inputs, recipe: dict(
            zip(("q_rotated", "k_rotated", "v"), cufuse.rms_norm_qkv(**inputs, recipe=recipe), strict=True)
        ),
    ),
}


@pytest.mark.parametrize("name", cufuse.recipes)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_stages_end_in_the_operation(operation: str, name: str) -> None:
    """What the chain yields last is what the public call gives; before it every stage has a statement of the recipe."""
    inputs, call = CALLS[operation]
    recipe = cufuse.recipes[name]
    found = dict(testing.recipe_stages(operation, recipe)(**inputs))
    assert set(found) <= set(POINTS)
    for stage, expected in call(inputs, recipe).items():
        last = found[stage].reshape(expected.shape)
        if last.dtype != expected.dtype and recipe.round_output:
            last = cufuse.round_to_bf16(last)
        demand_bits(last, expected, stage)
    assert testing.find_first_difference(recipe, recipe, inputs, operation=operation) is None


def test_where_each_change_of_a_recipe_shows() -> None:
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "r": ("order sequential", {"norm": {"sum_order": "sequential"}}),
        "h": ("h = x * r in float32", {"norm": {"round_normalised": False}}),
        "normalised": ("(w + 1)", {"norm": {"weight_offset": 1.0}}),
        "q": ("sm_80", {"gemm": {"core": "sm_80"}}),
        "q_h": ("head norm: h = x * r in float32", {"head_norm": {"round_normalised": False}}),
        "q_rotated": ("products in float32", {"rope": {"round_products": False}}),
    }
    for stage, (words, change) in changes.items():
        # unrounded, so that the last bits of the products show
        torch = cufuse.recipes["torch"].derive("torch", gemm={"output": "float32"})
        found = testing.find_first_difference(torch, torch.derive("other", **change), long_block(), operation="rms_norm_qkv")
        assert found is not None
        assert found.stage == stage
        assert found.rounding is not None and words in found.rounding and found.rounding.startswith("torch states '")
        assert 0 < found.count <= found.size


def long_block() -> dict[str, Any]:
    """Wide enough for orders and tensor cores to show."""
    inputs = block_inputs()
    inputs["x"] = random_bf16(1, 3, 2048, binades=8)
    inputs["norm_weight"] = random_bf16(2, 2048)
    inputs["qkv_weight"] = tuple(random_bf16(seed, size, 2048) for seed, size in ((3, 64), (4, 16), (5, 16)))
    return inputs


def own_norm(x: Any, weight: Any, eps: float, wrong: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """A kernel's steps, written again; ``wrong`` names the step that goes wrong in one element."""
    wide = x.astype(F32)
    total = np.zeros(len(x), F32)
    for column in wide.T:
        total += column * column
    stages = {"r": rsqrt(total / F32(x.shape[1]) + F32(eps))}
    stages["h"] = cufuse.round_to_bf16(wide * stages["r"][:, None])
    stages["y"] = cufuse.round_to_bf16(stages["h"].astype(F32) * weight.astype(F32))
    for name, value in stages.items():
        if name == wrong:
            bits(value).reshape(-1)
            value.view(f"u{value.itemsize}").reshape(-1)[value.size // 2] += 3
        yield name, value


SEQUENTIAL = cufuse.recipes["torch"].derive("first to last", norm={"sum_order": "sequential", "mean": "divide"})


@pytest.mark.parametrize("wrong", ["r", "h", "y"])
def test_the_place_and_the_rounding_are_named(wrong: str) -> None:
    inputs = norm_inputs()
    assert testing.find_first_difference(SEQUENTIAL, own_norm, inputs) is None

    def damaged(**given: Any) -> Iterator[tuple[str, np.ndarray]]:
        return own_norm(**given, wrong=wrong)

    found = testing.find_first_difference(SEQUENTIAL, damaged, inputs)
    assert found is not None
    size = 3 if wrong == "r" else 3 * 256
    assert (found.stage, found.ulp, found.count, found.size) == (wrong, 3, 1, size)
    assert found.index == tuple(int(i) for i in np.unravel_index(size // 2, (3,) if wrong == "r" else (3, 256)))
    assert found.codes[1] - found.codes[0] == 3
    assert found.equal_stages == {"r": (), "h": ("r",), "y": ("r", "h")}[wrong]
    statement = {"r": "norm: m = s / K; r = rsqrt.approx.f32 of m + eps", "h": "norm: h = x * r -> bfloat16",
                 "y": "norm: y = h * w -> bfloat16"}[wrong]  # fmt: skip
    text = str(found)
    assert f"first to last states there: " in text and f"'{statement}'" in text  # noqa: F541
    assert f"1 of {size} elements differ" in text and "3 ulp apart" in text and "2-3 ulp: 1" in text
    assert ("equal up to" in text) == (wrong != "r")
    bare = testing.find_first_difference(lambda **given: dict(own_norm(**given)), damaged, inputs)
    assert bare is not None and bare.stage == wrong and bare.rounding is None
    named = testing.find_first_difference(lambda **given: dict(own_norm(**given)), damaged, inputs, recipe=SEQUENTIAL)
    assert named is not None and named.rounding == found.rounding


def test_ways_to_give_inputs_and_stages() -> None:
    def pairs(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        buffer = x + y
        yield "sum", buffer
        buffer *= 2  # the memory is used again
        yield "twice", buffer

    x = np.arange(4, dtype=F32)
    for inputs in ({"x": x, "y": x}, (x, x)):
        assert testing.find_first_difference(pairs, lambda x, y: {"twice": 4 * x, "sum": 2 * x, "more": x}, inputs) is None
    assert testing.find_first_difference(lambda x: {"a": x}, lambda x: [("a", x)], x) is None
    shapes = testing.find_first_difference(lambda x: {"a": x}, lambda x: {"a": x[:2]}, x)
    assert shapes is not None and "shapes (4,) and (2,)" in str(shapes)
    nan = testing.find_first_difference(lambda x: {"a": x}, lambda x: {"a": x * F32(np.nan)}, x)
    assert nan is not None and nan.ulp is None and "NaN against a number: 4" in str(nan)


def test_one_chain_has_rounded() -> None:
    x = np.array([1.0, -0.0, np.nan, 1.5], F32)
    exact = testing.find_first_difference(lambda x: {"a": x}, lambda x: {"a": cufuse.round_to_bf16(x)}, x)
    assert exact is None
    x[3] = 1.0 + 2.0**-9
    found = testing.find_first_difference(lambda x: {"a": x}, lambda x: {"a": cufuse.round_to_bf16(x)}, x)
    assert found is not None and found.index == (3,) and found.ulp is None
    assert "dtypes float32 and bfloat16: the values are compared" in str(found)
    assert found.codes == (0x3F804000, 0x3F80)


def test_misuse() -> None:
    x = np.ones(2, F32)
    with pytest.raises(ValueError, match="no stage in common: they yield a and b"):
        testing.find_first_difference(lambda x: {"a": x}, lambda x: {"b": x}, x)
    with pytest.raises(ValueError, match="'a' twice"):
        testing.find_first_difference(lambda x: [("a", x), ("a", x)], lambda x: {"a": x}, x)
    with pytest.raises(TypeError, match=r"stage 'a' is a builtins\.float"):
        testing.find_first_difference(lambda x: {"a": 1.0}, lambda x: {"a": x}, x)
    with pytest.raises(ValueError, match="operation is 'norm'"):
        testing.recipe_stages("norm", "torch")
    with pytest.raises(ValueError, match="recipe is 'pytorch'"):
        testing.find_first_difference("pytorch", "torch", norm_inputs())
    with pytest.raises(TypeError, match="float32"):
        testing.find_first_difference("torch", "torch", norm_inputs() | {"x": np.ones((2, 256), F32)})


def test_without_hypothesis() -> None:
    """Assertions and chains work; a strategy says what is missing; importing cufuse loads none of it."""
    program = """
import sys
import cufuse
assert not any(name.split(".")[0] == "hypothesis" or name.startswith("cufuse.testing") for name in sys.modules)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hypothesis":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import numpy as np
import cufuse.testing
cufuse.testing.assert_bits_equal(np.ones(2), np.ones(2))
ones = np.ones((1, 4), cufuse.bfloat16)
assert cufuse.testing.find_first_difference("torch", "torch", {"x": ones, "weight": ones[0]}) is None
try:
    cufuse.testing.bf16_values
except ImportError as error:
    assert "needs Hypothesis" in str(error)
else:
    raise AssertionError
try:
    cufuse.testing.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in testing.__all__:
        assert getattr(testing, name).__doc__, name
