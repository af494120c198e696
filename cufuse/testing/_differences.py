"""Two chains of named intermediates, and the first place where they part."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from cufuse import named_recipes
from cufuse.recipe import Recipe
from cufuse.testing import _bits
from cufuse.testing._assertions import histogram
from cufuse.testing._stages import POINTS, recipe_stages

Chain: TypeAlias = Callable[..., Mapping[str, Any] | Iterable[tuple[str, Any]]]


@dataclass(frozen=True)
class Difference:
    """Where two chains part first: ``str()`` of it is the report.

    stage : the first stage whose arrays differ, in the order in which the first chain yields them.
    index : the first differing element of it. (), and no values, where the arrays' shapes differ.
    values : the element under both chains, as scalars of the arrays' dtypes.
    codes : their bits.
    ulp : steps of the format between them; None where the dtypes differ or one of them is NaN.
    count, size : how many elements of the stage differ, and how many there are.
    equal_stages : the stages before it, which are equal.
    rounding : what the recipes state there, as ``Recipe.rounding_points`` puts it, or None where no recipe was given.
    note : what else is to be said, such as two dtypes or shapes.
    """

    stage: str
    index: tuple[int, ...]
    values: tuple[Any, ...]
    codes: tuple[int, ...]
    ulp: int | None
    count: int
    size: int
    equal_stages: tuple[str, ...]
    rounding: str | None
    note: str
    histogram: str

    def __str__(self) -> str:
        before = f"equal up to {self.equal_stages[-1]!r}" if self.equal_stages else "no stage before it"
        lines = [f"the chains part at stage {self.stage!r} ({before}): {self.count} of {self.size} elements differ"]
        if self.values:
            first, second = (_bits.described(value) for value in self.values)
            apart = "" if self.ulp is None else f", {self.ulp} ulp apart"
            lines.append(f"  first at {self.index}: {first} and {second}{apart}")
        if self.histogram:
            lines.append(f"  distances: {self.histogram}")
        lines += [f"  {text}" for text in (self.note, self.rounding) if text]
        return "\n".join(lines)


def find_first_difference(
    f: Chain | str | Recipe,
    g: Chain | str | Recipe,
    inputs: Any,
    *,
    recipe: str | Recipe | None = None,
    operation: str = "rms_norm",
) -> Difference | None:
    """Run two chains of computation on the same inputs and name the first stage, element and rounding at which they part.

    Parameters
    ----------
    f, g : functions that return, or yield in the order of the computation, named intermediates: a dict, or pairs (name, array)
        of NumPy or CuPy arrays or PyTorch tensors. A recipe, or its name, stands for ``recipe_stages(operation, recipe)``.
    inputs : what both are called with: a mapping becomes keyword arguments, a tuple arguments, anything else the only argument.
    recipe : whose words say which rounding is behind a stage; not needed where f or g is a recipe. Stages have to be named as in
        ``recipe_stages``.
    operation : which operation a recipe in the place of f or g stands for.

    Returns
    -------
    None where every stage that both have is equal, bit for bit; otherwise a ``Difference``, whose ``str()`` reports it.

    Stages that only one chain yields are passed over. Where the dtypes differ, one chain has rounded and the other has not: values
    are compared then, and -0 and +0 are equal, NaN equal to NaN.

    Raises ValueError where the chains have no stage in common, or one yields a name twice; TypeError for other kinds of arrays.
    """
    chains = [recipe_stages(operation, one) if isinstance(one, (str, Recipe)) else one for one in (f, g)]
    found = [_run(chain, inputs) for chain in chains]
    common = [name for name in found[0] if name in found[1]]
    if not common:
        names = " and ".join(", ".join(one) or "nothing" for one in found)
        raise ValueError(f"the chains have no stage in common: they yield {names}; give the stages the same names")
    words = [getattr(chain, "recipe", None) for chain in chains]
    if recipe is not None:
        words = [one or named_recipes.get(recipe) for one in words]
    for place, name in enumerate(common):
        difference = _compare(name, found[0][name], found[1][name])
        if difference is not None:
            return Difference(
                stage=name, equal_stages=tuple(common[:place]), rounding=_rounding(name, words[0], words[1]), **difference
            )
    return None


def _run(chain: Chain, inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, Mapping):
        yielded = chain(**inputs)
    elif isinstance(inputs, tuple):
        yielded = chain(*inputs)
    else:
        yielded = chain(inputs)
    pairs = yielded.items() if isinstance(yielded, Mapping) else yielded
    found: dict[str, Any] = {}
    for name, array in pairs:
        if name in found:
            raise ValueError(f"a chain yields {name!r} twice; give every stage a name of its own")
        # copied at once: the chain may go on in the same memory
        found[name] = _bits.to_host(f"stage {name!r}", array).copy()
    return found


def _compare(name: str, one: np.ndarray, other: np.ndarray) -> dict[str, Any] | None:
    nothing: dict[str, Any] = {"index": (), "values": (), "codes": (), "ulp": None, "histogram": ""}
    if one.shape != other.shape:
        return nothing | {"count": one.size, "size": one.size, "note": f"shapes {one.shape} and {other.shape}"}
    note, distance = "", None
    if one.dtype == other.dtype:
        differ = _bits.codes(one) != _bits.codes(other)
        distance = _bits.ulp_distance(one[differ], other[differ])
    else:
        note = f"dtypes {one.dtype} and {other.dtype}: the values are compared"
        with np.errstate(invalid="ignore"):
            wide, also = one.astype(np.float64), other.astype(np.float64)
        differ = (wide != also) & ~(np.isnan(wide) & np.isnan(also))
    if not differ.any():
        return None
    index = tuple(int(i) for i in np.argwhere(differ)[0])
    values = (one[index], other[index])
    return {
        "index": index,
        "values": values,
        "codes": tuple(int(_bits.codes(np.asarray(value))) for value in values),
        "ulp": None if distance is None or distance[0] == _bits.NOT_COMPARABLE else int(distance[0]),
        "count": int(np.count_nonzero(differ)),
        "size": one.size,
        "note": note,
        "histogram": "" if distance is None else histogram(distance),
    }


def _rounding(stage: str, first: Recipe | None, second: Recipe | None) -> str | None:
    """The statements behind a stage: those on which two recipes disagree, else all."""
    if first is None and second is None:
        return None
    places = POINTS.get(stage)
    if places is None:
        return None
    if first is None or second is None or first == second:
        stated = first or second
        assert stated is not None
        lines = [stated.rounding_points()[place] for place in places]
        return f"{stated.name} states there: " + "; ".join(f"'{line}'" for line in lines)
    pairs = [(first.rounding_points()[place], second.rounding_points()[place]) for place in places]
    apart = [(a, b) for a, b in pairs if a != b]
    if not apart:
        return f"{first.name} and {second.name} state the same there: " + "; ".join(f"'{a}'" for a, _ in pairs)
    return "; ".join(f"{first.name} states '{a}', {second.name} '{b}'" for a, b in apart)
