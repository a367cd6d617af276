"""Are the shape comments true? A run is traced, and every commented line is held to its word.

    mean, std, back = head(p, h)        # (B, K), (B, K)  eq.3

A comment gives one shape for each array that its line assigns (or returns), in order; callables,
plain numbers, None and `_` need none, `...` as a shape says nothing about its array, `...` inside
a shape stands for any further axes. Dimensions are integers, names, and + - * / of them; `4H` is
4 * H. A comment that no run has executed is a complaint too, so none escapes.
"""

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
from typing import NamedTuple

import numpy as np

SHAPE = r"(?:\.\.\.|\([\w\s.+*/,-]*\))"
SHAPES = re.compile(rf"#\s*({SHAPE}(?:\s*,\s*{SHAPE})*)")
OPERATIONS = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b,
              ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a // b}


class Claim(NamedTuple):
    file: str
    line: int                   # of the comment
    lines: range                # of the statement
    targets: tuple              # (source text, code) of each assigned target; empty for return
    shapes: tuple               # each a tuple of expressions, or None for `...`

    def __str__(self):
        return f"{self.file}:{self.line}"


def check_shapes(under_test, dims, run):
    """Trace run() and return all complaints about the comments in `under_test`.

    `under_test` lists modules and functions (of a function only its own lines are read), `dims`
    gives names of dimensions their sizes: make these different, or (B, H) proves nothing.
    """
    claims, found = [], []
    for thing in under_test:
        more, errors = read_claims(thing, dims)
        claims += more
        found += errors
    proven = trace(claims, dims, found, run)
    found += [f"{c}: no run has executed this comment" for c in claims if c not in proven]
    return sorted(set(found))


def read_claims(thing, dims):
    """The claims in the source of a module or function, and what cannot be understood there."""
    lines, first = inspect.getsourcelines(thing)        # a module's first line is called 0
    file, before = inspect.getsourcefile(thing), max(first, 1) - 1
    source = textwrap.dedent("".join(lines))
    tree = ast.increment_lineno(ast.parse(source), before)
    statements = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)):
            for line in (node.lineno, node.end_lineno):
                statements[line] = node
    heads = {line for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
             for line in range(node.lineno, node.body[0].lineno)}
    claims, errors = [], []
    for line, text in comments(source, before):
        match = SHAPES.match(text)
        try:
            shapes = match and tuple(parse_shapes(match[1]))
        except SyntaxError:
            shapes = None                               # a remark in brackets
        if not shapes or line in heads:
            continue
        unknown = {n.id for shape in shapes for dim in shape or () for n in ast.walk(dim)
                   if isinstance(n, ast.Name)} - set(dims)
        if unknown:
            errors.append(f"{file}:{line}: unknown dimension {', '.join(sorted(unknown))}")
        elif line not in statements:
            errors.append(f"{file}:{line}: a shape beside a line that assigns nothing")
        else:
            s = statements[line]
            claims.append(Claim(file, line, range(s.lineno, s.end_lineno + 1), targets(s), shapes))
    return claims, errors


def comments(source, before):
    """(line, text) of all comments that stand behind code."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line[:token.start[1]].strip():
            yield token.start[0] + before, token.string


def parse_shapes(text):
    """'(B, 4H), ...' as a tuple of expressions and None."""
    for shape in re.findall(SHAPE, text):
        if shape == "...":
            yield None
            continue
        dims = re.sub(r"(\d)([A-Za-z_])", r"\1*\2", shape[1:-1])
        yield tuple(ast.parse(d.strip(), mode="eval").body for d in dims.split(",") if d.strip())


def targets(statement):
    """(text, code) of each name, element or attribute that a statement assigns."""
    def flat(node):
        if isinstance(node, (ast.Tuple, ast.List)):
            return [leaf for element in node.elts for leaf in flat(element)]
        return [node.value if isinstance(node, ast.Starred) else node]

    if isinstance(statement, ast.Return):
        return ()
    assigned = getattr(statement, "targets", None) or [statement.target]
    texts = [ast.unparse(leaf) for leaf in flat(assigned[0])]
    return tuple((text, compile(text, "<target>", "eval")) for text in texts if text != "_")


def trace(claims, dims, found, run):
    """Call run(); compare after each claimed statement; return the claims that were compared."""
    by_line = {}
    for claim in claims:
        for line in claim.lines:
            by_line[claim.file, line] = claim
    files, proven = {claim.file for claim in claims}, set()

    def compare(claim, frame, result=None):
        if claim.targets:
            pairs = [(text, eval(code, frame.f_globals, frame.f_locals))
                     for text, code in claim.targets]
        else:
            pairs = [("result", result)]
        problem = contradiction(claim.shapes, pairs, dims)
        if problem:
            found.append(f"{claim}: {problem}")
        proven.add(claim)

    def enter(frame, event, arg):
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file not in files or (name.startswith("<") and name != "<module>"):
            return None
        running = None                                  # the claimed statement under way

        def step(frame, event, arg):
            nonlocal running
            if event == "exception":
                running = None
            elif event == "return" and running:
                compare(running, frame, arg)
            elif event == "line":
                inside = running and frame.f_lineno in running.lines
                again = inside and len(running.lines) == 1
                if running and (not inside or again):
                    compare(running, frame)
                    running = None
                running = running or by_line.get((file, frame.f_lineno))
            return step

        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        run()
    finally:
        sys.settrace(before)
    return proven


def contradiction(shapes, pairs, dims):
    """What is wrong about these (text, value) pairs, or None."""
    arrays = [pair for text, value in pairs for pair in arrays_in(text, value)]
    if len(arrays) != len(shapes):                      # NumPy's numbers may do without a shape
        arrays = [(text, a) for text, a in arrays if not isinstance(a, np.generic)]
    if len(arrays) != len(shapes):
        names = ", ".join(f"{text} {tuple(a.shape)}" for text, a in arrays) or "none"
        return f"{len(shapes)} shapes for {len(arrays)} arrays: {names}"
    for (text, a), shape in zip(arrays, shapes, strict=True):
        if shape is not None and not fits(a.shape, shape, dims):
            words = ", ".join(ast.unparse(dim) for dim in shape)
            return f"{text} is {tuple(a.shape)}, not ({words})"
    return None


def arrays_in(text, value):
    if isinstance(value, (tuple, list)):
        return [pair for k, v in enumerate(value) for pair in arrays_in(f"{text}[{k}]", v)]
    return [(text, value)] if hasattr(value, "shape") and not callable(value) else []


def fits(shape, dims, sizes):
    want = [... if isinstance(d, ast.Constant) and d.value is ... else size(d, sizes) for d in dims]
    if ... not in want:
        return list(shape) == want
    k = want.index(...)
    tail = len(want) - k - 1
    return (len(shape) >= len(want) - 1 and list(shape[:k]) == want[:k]
            and list(shape[len(shape) - tail:]) == want[k + 1:])


def size(dim, sizes):
    """The value of a dimension such as 4 * H or N + 1."""
    if isinstance(dim, ast.Constant):
        return dim.value
    if isinstance(dim, ast.Name):
        return sizes[dim.id]
    return OPERATIONS[type(dim.op)](size(dim.left, sizes), size(dim.right, sizes))
