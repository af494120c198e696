"""What ``cufuse bench`` measured: columns, cells, ratios, JSON (the schema is in ``cufuse.bench``)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final

SCHEMA: Final = 1

CUFUSE, STATIC, GEMM, COMPILE, LIGER = "cufuse", "cufuse_static", "cublas_gemm", "torch_compile", "liger"
F_RMS_NORM, EAGER, SEPARATE = "f_rms_norm", "eager", "eager_separate"

COLUMNS: Final[dict[str, str]] = {
    GEMM: "cuBLAS's projection alone: no norm, no rotation",
    CUFUSE: "cufuse.rms_norm_qkv, packed weight, Q/K norm and rotation included",
    STATIC: "the same with static_weights=True: the weights may be read before the kernel in front has ended",
    COMPILE: "torch.compile of eager, dynamic=False",
    LIGER: "eager with Liger-Kernel's RMSNorm (llama mode) in the place of all three norms",
    F_RMS_NORM: "eager with torch.nn.functional.rms_norm in their place",
    EAGER: "Hugging Face's Qwen3RMSNorm, F.linear of the packed weight, apply_rotary_pos_emb",
    SEPARATE: "the same with q, k and v projected apart, as Hugging Face's attention does",
}
"""What is measured, in the order of the tables. cuBLAS and cufuse are neighbours."""

RATIOS: Final = (GEMM, COMPILE, "floor")
"""What the time of cufuse is divided by."""

MEASURED_AGAINST_NOTHING: Final = (GEMM,)
"""Columns that do not give q, k and v."""


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
        return {**dataclasses.asdict(self), "ratios": ratios}


@dataclass
class Results:
    """A whole run, or as much of it as is done."""

    device: dict[str, Any]
    versions: dict[str, str]
    date: str
    command: str
    recipe: str
    repeat: int
    absent: dict[str, str] = field(default_factory=dict)
    """Column -> why it is nowhere."""
    notes: list[str] = field(default_factory=list)
    readers: dict[str, str] = field(default_factory=dict)
    """Model -> the way of reading that gave its floor."""
    cells: list[Cell] = field(default_factory=list)
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "cells"}
        return {"schema": SCHEMA, **fields, "columns": COLUMNS, "cells": [cell.to_json() for cell in self.cells]}

    def failures(self) -> list[str]:
        """Which columns failed where, and why."""
        found = [(cell, name, one) for cell in self.cells for name, one in cell.columns.items() if one.failed]
        return [f"{cell.model}, {cell.tokens} tokens, {name}: {one.note}" for cell, name, one in found]
