"""Calls on CuPy arrays that were checked and made twice: launched again, without another check.

A call is known by the stream, by each array's address, device, shape, strides and dtype, and by its options. All that the
checks look at is in there, overlaps too, so what passed once passes again; and its launches differ in nothing but the
contents of the arrays. Only calls whose launches are all there is to do are remembered: none that copies before or after.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from cufuse import launch

Call = tuple[tuple[Any, ...], Any]
"""What a call is known by, and what has to live as long as that stands for it."""

_MOST_CALLS: Final = 4096  # some 2 KB each
_FIRST_DEVICE: Final = 3  # where a call has its first array's device
_met: set[int] = set()  # hashes of calls made at least once
_calls: dict[Any, tuple[list[tuple[Any, bytes]], Any]] = {}


def described(operation: str, arrays: tuple[Any, ...], recipe: Any, *options: Any) -> Call:
    """The call of an operation, for ``again`` and ``remember``. arrays: all CuPy's (``_arrays.loaded_kernels``), results too.

    recipe, options : as the caller gave them, checked or not.
    """
    # a recipe by its identity, for to hash a dataclass takes longer than a launch; classes, for 1 == 1.0 == True
    key = [operation, recipe if recipe.__class__ is str else id(recipe)]
    for array in arrays:
        memory = array.data
        key += (memory.ptr, memory.device_id, array.shape, array.strides, array.dtype)
    for option in options:
        key += (option.__class__, option)
    return tuple(key), recipe


def again(call: Call) -> bool:
    """Make the call on the current stream if it is remembered there; False where it is not."""
    device = call[0][_FIRST_DEVICE]
    if launch.current_device() != device:
        with launch.on_device(device):
            return _launched(call)
    return _launched(call)


def _launched(call: Call) -> bool:
    try:
        found = _calls.get((launch.current_stream(), call[0]))
    except TypeError:  # an option that cannot be hashed, which no call can have
        return False
    if found is None:
        return False
    launches = found[0]
    if len(launches) == 1:  # shares no workspace
        run, arguments = launches[0]
        run(arguments)
    else:
        launch.one_by_one(launches)
    return True


def remember(call: Call, launches: Sequence[tuple[Any, bytes]]) -> None:
    """What the call has launched, prepared kernels and arguments, on the current device and stream; from its second time on."""
    stream = launch.current_stream()
    known = (stream, call[0])
    mark = hash(known)
    if mark not in _met:  # an output that moves on with each call never comes again: nothing is prepared for it
        if len(_met) >= _MOST_CALLS:
            _met.clear()
        _met.add(mark)
        return
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()
    _calls[known] = [(bound(prepared, arguments, stream), arguments) for prepared, arguments in launches], call[1]


def bound(prepared: Any, arguments: bytes, stream: int) -> Callable[[bytes], None]:
    """What launches as ``prepared`` does, but always on this stream with these arguments."""
    launch_again = prepared.bound(arguments, stream)

    def run(arguments: bytes) -> None:
        if launch_again():
            prepared(arguments)  # says what is wrong, or brings the thread its context

    return run
