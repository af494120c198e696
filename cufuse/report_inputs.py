"""Inputs of a report: hidden states from a file, or made up from a seed, and random token ids."""

from pathlib import Path

import ml_dtypes
import numpy as np

from cufuse._safetensors_file import SafetensorsFile, failure


def hidden_states_from_file(path: Path, name: str, hidden_size: int) -> np.ndarray:
    """The tensor ``name`` [T, hidden_size] of a safetensors file, as bfloat16; for "hidden_states" the only tensor will do,
    whatever its name.

    Raises CheckpointError for a damaged file, a missing tensor, another shape, or values that are not bfloat16.
    """
    file = SafetensorsFile(path)
    if name not in file.tensors:
        if len(file.tensors) != 1 or name != "hidden_states":
            raise failure(path, "is not in the file", "save the layer's input under this name", tensor=name)
        name = next(iter(file.tensors))
    shape = file.tensors[name].shape
    if len(shape) != 2 or shape[1] != hidden_size or shape[0] == 0:
        raise failure(path, f"has shape {list(shape)}, needed is [tokens, {hidden_size}]", "give the layer's input", tensor=name)
    return np.asarray(file.read_bfloat16(name))


def made_up_hidden_states(tokens: int, hidden_size: int, seed: int) -> np.ndarray:
    """[tokens, hidden_size] bfloat16: a bell curve of standard deviation 1 with a few columns 16 times as large, as a residual
    stream has them. Only the raw stream of PCG64 is used, so that a seed gives the same values with every NumPy."""
    count = tokens * hidden_size
    raw = np.random.PCG64(seed).random_raw(count)
    total = np.zeros(count, np.int64)
    for place in range(4):
        total += ((raw >> np.uint64(16 * place)) & np.uint64(0xFFFF)).astype(np.int64)
    values = ((total - 131070).astype(np.float32) / np.float32(37837)).reshape(tokens, hidden_size)
    values[:, seed % 97 :: 251] *= 16
    return values.astype(ml_dtypes.bfloat16)


def random_token_ids(tokens: int, vocabulary: int, seed: int) -> np.ndarray:
    """[tokens] ids below the vocabulary's size (the whole of it where unknown: zeros)."""
    raw = np.random.PCG64(seed + 1).random_raw(tokens)
    return (raw % np.uint64(max(vocabulary, 1))).astype(np.int64)
