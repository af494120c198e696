"""Hypothesis profiles, and the marker ``gpu``: tests that carry it are skipped, with the reason, where no GPU can be used."""

import functools
import os
import warnings

import pytest
from hypothesis import settings

pytest_plugins = ["tests.commands_here", "tests.gpu_record", "tests.totals"]

for name, examples in {"cufuse-dev": 200, "cufuse-ci": 2000, "cufuse-nightly": 50000}.items():
    settings.register_profile(name, max_examples=examples, deadline=None)
# loaded by name in every case: where CI is set, Hypothesis has already taken its own profile (100 examples, always the same)
settings.load_profile(os.environ.get("CUFUSE_HYPOTHESIS_PROFILE", "cufuse-dev"))


@functools.cache
def why_no_gpu() -> str | None:
    """Why CuPy cannot compute here, or None where it can. Imports CuPy, so only where a test asks for it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cupy

            count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # ImportError, a missing library, a missing driver: each has a class of its own
        return f"no GPU: {type(error).__name__}: {error}"
    return None if count else "no GPU: CuPy counts 0 devices"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and (reason := why_no_gpu()) is not None:
        pytest.skip(reason)
