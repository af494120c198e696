"""``rms_norm_qkv`` on CuPy arrays: the chain of launches where its kernels can do it, else one operation after the other.

A call like an earlier one, with the same layouts, types and options, is not checked again; with the same addresses its
arguments are not packed again either.
"""

import contextlib
from typing import Any, Final

from cufuse import _gpu_heads, _gpu_qkv_steps, _layout, _repeat, launch
from cufuse._gpu_heads import Unsuited
from cufuse._gpu_qkv_chain import Chain
from cufuse.compiler import Kernel
from cufuse.qkv import Heads
from cufuse.recipe import Recipe

KERNELS: Final[tuple[Kernel, ...]] = ()
"""None of its own."""

_MOST_CALLS: Final = 1024
_MOST_ADDRESSES: Final = 4096


class Call:
    """All that layouts, types and options of a call decide."""

    __slots__ = ("_chain", "_composed", "_known", "_names", "_outs", "_overlap", "device", "options", "results")

    def __init__(
        self, arrays: dict[str, Any], outs: dict[str, Any], shape: Heads, eps: float, recipe: Recipe, k_slices: int | None,
        static: bool, options: Any,
    ) -> None:  # fmt: skip
        """arrays: inputs by their names, checked, absent ones None; outs: results by theirs; options: kept alive."""
        given = {name: array for name, array in arrays.items() if array is not None}
        self.device = launch.device_of(**given, **outs)
        self.options = options
        self.results = [(array.shape, array.dtype) for array in outs.values()]
        self._names = (*arrays, *outs)
        self._outs = tuple(outs)
        self._overlap = _layout.Overlap(outs, given)
        self._known: dict[tuple[int, ...], list[tuple[Any, bytes]]] = {}
        self._composed = (shape, eps, recipe, k_slices)
        self._chain: Chain | None = None
        with contextlib.suppress(Unsuited), launch.on_device(self.device):
            self._chain = Chain(arrays | outs, shape, eps, recipe, k_slices, self.device, static)

    def run(self, arrays: list[Any], pointers: list[int]) -> None:
        """Launch with these arrays and their addresses, both in the order of the inputs' and then the outputs' names."""
        if launch.current_device() != self.device:
            with launch.on_device(self.device):
                self._run(arrays, pointers)
        else:
            self._run(arrays, pointers)

    def _run(self, arrays: list[Any], pointers: list[int]) -> None:
        if self._chain is None:
            self._check(arrays, pointers)
            self._compose(dict(zip(self._names, arrays, strict=True)))
            return
        stream = launch.current_stream()
        launches = self._known.get((stream, *pointers))
        if launches is None:
            self._check(arrays, pointers)
            launches = self._bind(pointers, stream)
        launch.one_by_one(launches)

    def _bind(self, pointers: list[int], stream: int) -> list[tuple[Any, bytes]]:
        """The launches with these addresses on a stream. The workspace's address stays good when it has been outgrown."""
        assert self._chain is not None
        workspace = launch.workspace(self.device, self._chain.workspace_bytes)
        chain = self._chain.launches(dict(zip(self._names, pointers, strict=True)), workspace)
        if len(self._known) >= _MOST_ADDRESSES:
            self._known.clear()
        found = [(_repeat.bound(prepared, arguments, stream), arguments) for prepared, arguments in chain]
        self._known[stream, *pointers] = found
        return found

    def _check(self, arrays: list[Any], pointers: list[int]) -> None:
        count = len(arrays) - len(self._outs)
        inputs = [pointer for pointer, array in zip(pointers[:count], arrays[:count], strict=True) if array is not None]
        self._overlap.check([*pointers[count:], *inputs])

    def _compose(self, arrays: dict[str, Any]) -> None:
        inputs = {name: array for name, array in arrays.items() if name not in self._outs}
        weights = tuple(array for name, array in inputs.items() if name.startswith("qkv_weight"))
        results = [arrays[name] for name in self._outs]
        slots = inputs.pop("cache_slots")
        if slots is None:
            _gpu_qkv_steps.rms_norm_qkv(inputs, weights, *self._composed, tuple(results))
            return
        shape = (*inputs["x"].shape[:-1], *results[1].shape[1:])
        caches, results[1:3] = results[1:3], [launch.temporary(shape, results[1].dtype, f"{name} of slots") for name in "kv"]
        _gpu_qkv_steps.rms_norm_qkv(inputs, weights, *self._composed, tuple(results))
        _scatter(results[1:3], caches, slots, self.device)


def _scatter(values: list[Any], caches: list[Any], slots: Any, device: int) -> None:
    """Keys and values [..., H, D] to the slots of their caches: the heads' kernel without anything to compute."""
    *leading, _, dimensions = values[0].shape
    no_query = _gpu_heads.dense((*leading, 0, dimensions), values[0].itemsize)
    block = _gpu_heads.Block((no_query, *values), (no_query, *caches), None, None, None, None, slots, move_v=True)
    pointers = [0, *(one.data.ptr for one in values), 0, *(one.data.ptr for one in caches), 0, 0, 0, 0, slots.data.ptr]
    alignment = 0
    for pointer in pointers[:6]:
        alignment |= pointer
    ends = _gpu_heads.Ends(None, None, values[0].itemsize == 4)
    try:
        plan = _gpu_heads.Plan(block, ends, 0.0, device, alignment & 15, weights_ready=False, tables_ready=False)
    except Unsuited as error:
        raise ValueError(f"cache_slots cannot be served ({error}); leave it out and copy k and v to their places") from error
    launch.one_by_one(plan.launches(tuple(pointers)))


_calls: dict[Any, Call] = {}


def again(arrays: tuple[Any, ...], outs: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The results of a call like an earlier one; None for a call of a new kind, which is to be checked.

    arrays: inputs in the order that ``rms_norm_qkv`` below got them, None where absent; outs likewise, None for a new array.
    """
    import cupy

    ndarray = cupy.ndarray
    layouts: list[Any] = []
    pointers: list[int] = []
    add, point = layouts.append, pointers.append
    for array in (*arrays, *outs):
        if array is None:
            add(None)
            point(0)
        elif array.__class__ is ndarray:
            memory = array.data
            pointer = memory.ptr
            point(pointer)
            add((array.shape, array.strides, array.dtype, memory.device_id, pointer & 15))
        else:
            return None
    try:
        call = _calls.get((*layouts, *options))
    except TypeError:  # an option that no call can have
        return None
    if call is None:
        return None
    results = outs
    if 0 in pointers[len(arrays) :]:
        with launch.on_device(call.device):
            results = tuple([cupy.empty(*made) if one is None else one for one, made in zip(outs, call.results, strict=True)])
        pointers[len(arrays) :] = [one.data.ptr for one in results]
    call.run([*arrays, *results], pointers)
    return results


def rms_norm_qkv(
    arrays: dict[str, Any],
    outs: tuple[Any, ...],
    results: dict[str, Any],
    shape: Heads,
    eps: float,
    recipe: Recipe,
    k_slices: int | None,
    static: bool,
    options: tuple[Any, ...],
) -> None:
    """The block on checked arrays, into ``results``; see ``cufuse.rms_norm_qkv``. outs: the results as the caller gave them."""
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()
    call = Call(arrays, results, shape, eps, recipe, k_slices, static, (options, recipe))
    given = [*arrays.values(), *outs]
    layouts = [
        None if one is None else (one.shape, one.strides, one.dtype, one.data.device_id, one.data.ptr & 15) for one in given
    ]
    everything = [*arrays.values(), *results.values()]
    call.run(everything, [0 if one is None else one.data.ptr for one in everything])
    _calls[*layouts, *options] = call
