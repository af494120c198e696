"""What ``cufuse bench`` measured: columns, cells, ratios, JSON (the schema is in ``cufuse.bench``)."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

SCHEMA: Final = 1

CUFUSE, STATIC, GEMM, COMPILE, LIGER = "cufuse", "cufuse_static", "cublas_gemm", "torch_compile", "liger"
F_RMS_NORM, EAGER = "f_rms_norm", "eager"

COLUMNS: Final[dict[str, str]] = {
    GEMM: "cuBLAS's projection alone: no norm, no rotation",
    CUFUSE: "cufuse.rms_norm_qkv, packed weight, Q/K norm and rotation included",
    STATIC: "the same with static_weights=True: the weights may be read before the kernel in front has ended",
    COMPILE: "torch.compile of eager, dynamic=False",
    LIGER: "eager with Liger-Kernel's RMSNorm (llama mode) in the place of all three norms",
    F_RMS_NORM: "eager with torch.nn.functional.rms_norm in their place",
    EAGER: "Hugging Face's Qwen3RMSNorm, F.linear of the packed weight, apply_rotary_pos_emb",
}
"""What is measured, in the order of the tables. cuBLAS and cufuse are neighbours."""

RATIOS: Final = (GEMM, COMPILE, "floor")
"""What the time of cufuse is divided by."""

MEASURED_AGAINST_NOTHING: Final = (GEMM,)
"""Columns that do not give q, k and v."""

BF16: Final = "bf16"
"""What the table of quantised weights compares with: cufuse_static under recipe "torch"."""

_NEEDED: Final = {"Q4_0": {"0.6b": 1.5, "4b": 2.2, "8b": 2.5, "32b": 2.8}, "Q8_0": {"8b": 1.6, "32b": 1.6}}
_MOST_ROWS_NEEDED: Final = 64


def column_of(name: str, recipe: str) -> str:
    """The column of CUFUSE or STATIC under another recipe than the first."""
    return f"{name}:{recipe}"


def needed(form: str, model: str, tokens: int) -> float | None:
    """How many times as fast as bf16 a format shall be, the project's goal on an H200; None where none is set."""
    at_one = _NEEDED.get(form, {}).get(model) if tokens == 1 else None
    return 1.0 if at_one is None and form == "Q4_0" and tokens <= _MOST_ROWS_NEEDED else at_one


@dataclass
class Measurement:
    """One column of one cell. ``note`` says why there is no time, or how it was measured other than by a graph."""

    microseconds: float | None = None
    """Of one call: the median over all replays."""
    least: float | None = None
    most: float | None = None
    replays: int = 0
    differing: int | None = None
    """Outputs of q, k and v together whose bits are not those of ``against``."""
    outputs: int = 0
    against: str | None = None
    """"eager" (PyTorch, packed), "emulation", or None where nothing was compared."""
    note: str = ""
    failed: bool = False

    def take(self, times: Sequence[float], calls: int) -> None:
        """Note the microseconds of replays of so many calls."""
        self.microseconds = statistics.median(times) / calls
        self.least, self.most, self.replays = min(times) / calls, max(times) / calls, len(times)

    def fail(self, error: Exception) -> None:
        """Note what went wrong in the place of a time."""
        self.note, self.failed = f"{type(error).__name__}: {one_line(error)}", True
        self.microseconds = self.differing = None


def one_line(error: Exception) -> str:
    """What an error says, in no more than 300 characters."""
    return " ".join(str(error).split())[:300]


@dataclass
class Cell:
    """One model and number of tokens."""

    model: str
    hidden: int
    rows: int
    tokens: int
    weights: int = 0
    """Distinct packed weights that the calls of a graph go through."""
    floor: float | None = None
    """Microseconds in which a kernel that does nothing else reads one packed weight."""
    host_microseconds: float | None = None
    """Python's time for one call with out=, the launches queued."""
    allocated_bytes: int | None = None
    """Asked of CuPy's memory pool by one call with out=."""
    columns: dict[str, Measurement] = field(default_factory=dict)
    seconds: float = 0.0

    def time(self, column: str) -> float | None:
        """Microseconds of a column, or of the "floor"; None where there are none."""
        if column == "floor":
            return self.floor
        return self.columns[column].microseconds if column in self.columns else None

    def ratio(self, column: str, other: str) -> float | None:
        """Time of one column divided by that of another."""
        mine, theirs = self.time(column), self.time(other)
        return None if mine is None or theirs is None else mine / theirs

    def to_json(self) -> dict[str, Any]:
        ratios = {one: {other: self.ratio(one, other) for other in RATIOS} for one in (CUFUSE, STATIC) if one in self.columns}
        for one in self.columns:
            first, other_recipe, _ = one.partition(":")
            if other_recipe:
                ratios[one] = {first: self.ratio(one, first)}
        return {**dataclasses.asdict(self), "ratios": ratios}


@dataclass
class FormatMeasurement(Measurement):
    """One format of one cell of quantised weights."""

    bytes: int = 0
    """Of one packed weight."""
    error: float | None = None
    """Root mean square of the projection's difference from the float64 product with the unquantised weight, over that product's."""


@dataclass
class QuantisedCell:
    """One model and number of tokens: the block with its weights in each format, BF16 first."""

    model: str
    hidden: int
    rows: int
    tokens: int
    formats: dict[str, FormatMeasurement] = field(default_factory=dict)
    seconds: float = 0.0

    def faster(self, form: str) -> float | None:
        """How many times as fast as with bf16 weights."""
        base, mine = (self.formats[name].microseconds if name in self.formats else None for name in (BF16, form))
        return None if base is None or mine is None else base / mine

    def met(self, form: str) -> bool | None:
        """Whether that is what is needed; None where nothing is, or nothing was measured."""
        goal, found = needed(form, self.model, self.tokens), self.faster(form)
        return None if goal is None or found is None else found >= goal

    def to_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        for name, one in found["formats"].items():
            one |= {"faster": self.faster(name), "needed": needed(name, self.model, self.tokens), "met": self.met(name)}
        return found


@dataclass
class Results:
    """A whole run, or as much of it as is done."""

    device: dict[str, Any]
    versions: dict[str, str]
    date: str
    command: str
    recipes: list[str]
    """The first is that of the columns CUFUSE and STATIC, further ones have columns of their own."""
    repeat: int
    absent: dict[str, str] = field(default_factory=dict)
    """Column -> why it is nowhere."""
    notes: list[str] = field(default_factory=list)
    readers: dict[str, str] = field(default_factory=dict)
    """Model -> the way of reading that gave its floor."""
    cells: list[Cell] = field(default_factory=list)
    quantised: list[QuantisedCell] = field(default_factory=list)
    complete: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """All that is measured, in its order, and what it computes."""
        found = {}
        for name, text in COLUMNS.items():
            found[name] = text
            if name == STATIC:
                others = ((one, recipe) for recipe in self.recipes[1:] for one in (CUFUSE, STATIC))
                found |= {column_of(one, recipe): f"{one} under recipe {recipe!r}" for one, recipe in others}
        return found

    def to_json(self) -> dict[str, Any]:
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        fields |= {name: [cell.to_json() for cell in fields.pop(name)] for name in ("cells", "quantised")}
        return {"schema": SCHEMA, "recipe": self.recipes[0], "columns": self.columns} | fields

    def failures(self) -> list[str]:
        """Which columns and formats failed where, and why."""
        found: list[tuple[Cell | QuantisedCell, str, Measurement]] = []
        found += [(cell, name, one) for cell in self.cells for name, one in cell.columns.items()]
        found += [(cell, f"weights in {name}", one) for cell in self.quantised for name, one in cell.formats.items()]
        return [f"{cell.model}, {cell.tokens} tokens, {name}: {one.note}" for cell, name, one in found if one.failed]
