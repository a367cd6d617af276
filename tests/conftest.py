"""Set before anything draws or multiplies: no windows, and the project's own thread settings."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

import common.backend  # noqa: F401  (reads its environment before NumPy is imported)


@pytest.fixture
def rng():
    import numpy as np
    return np.random.default_rng(0)
