"""Quantised weights for tests."""

import numpy as np

from cufuse.quantised import FORMATS, QuantisedWeight


def random_weight(form: str, rows: int, columns: int, seed: int = 0) -> QuantisedWeight:
    """Random bytes, but scales of moderate size, of both signs, with some zeros and subnormals."""
    kind = FORMATS[form]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // kind.values, kind.size), np.uint8)
    places = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}[form]
    for place in places:
        scales = (rng.standard_normal(len(blocks)) * 0.01).astype("<f2")
        scales[rng.random(len(blocks)) < 0.03] = 0
        scales[rng.random(len(blocks)) < 0.03] = np.float16(3e-7)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return QuantisedWeight(blocks.reshape(rows, -1), kind, (rows, columns))
