"""The shape comments are true; and the checker that says so can say no."""

import importlib.util
import itertools
import textwrap

import numpy as np
import pytest

from meta.shapes import check_shapes

# One line a run: (what it proves: modules and functions, sizes of the dimensions, what to run).
# A commented line of a listed module or function that no run executes fails, so list only what
# the run covers, and give every dimension a size of its own.
CASES = {}


@pytest.mark.parametrize("name", CASES)
def test_shape_comments_are_true(name):
    under_test, dims, run = CASES[name]
    found = check_shapes(under_test, dims, run)
    assert not found, "\n" + "\n".join(found)


DIMS = {"B": 5, "H": 4, "K": 3, "N": 2}
STEP = """
import numpy as np

def step(x, branch=True):
    y = np.ones((5, 16))                    # (B, 4H)  eq.2 the gates
    a, b, back, _ = np.ones((5, 3)), np.ones((5, N + 1)), abs, x        # (B, K), (B, N+1)
    scale, total = 2.0, x.sum()             # ()
    half = np.split(y, 2, 1)                # (B, 2*H), (B, 2H)
    low, high = np.split(x, 2, 1)           # ..., (B, H/2)
    z = np.stack(
        [x * t for t in range(3)],
        axis=1)                             # (B, K, H)
    w = np.ones((5, 7, 2))                  # (B, ..., N)
    u = {}
    u["a"] = x                              # (B, H)
    u["a"] += 1                             # (B, H)
    for t in range(2):
        v = np.ones((t, 5))[:0]             # (0, B)
    if branch:
        c = x[:, 0]                         # (B,)
    d = x  # (see the paper)

    def back(dy):
        dx = 2 * dy                         # (B, H)
        return dx                           # (B, H)

    return back(x)

N = 2
"""


@pytest.fixture
def module(tmp_path):
    """Imports source text as a module of its own."""
    numbers = itertools.count()

    def load(source):
        file = tmp_path / f"step{next(numbers)}.py"
        file.write_text(textwrap.dedent(source), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def check(m, *args):
    return check_shapes([m], DIMS, lambda: m.step(np.ones((5, 4)), *args))


def test_true_comments_pass(module):
    assert check(module(STEP)) == []


@pytest.mark.parametrize(("old", "new", "words"), [
    ("# (B, 4H)", "# (B, 5H)", "y is (5, 16), not (B, 5 * H)"),
    ("# (B, 4H)", "# (4H, B)", "y is"),
    ("# (B, K), (B, N+1)", "# (B, K), (B, N)", "b is"),
    ("# (B, K), (B, N+1)", "# (B, K)", "1 shapes for 2 arrays"),
    ("# (B, 2*H), (B, 2H)", "# (B, 2*H), (B, H)", "half[1] is"),
    ("# (B, K, H)", "# (B, H, K)", "z is"),
    ("# (B, ..., N)", "# (B, ..., K)", "w is"),
    ("# ()", "# (B,)", "total"),
    ("# (0, B)", "# (1, B)", "v is"),
    ("dx = 2 * dy                         # (B, H)", "dx = 2 * dy  # (B, K)", "dx is"),
    ("return dx                           # (B, H)", "return dx  # (B, K)", "result is"),
    ("# (see the paper)", "# (B, Q)", "unknown dimension Q"),
    ("for t in range(2):", "for t in range(2):  # (B, H)", "assigns nothing"),
])
def test_false_comments_are_caught(module, old, new, words):
    assert old in STEP
    found = check(module(STEP.replace(old, new)))
    assert len(found) == 1 and words in found[0], found
    line = next(k for k, text in enumerate(STEP.splitlines(), 1) if old in text)
    assert f":{line}: " in found[0]


def test_unexecuted_comment_is_caught(module):
    found = check(module(STEP), False)
    assert len(found) == 1 and "no run has executed" in found[0]


def test_a_line_that_raises_proves_nothing(module):
    m = module("""
        def step(x):
            try:
                y = x
                y = x @ x       # (B, H)
            except ValueError:
                pass
        """)
    assert "no run has executed" in check(m)[0]


def test_one_function_alone(module):
    m = module("""
        def f(x):
            y = x           # (B, H)
            return y

        def g(x):
            y = x           # (B, K)
            return y
        """)
    assert check_shapes([m.f], DIMS, lambda: m.f(np.ones((5, 4)))) == []
    assert "(B, K)" in check_shapes([m.g], DIMS, lambda: m.g(np.ones((5, 4))))[0]
