"""Each `back` of the project mirrors its forward; and the checker that says so can say no."""

import textwrap
from pathlib import Path

import pytest

from meta.mirror import complaints

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("common/*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_back_mirrors_its_forward(file):
    found = complaints(file.read_text(encoding="utf-8"), str(file.relative_to(ROOT)))
    assert not found, "\n" + "\n".join(found)


STEP = """
def step(p, x, h, sample):
    a, back_a = encode(p, x)                # (B, H)  eq.1
    backs = []
    for t in range(3):                      # eq.2
        h, back_h = cell(p, a, h)           # (B, H)  eq.2
        z, back_z = head(p, h)              # (B, K)  eq.3
        backs.append((back_h, back_z))
    if sample:
        z, back_s = gaussian(z)             # (B, K)  eq.4
    w, _ = frozen(z)                        # eq.9
    y = w * z                               # (B, K)  eq.5

    def back(dy, g):
        dz = w * dy                         # eq.5
        if sample:
            dz = back_s(dz)                 # eq.4
        dh = 0
        for back_h, back_z in reversed(backs):
            dh = dh + back_z(dz, g)         # eq.3
            da, dh = back_h(dh, g)          # eq.2
        return back_a(da, g)                # eq.1

    return y, back
"""

NESTED = """
def f(p, xs):
    backs_t = []
    for x in xs:
        backs_k = []
        for k in range(3):
            x, back_x = g(x) if k else h(x)
            backs_k.append(back_x)
        ys, backs = zip(*[g(x) for _ in xs])
        u, back = last(ys)
        backs_t.append((back, backs, backs_k))

    def back(dy, g):
        for pull, backs, backs_k in backs_t[::-1]:
            du = pull(dy)
            dx = [b(d) for d, b in reversed(list(zip(du, backs, strict=True)))]
            for t, b in reversed(list(enumerate(backs_k))):
                dx = b(dx)
        return dx

    return u, back
"""

EITHER = """
def f(x, gru, peek):
    x, back_in = a(x)
    if gru:
        y, back_y = g(x)
    else:
        y, back_y = h(x)
    y, back_peek = i(y) if peek else (y, None)
    (u, back_u), (v, back_v) = j(y), k(y)

    def back(du, dv):
        dy = back_v(dv) + back_u(du)
        dy = back_peek(dy) if peek else dy
        if peek:
            dx = back_y(dy)
        else:
            dx = back_y(dy * 0)
        return back_in(dx)

    return u, v, back
"""

GOOD = {"step": STEP, "nested": NESTED, "either": EITHER,
        "no back": "def f(x):\n    y, back_y = g(x)\n    return y, back_y\n",
        "asks for it": """
def f(x, c):
    back_y = None
    if c:
        x, back_y = g(x)

    def back(dx):
        if back_y is not None:
            dx = back_y(dx)
        return dx

    return x, back
"""}

A_THEN_B = """
def f(x):
    x, back_a = a(x)    # eq.1
    x, back_b = b(x)    # eq.2

    def back(dx):
        dx = back_b(dx)     # eq.2
        dx = back_a(dx)     # eq.1
        return dx

    return x, back
"""

BAD = {                         # name: (source, what to replace, by what, what the complaint says)
    "swapped": (A_THEN_B, "dx = back_b(dx)     # eq.2\n        dx = back_a(dx)     # eq.1",
                "dx = back_a(dx)     # eq.1\n        dx = back_b(dx)     # eq.2", "is due here"),
    "swapped in one line": (EITHER, "back_in(dx)", "back_in(back_y(dx))", "is due here"),
    "missing": (A_THEN_B, "dx = back_b(dx)     # eq.2", "pass     # eq.2", "back_b"),
    "missing at the end": (A_THEN_B, "dx = back_a(dx)     # eq.1", "pass  # eq.1", "not the end"),
    "twice": (A_THEN_B, "return dx\n", "return back_a(dx)\n", "the end is due"),
    "wrong tag": (A_THEN_B, "back_a(dx)     # eq.1", "back_a(dx)     # eq.2", "eq.1"),
    "no tag": (A_THEN_B, "back_a(dx)     # eq.1", "back_a(dx)", "eq.1"),
    "tag only in back": (A_THEN_B, "return dx\n", "return dx  # eq.7\n", "missing in the forward"),
    "tags exchanged": (A_THEN_B, "back_b(dx)     # eq.2\n        dx = back_a(dx)     # eq.1",
                       "back_b(dx)     # eq.1\n        dx = back_a(dx)     # eq.2", "eq."),
    "plain lines swapped": ("""
def f(x):
    u = 2 * x           # eq.1
    v = u * u           # eq.2

    def back(dv):
        du = dv * 2         # eq.1
        dx = 2 * u * du     # eq.2
        return dx

    return v, back
""", "", "", "comes before"),
    "statement after back": (A_THEN_B, "    return x, back", "    x = x + 1\n    return x, back",
                             "only `return"),
    "back not returned": (A_THEN_B, "return x, back", "return back, x", "must end with back"),
    "back in a loop": ("""
def f(xs):
    for x in xs:
        y = x * x

        def back(dy):
            return 2 * x * dy

        return y, back
""", "", "", "inside a loop"),
    "list walked forwards": (STEP, "reversed(backs)", "backs", "reversed"),
    "order inside a loop": (STEP, "for back_h, back_z in", "for back_z, back_h in", "is due here"),
    "not kept": (STEP, "(back_h, back_z)", "back_h", "not kept"),
    "not kept under an if": ("""
def f(xs, c):
    for x in xs:
        if c:
            x, back_x = g(x)

    def back(dx):
        return dx

    return x, back
""", "", "", "not kept"),
    "the last of the loop": (STEP, "for back_h, back_z in", "for _, back_z in", "last one"),
    "outside its loop": (STEP, "    da, dh = back_h", "da, dh = back_h", "last one"),
    "lost": (A_THEN_B, "back_b", "back_a", "is lost"),
    "other condition": (STEP, "    if sample:\n            dz", "    if train:\n            dz",
                        "asks `sample`"),
    "no condition": (STEP, "        if sample:\n            dz = back_s(dz)",
                     "        dz = back_s(dz)", "is due here"),
    "other pullback in one arm": (EITHER, "back_y(dy * 0)", "back_in(dy * 0)", "is due here"),
    "wrong arm": (EITHER, "back_peek(dy) if peek else dy", "dy if peek else back_peek(dy)",
                  "is due here"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_source_passes(name):
    assert complaints(textwrap.dedent(GOOD[name])) == []


@pytest.mark.parametrize("name", BAD)
def test_bad_source_is_caught(name):
    source, old, new, words = BAD[name]
    assert old in source
    found = complaints(source.replace(old, new) if old else source, "x.py")
    assert found, source
    assert any(words in line for line in found), found
    assert all(line.startswith("x.py:") for line in found)
