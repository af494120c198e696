"""Opens hostile checkpoints in a process of its own, with everything watched: time, memory, files opened.

``python -m tests.hostile_worker handmade FOLDER`` and ``... mutations FOLDER FIRST LAST`` print one JSON object.
"""

import builtins
import contextlib
import json
import os
import resource
import signal
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

import cufuse.checkpoint
from cufuse.checkpoint import CheckpointError
from tests.checkpoint_files import CONFIG, FIELDS, make_tensors, write_folder
from tests.hostile_files import HANDMADE, SECRET, mutated

SECONDS, MEMORY = 1.0, 100_000_000
"""What opening and reading one checkpoint may take: of a processor's time, which other processes do not lengthen, and bytes."""

IDS = (0, 3, 49)


class TooLongError(BaseException):
    """The alarm rang: no ``except Exception`` may swallow it."""


_opened: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir", "os.chdir", "exec", "os.system", "subprocess.Popen"):
        _opened.append(f"{event} {arguments[0]}" if event != "open" else str(arguments[0]))


def _ring(*_: object) -> None:
    raise TooLongError


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[list[str]]:
    """Files opened inside; an alarm behind ``seconds``."""
    global _opened
    _opened = opened = []
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield opened
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _opened = None


def read(path: Path) -> dict[str, np.ndarray]:
    """Everything that is ever read of a checkpoint: layer 0 and some embeddings, where there are any."""
    with cufuse.checkpoint.open_checkpoint(path) as checkpoint:
        layer = checkpoint.layer(0)
        found = {f"model.layers.0.{name}.weight": getattr(layer, field) for field, name in FIELDS.items()}
        if "model.embed_tokens.weight" in checkpoint.tensor_names:
            found["model.embed_tokens.weight"] = checkpoint.embedding(IDS)
    return found


def attempt(path: Path, *, seconds: float = 10 * SECONDS, traced: bool = True) -> dict[str, Any]:
    """What came of reading ``path``: message or arrays, seconds, bytes, and what was opened outside its folder."""
    home = os.path.realpath(path if path.is_dir() else path.parent)
    arrays: dict[str, np.ndarray] | None = None
    message = ""
    if traced:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    start = time.process_time()
    try:
        with _watched(seconds) as opened:
            arrays = read(path)
    except CheckpointError as error:
        message = str(error)
    except TooLongError:
        message = "HANG"
    except BaseException as error:  # whatever it is, it is not what is documented
        message = f"UNDOCUMENTED {type(error).__name__}: {error}"
    spent = time.process_time() - start
    # what NumPy asked for in vain counts as traced, too
    peak = 0 if "does not fit into memory" in message else tracemalloc.get_traced_memory()[1] - before
    if traced:
        tracemalloc.stop()
    outside = [one for one in opened if one.startswith("os.ch") or not _is_inside(one, home)]
    return {"message": message, "arrays": arrays, "seconds": spent, "bytes": peak, "outside": outside}


def _is_inside(opened: str, home: str) -> bool:
    path = os.path.realpath(opened.removeprefix("os.scandir ").removeprefix("os.listdir "))
    return path == home or path.startswith(home + os.sep)


def wrong(path: Path, arrays: dict[str, np.ndarray], file: Path) -> str:
    """In what the arrays differ from those that the safetensors library reads from ``file``; empty where in nothing."""
    try:
        with safetensors.safe_open(file, "numpy") as witness:
            for name, array in arrays.items():
                expected = witness.get_tensor(name)
                if name == "model.embed_tokens.weight":
                    expected = expected[list(IDS)]
                if expected.dtype == np.float32:  # taken where nothing has to be rounded
                    expected = (expected.view(np.uint32) >> 16).astype(np.uint16)
                if array.shape != expected.shape or array.tobytes() != expected.tobytes():
                    return f"{path}: {name} differs"
    except Exception as error:
        return f"{path}: read, but safetensors refuses it: {type(error).__name__}: {error}"
    return ""


def guard(extra: int) -> None:
    """From here on the process may not grow by more than ``extra`` bytes of address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def handmade(folder: Path) -> dict[str, Any]:
    """Every handmade checkpoint, twice, each time in a forked process: timed below a limit of address space, and traced."""
    secret = make_tensors(layers=1)
    found: dict[str, Any] = {}
    for number, (name, (build, _)) in enumerate(HANDMADE.items()):
        place = folder / str(number)
        place.mkdir()
        write_folder(place, secret, None, SECRET)
        path = build(place)
        timed = _forked(lambda path=path: attempt(path, traced=False), extra=2 * MEMORY)
        for _ in range(2):  # other processes slow this one down through caches and cores that they share: the best of three
            if timed["seconds"] > SECONDS / 2:
                timed = min(timed, _forked(lambda path=path: attempt(path, traced=False)), key=lambda one: one["seconds"])
        traced = _forked(lambda path=path: attempt(path), extra=5 * MEMORY)  # what the tracing takes, too
        same = timed["message"] == traced["message"]
        found[name] = traced | {"seconds": timed["seconds"], "message": timed["message"], "same": same}
    return found


def _forked(job: Callable[[], dict[str, Any]], extra: int | None = None) -> dict[str, Any]:
    """The job's answer from a child, its arrays replaced by whether they are right."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            if extra is not None:
                guard(extra)
            answer = job()
            arrays = answer.pop("arrays")
            if arrays is not None:
                expected = make_tensors(layers=1)
                expected["model.embed_tokens.weight"] = expected["model.embed_tokens.weight"][list(IDS)]
                found, known = ({name: one.tobytes() for name, one in group.items()} for group in (arrays, expected))
                answer["message"] = "RIGHT" if found == known else "WRONG ARRAYS"
            with os.fdopen(writing, "w") as file:
                json.dump(answer, file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else {"message": "DIED", "seconds": 0.0, "bytes": 0, "outside": []}


def mutations(folder: Path, first: int, last: int) -> dict[str, Any]:
    """Mutations first to last - 1 of one valid file, half of them with a config.json beside it."""
    write_folder(folder, make_tensors(layers=1), None, SECRET)
    homes = [folder / "with config", folder / "without"]
    write_folder(homes[0], make_tensors(layers=1), CONFIG | {"num_hidden_layers": 1})
    write_folder(homes[1], make_tensors(layers=1), None)
    whole = (homes[0] / "model.safetensors").read_bytes()
    for home in homes:  # so that everything is imported before anybody listens
        assert not attempt(home if home is homes[0] else home / "model.safetensors")["message"]
    guard(2 * MEMORY)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    slowest, largest = 0.0, 0
    for seed in range(first, last):
        kind, content = mutated(whole, seed)
        home = homes[seed % 2]
        file = home / "model.safetensors"
        file.write_bytes(content)
        done = attempt(home if seed % 2 == 0 else file)
        slowest, largest = max(slowest, done["seconds"]), max(largest, done["bytes"])
        problem = ""
        if done["arrays"] is not None:
            counts[f"{kind}: read"] += 1
            problem = wrong(file, done["arrays"], file)
        else:
            counts[f"{kind}: refused"] += 1
            if done["message"].split()[0] in ("HANG", "UNDOCUMENTED") or not done["message"].isprintable():
                problem = done["message"]
        if done["outside"]:
            problem += f" opened {done['outside'][:3]}"
        if done["seconds"] > SECONDS or done["bytes"] > MEMORY:
            problem += f" took {done['seconds']:.3f} s and {done['bytes']} bytes"
        if problem:
            failures.append(f"seed {seed}, {kind}: {problem}")
    return {"counts": counts, "failures": failures, "seconds": slowest, "bytes": largest}


def main() -> None:
    """See the head of this module."""
    signal.signal(signal.SIGALRM, _ring)
    sys.addaudithook(_hear)
    what, folder, *numbers = sys.argv[1:]
    found = handmade(Path(folder)) if what == "handmade" else mutations(Path(folder), *map(int, numbers))
    builtins.print(json.dumps(found))


if __name__ == "__main__":
    main()
