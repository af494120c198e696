"""A made-up Qwen3 in memory, so that the whole model can be tried without a download."""

from dataclasses import replace
from types import MappingProxyType
from typing import Final

import ml_dtypes
import numpy as np

from cufuse._model_config import QWEN3, ModelConfig
from cufuse._synthetic_weights import SMALL, SyntheticTensor, checkpoint_tensors
from cufuse.qwen3.decoder import Progress
from cufuse.qwen3.model import Qwen3, available_memory
from cufuse.qwen3.weights import assemble

_SMALL_CONFIG = ModelConfig(
    model_type="qwen3", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=128, num_hidden_layers=4,
    rms_norm_eps=1e-6, rope_theta=1_000_000.0, vocab_size=512, intermediate_size=768, max_position_embeddings=40_960, name=SMALL,
)  # fmt: skip

MODELS: Final = MappingProxyType({SMALL: _SMALL_CONFIG, **QWEN3})
"""Name -> numbers: a model of 4 layers that answers within seconds, and the dense Qwen3 models."""


def synthetic(model: str = SMALL, seed: int = 0, *, layers: int | None = None, progress: Progress | None = None) -> Qwen3:
    """A Qwen3 with random weights and the documented K-norm weights (``cufuse.synthetic`` says which, and what is invented).

    Parameters
    ----------
    model : a key of MODELS. "qwen3-small" has hidden size 256, 4 layers, 4 query and 2 key heads of 128, MLP 768, a vocabulary of
        512, and larger weights than the others, so that its text does not merely repeat.
    seed : an integer >= 0; the weights of the other models are bit for bit those that ``write_synthetic`` writes.
    layers : only so many layers; all where None.
    progress : called as ``progress(what, fraction)``: the large models take a while.

    ValueError for unknown names and values, MemoryError where the weights do not fit into the free memory.
    """
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; needed is one of {', '.join(MODELS)}")
    config = MODELS[model]
    for name, value, least, most in (("seed", seed, 0, None), ("layers", layers, 1, config.num_hidden_layers)):
        if value is None and name == "layers":
            continue
        wrong = isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least
        if wrong or (most is not None and value is not None and value > most):
            raise ValueError(f"{name} is {value!r}; needed is an integer from {least} on" + (f" to {most}" if most else ""))
    if layers is not None:
        config = replace(config, num_hidden_layers=int(layers))
    tensors = list(checkpoint_tensors(config, model, int(seed), True, False))
    total = sum(tensor.size for tensor in tensors)
    free = available_memory()
    if free is not None and total > free:
        raise MemoryError(f"{model} has {total / 1e9:.1f} GB of weights and {free / 1e9:.1f} GB are free; give fewer layers")
    found, done = {}, 0
    for tensor in tensors:
        found[tensor.name] = _values(tensor)
        done += tensor.size
        if progress is not None:
            progress(f"weights, {tensor.name}", done / total)
    about = {"source": f"synthetic {model}, seed {seed}", "synthetic": True}
    return Qwen3(assemble(config, lambda name: found[name if name in found else f"model.{name}"], about))


def _values(tensor: SyntheticTensor) -> np.ndarray:
    bits = np.empty(tensor.size // 2, np.uint16)
    done = 0
    for block in tensor.blocks():
        bits[done : done + block.size] = block
        done += block.size
    return np.asarray(bits.view(ml_dtypes.bfloat16)).reshape(tensor.shape)

