"""Whose numerics another engine's intermediates follow, and up to where."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cufuse import named_recipes
from cufuse._safetensors_file import SafetensorsFile, failure
from cufuse.bf16 import bfloat16
from cufuse.qwen3.decoder import Progress
from cufuse.qwen3.model import Qwen3, open_model
from cufuse.recipe import Recipe
from cufuse.trace import Difference, first_difference, to_bfloat16


@dataclass(frozen=True)
class Agreement:
    """One recipe against the given arrays: ``equal`` names that have no differing value before ``first``, the first one that
    has."""

    recipe: str
    equal: tuple[str, ...]
    first: Difference | None


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; ``print`` shows the verdict. ``recipes`` are ordered, the one followed farthest first."""

    given: tuple[str, ...]
    recipes: tuple[Agreement, ...]

    @property
    def best(self) -> tuple[Agreement, ...]:
        """The recipes that are followed farthest: several where the arrays do not tell them apart."""
        most = len(self.recipes[0].equal)
        return tuple(one for one in self.recipes if len(one.equal) == most)

    def __str__(self) -> str:
        names = " or ".join(one.recipe for one in self.best)
        lines = []
        if self.best[0].first is None:
            lines.append(f"your engine computes {names}: all {len(self.given)} arrays are equal in every bit")
        elif not self.best[0].equal:
            lines.append("your engine computes none of these recipes: the first array differs from all")
        else:
            last, first = self.best[0].equal[-1], self.best[0].first
            lines.append(f"your engine computes {names} up to {_place(last)}; it leaves at {_place(first.name)}")
        for one in self.recipes:
            if one.first is not None:
                first = one.first
                where = f"token {first.token}, {list(first.index)}: {first.recipe:.9g} given, {first.reference:.9g} expected"
                lines.append(
                    f"  {one.recipe}: {len(one.equal)} of {len(self.given)} arrays, then {_place(first.name)}, {where} "
                    f"({first.differing:,} of {first.size:,} differ)"
                )
        return "\n".join(lines)


def compare(
    intermediates: Mapping[str, Any] | str | os.PathLike[str],
    *,
    model: Qwen3 | str | os.PathLike[str],
    token_ids: Sequence[int] | np.ndarray | None = None,
    recipes: Sequence[str | Recipe] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare arrays dumped from another engine with what each recipe computes for the same prompt.

    Parameters
    ----------
    intermediates : name -> NumPy array, or a safetensors file with them. Names are those of ``model.intermediate_names()``
        ("layers.3.k_normed", "logits"); any of them may be missing. bfloat16 (or float32) arrays with the tokens first: [T, ...],
        what is behind the tokens flattened or not, a leading batch of 1 or none. bfloat16 is compared bit for bit with the recipe's
        value rounded to bfloat16, float32 with the recipe's value itself; NaN equals NaN, and -0 equals 0.
    model : a ``Qwen3``, or the folder of one.
    token_ids : the prompt, [T]; None where the file holds it as "token_ids".
    recipes : names or Recipes; None for all.
    progress : called as ``progress(what, fraction)``.

    Returns
    -------
    A ``Comparison``; ``str`` of it is the verdict, such as "your engine computes vllm-0.20 up to layer 3, k_normed; ...".

    A recipe is run from the token ids on: of an engine that leaves it, everything behind that place differs too.
    Raises CheckpointError for a damaged file, TypeError and ValueError for names, dtypes and shapes that the model does not have.
    """
    decoder = model if isinstance(model, Qwen3) else open_model(model)
    arrays, ids = _given(intermediates, token_ids)
    known = decoder.intermediate_names()
    unknown = sorted(set(arrays) - set(known))
    if unknown:
        known_names = f"known are {known[0]!r} to {known[-1]!r}"
        raise ValueError(f"intermediates hold {unknown[0]!r}, which the model does not have; {known_names}")
    chosen = [named_recipes.get(one) for one in (named_recipes.RECIPES if recipes is None else recipes)]
    if not chosen or not arrays:
        raise ValueError("nothing to compare: give one intermediate and one recipe at least")
    names = [name for name in known if name in arrays]
    found = []
    for number, recipe in enumerate(chosen):

        def share(what: str, done: float, number: int = number, recipe: Recipe = recipe) -> None:
            if progress is not None:
                progress(f"{recipe.name}: {what}", (number + done) / len(chosen))

        expected: dict[str, Any] = {}
        decoder.forward(ids, recipe=recipe, intermediates=expected, progress=share)
        equal: list[str] = []
        first = None
        for name in names:
            first = _difference(name, expected[name], arrays[name])
            if first is not None:
                break
            equal.append(name)
        found.append(Agreement(recipe.name, tuple(equal), first))
    return Comparison(tuple(names), tuple(sorted(found, key=lambda one: -len(one.equal))))


def _given(intermediates: Any, token_ids: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays by name, and the prompt."""
    if isinstance(intermediates, Mapping):
        arrays = dict(intermediates)
        if token_ids is None:
            token_ids = arrays.get("token_ids")
        arrays.pop("token_ids", None)
    else:
        arrays, stored = _read(Path(intermediates))
        token_ids = stored if token_ids is None else token_ids
    if token_ids is None:
        raise ValueError("token_ids are missing: give the prompt, or store it with the intermediates as 'token_ids'")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype not in (bfloat16, np.float32):
            kind = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
            raise TypeError(f"{name} is {kind}; needed is a NumPy array of bfloat16 or float32")
    ids = np.asarray(token_ids).reshape(-1)
    return arrays, ids


def _read(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    import safetensors

    file = SafetensorsFile(path)  # checks the header
    arrays: dict[str, np.ndarray] = {}
    ids = None
    with safetensors.safe_open(path, "numpy") as opened:
        for name, entry in file.tensors.items():
            if name == "token_ids":
                ids = opened.get_tensor(name)
            elif entry.dtype == "BF16":
                arrays[name] = np.asarray(file.read_bfloat16(name))
            elif entry.dtype == "F32":
                arrays[name] = opened.get_tensor(name)
            else:
                raise failure(path, f"dtype is {entry.dtype}, BF16 or F32 is needed", "dump it as bfloat16", tensor=name)
    return arrays, ids


def _difference(name: str, expected: np.ndarray, given: np.ndarray) -> Difference | None:
    """The first difference, with the recipe's value as reference and the engine's as recipe."""
    shape = expected.shape
    behind = given.shape[1:] if given.ndim > 1 and given.shape[0] == 1 and given.shape[1:2] == shape[:1] else given.shape
    if behind[:1] != shape[:1] or given.size != expected.size:
        raise ValueError(f"{name} has shape {given.shape}; needed is {shape}: tokens first, then heads, then channels or keys")
    reference = to_bfloat16(expected) if given.dtype == ml_dtypes.bfloat16 else expected
    return first_difference(name, reference, np.ascontiguousarray(given).reshape(shape), exact=True)


def _place(name: str) -> str:
    parts = name.split(".")
    return f"layer {parts[1]}, {parts[2]}" if parts[0] == "layers" else name
