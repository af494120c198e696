"""Arrays of PyTorch and JAX through DLPack: the same memory, the same bits."""

from typing import Any

import numpy as np
import pytest

import cufuse
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import demand_same, to_gpu

pytestmark = gpu_support.MARKS


def operands() -> tuple[Any, Any, Any]:
    """x, a norm weight, and the norm by the emulation."""
    x, weight = inputs.heavy((5, 1024), 1), inputs.norm_weight(1024, 2, 96.5)
    return x, weight, cufuse.rms_norm(x, weight)


def test_pytorch() -> None:
    torch = pytest.importorskip("torch")
    x, weight, expected = operands()
    given = [torch.from_numpy(one.view(np.int16)).cuda().view(torch.bfloat16) for one in (x, weight)]
    taken = [gpu_support.cupy().from_dlpack(one) for one in given]
    assert [one.data.ptr for one in taken] == [one.data_ptr() for one in given]
    normalised = cufuse.rms_norm(*taken)
    demand_same("exchange, PyTorch", normalised, expected, "norm of PyTorch's arrays")
    back = torch.from_dlpack(normalised)
    assert back.data_ptr() == normalised.data.ptr
    assert back.dtype == torch.bfloat16
    demand_same("exchange, PyTorch", gpu_support.cupy().from_dlpack(back), expected, "and back")


def test_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    # by default JAX takes three quarters of the GPU's memory when it starts
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    x, weight, expected = operands()
    given = [jax.device_put(one, jax.devices("gpu")[0]) for one in (x, weight)]
    taken = [gpu_support.cupy().from_dlpack(one) for one in given]
    assert [one.data.ptr for one in taken] == [one.unsafe_buffer_pointer() for one in given]
    normalised = cufuse.rms_norm(*taken)
    demand_same("exchange, JAX", normalised, expected, "norm of JAX's arrays")
    demand_same("exchange, JAX", to_gpu(np.asarray(jax.dlpack.from_dlpack(normalised))), expected, "and back")
