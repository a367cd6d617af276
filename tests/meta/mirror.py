"""Does each `back` mirror its forward? Read from the source text alone, by the AST.

For every function with an inner `def back`:
  * `back` is not defined inside a loop, only `return ..., back` follows it;
  * each pullback bound on the way forward (`y, back_y = f(x)`) is called in `back` once, in
    exactly reverse order; those bound in a loop are kept in a list (`backs.append(back_y)`) which
    a loop in `back` walks with `reversed`, its body the mirror of the forward loop's body; those
    bound under an `if` are called under an `if` with the same test;
  * equation tags (`# eq.3` behind a line) stand on both sides, in reverse order, and the call of
    a pullback has the tags of the line that bound it.
A gradient that stops is bound to `_`, and one that only the forward pass reads gets a name that
does not start with `back`.
"""

import ast
import io
import re
import tokenize
from typing import NamedTuple

PULLBACK, PULLBACKS = re.compile(r"back(_\w+|\d*)"), re.compile(r"backs(_\w+|\d*)")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
LOOPS = (ast.For, ast.While)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


class Use(NamedTuple):
    """A pullback is bound (on the way forward) or called (on the way back)."""
    name: str
    line: int
    tags: frozenset


class Loop(NamedTuple):
    line: int
    body: list


class Branch(NamedTuple):
    line: int
    test: str
    then: list
    other: list


def complaints(source, file="<source>"):
    """All that is wrong in one file, as 'file:line: what'."""
    tags, found = equation_tags(source), []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            backs = [n for n in own_nodes(function.body) if is_back(n)]
            if backs:
                found += check_place(function)
            for back in backs:
                found += check_mirror(function, back, tags)
                found += check_tags(function, back, tags)
    return [f"{file}:{line}: {what}" for line, what in sorted(set(found))]


def equation_tags(source):
    """line -> {"3", "4b"} for a line that ends in `# ... eq.3, eq.4b`."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: frozenset(re.findall(r"\beq\.(\w+)", t.string))
            for t in tokens if t.type == tokenize.COMMENT and "eq." in t.string}


def is_back(node):
    return isinstance(node, ast.FunctionDef) and node.name == "back"


def own_nodes(statements):
    """All nodes below these statements, without entering functions defined there."""
    for node in statements:
        yield node
        if not isinstance(node, FUNCTIONS):
            yield from own_nodes(ast.iter_child_nodes(node))


def bodies(node):
    """The statement lists directly below a node."""
    for field in ("body", "orelse", "finalbody"):
        if isinstance(getattr(node, field, None), list):
            yield getattr(node, field)
    for handler in getattr(node, "handlers", []):
        yield handler.body


# ---------------------------------------------------------------- where `back` stands

def check_place(function):
    """`back` is the last thing that a function defines, and what it returns ends with it."""
    def visit(node, in_loop):
        for body in bodies(node):
            for k, statement in enumerate(body):
                if is_back(statement):
                    if in_loop:
                        yield statement.lineno, "back is defined inside a loop"
                    yield from after_back(body[k + 1:])
                elif not isinstance(statement, FUNCTIONS):
                    yield from visit(statement, in_loop or isinstance(statement, LOOPS))

    def after_back(rest):
        if rest and not isinstance(rest[0], ast.Return):
            yield rest[0].lineno, "only `return ..., back` may follow back"
        for last in (n for n in rest if isinstance(n, ast.Return)):
            value = last.value.elts[-1] if isinstance(last.value, ast.Tuple) else last.value
            if not (isinstance(value, ast.Name) and value.id == "back"):
                yield last.lineno, "what is returned must end with back"

    return list(visit(function, False))


# ---------------------------------------------------------------- the order of the pullbacks

def check_mirror(function, back, tags):
    """The calls in `back` are the reverse of the bindings in `function`."""
    found = []
    lists = {}                  # name of a list -> the expression appended to it
    loop_names = set()          # pullbacks bound inside a loop: only their list has them all

    def span_tags(first, last):
        return frozenset().union(*(tags.get(k, ()) for k in range(first, last + 1)))

    def forward(statements, in_loop=False):
        events, open_names = [], {}
        for s in statements:
            if isinstance(s, FUNCTIONS):
                continue
            if isinstance(s, LOOPS):
                body = forward(s.body, True) + forward(s.orelse, True)
                check_kept(s, body)
                events += [Loop(s.lineno, body)] if body else []
            elif isinstance(s, ast.If):
                arms = forward(s.body, in_loop), forward(s.orelse, in_loop)
                events += [Branch(s.lineno, ast.unparse(s.test), *arms)] if any(arms) else []
            elif isinstance(s, ast.Assign):
                for event in bindings(s, in_loop):
                    events.append(event)
                    for name in names_of([event]):
                        if name in open_names and not in_loop:
                            found.append((s.lineno, f"{name} of line {open_names[name]} is lost"))
                        open_names[name] = s.lineno
            else:
                remember_append(s)
                for body in bodies(s):
                    events += forward(body, in_loop)
        return events

    def bindings(s, in_loop):
        here = span_tags(s.lineno, s.end_lineno)
        for name in (n.id for target in s.targets for n in ast.walk(target)
                     if isinstance(n, ast.Name)):
            if PULLBACK.fullmatch(name):
                if in_loop:
                    loop_names.add(name)
                use = [Use(name, s.lineno, here)]
                if not isinstance(s.value, ast.IfExp):
                    if not isinstance(s.value, ast.Constant | ast.Name):
                        yield use[0]
                    continue
                calls = [isinstance(v, ast.Call) for v in (s.value.body, s.value.orelse)]
                if all(calls):
                    yield use[0]
                else:
                    yield Branch(s.lineno, ast.unparse(s.value.test),
                                 use if calls[0] else [], use if calls[1] else [])
            elif PULLBACKS.fullmatch(name) and isinstance(s.value, (ast.Call, *COMPREHENSIONS)):
                lists[name] = ast.Name(name + "[]")
                yield Loop(s.lineno, [Use(name + "[]", s.lineno, here)])

    def remember_append(s):
        call = getattr(s, "value", None)
        if (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
                and call.func.attr == "append" and isinstance(call.func.value, ast.Name)):
            lists[call.func.value.id] = call.args[0]

    def check_kept(loop, events):
        kept = {n.id for call in ast.walk(loop) if isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute) and call.func.attr == "append"
                for arg in call.args for n in ast.walk(arg) if isinstance(n, ast.Name)}
        for event in events:
            if isinstance(event, Branch):
                check_kept(loop, event.then + event.other)
            if isinstance(event, Use) and event.name.removesuffix("[]") not in kept:
                found.append((event.line, f"{event.name}, bound in a loop, is not kept in a list"))

    def backward(node, env, span):
        """The calls below a node in the order in which Python makes them."""
        if isinstance(node, FUNCTIONS):
            return []
        if isinstance(node, ast.stmt):
            last = node.body[0].lineno - 1 if list(bodies(node)) else node.end_lineno
            span = (node.lineno, max(last, node.lineno))
        if isinstance(node, ast.For):
            env = env | elements(node.iter, node.target)
            return loop(node, [e for s in node.body for e in backward(s, env, span)])
        if isinstance(node, ast.While):
            return loop(node, [e for s in node.body for e in backward(s, env, span)])
        if isinstance(node, COMPREHENSIONS):
            for generator in node.generators:
                env = env | elements(generator.iter, generator.target)
            values = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            return loop(node, [e for v in values for e in backward(v, env, span)])
        if isinstance(node, ast.If | ast.IfExp):
            arms = [[e for s in (arm if isinstance(arm, list) else [arm])
                     for e in backward(s, env, span)] for arm in (node.body, node.orelse)]
            return [Branch(node.lineno, ast.unparse(node.test), *arms)] if any(arms) else []
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Assign | ast.AugAssign):
            children = [node.value]
        events = [e for child in children for e in backward(child, env, span)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = env.get(node.func.id)
            if name is None and node.func.id in loop_names:
                found.append((node.lineno, f"{node.func.id} is only the last one of its loop"))
            name = name or node.func.id
            if name in bound:
                events.append(Use(name, node.lineno, span_tags(*span)))
        return events

    def loop(node, body):
        return [Loop(node.lineno, body)] if body else []

    def elements(source, target, flipped=False):
        """What the targets of a loop over lists of pullbacks stand for: local name -> name."""
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) and source.args:
            name, args = source.func.id, source.args
            if name in ("reversed", "list", "tuple"):
                return elements(args[0], target, flipped ^ (name == "reversed"))
            if name == "zip" and isinstance(target, ast.Tuple):
                pairs = zip(args, target.elts, strict=False)
                return {k: v for a, t in pairs for k, v in elements(a, t, flipped).items()}
            if name == "enumerate" and isinstance(target, ast.Tuple):
                return elements(args[0], target.elts[1], flipped)
        if isinstance(source, ast.Subscript) and ast.unparse(source.slice) == "::-1":
            return elements(source.value, target, not flipped)
        if not isinstance(source, ast.Name) or source.id not in aliases:
            return {}
        if not flipped:
            found.append((source.lineno, f"{source.id} must be walked with reversed()"))
        return unpack(target, lists[aliases[source.id]])

    def unpack(target, element):
        if isinstance(target, ast.Tuple) and isinstance(element, ast.Tuple):
            pairs = zip(target.elts, element.elts, strict=False)
            return {k: v for t, e in pairs for k, v in unpack(t, e).items()}
        if not (isinstance(target, ast.Name) and isinstance(element, ast.Name)):
            return {}
        if element.id in lists:
            aliases[target.id] = element.id
        return {target.id: element.id}

    events = forward(function.body)
    bound = set(names_of(events))
    aliases = {name: name for name in lists}
    calls = [e for s in back.body for e in backward(s, {}, None)]
    found += mirrored(events, calls, back.end_lineno)
    return found


def names_of(events):
    for e in events:
        if isinstance(e, Use):
            yield e.name
        else:
            for body in e[1:] if isinstance(e, Loop) else e[2:]:
                yield from names_of(body)


def mirrored(forward, back, end):
    """Walk both sides at once, the forward one from its end; stop at the first difference."""
    due, calls = list(forward), list(back)
    while due or calls:
        want, got = due.pop() if due else None, calls[0] if calls else None
        if not same_question(want, got):
            if arms_agree(want):
                due += want.then
                continue
            if arms_agree(got):
                due += [want] if want else []
                calls[:1] = got.then
                continue
        if want is None or got is None or type(want) is not type(got):
            return [(got.line if got else end, f"{title(want)} is due here, not {title(got)}")]
        calls.pop(0)
        if isinstance(want, Use):
            if want.name != got.name:
                return [(got.line, f"{title(want)} is due here, not {title(got)}")]
            if not want.tags <= got.tags:
                return [(got.line, f"{title(want)} has eq.{'+'.join(sorted(want.tags))}, "
                                   f"its call has eq.{'+'.join(sorted(got.tags)) or ' none'}")]
            continue
        if isinstance(want, Branch) and not same_question(want, got):
            return [(got.line, f"the forward's if on line {want.line} asks `{want.test}`")]
        inner = (zip(want[1:], got[1:], strict=True) if isinstance(want, Loop)
                 else zip(want[2:], got[2:], strict=True))
        for bodies_ in inner:
            found = mirrored(*bodies_, end)
            if found:
                return found
    return []


def arms_agree(event):
    """Either way the same pullbacks are bound or called: then no `if` is needed opposite."""
    return isinstance(event, Branch) and [*names_of(event.then)] == [*names_of(event.other)]


def same_question(want, got):
    """The two tests are the same; `if back_x is not None` also says that back_x was bound."""
    return isinstance(want, Branch) and isinstance(got, Branch) and (
        got.test == want.test
        or any(got.test in (name, f"{name} is not None") for name in names_of([want])))


def title(event):
    if event is None:
        return "the end"
    if isinstance(event, Use):
        return f"{event.name} (line {event.line})"
    return f"the {type(event).__name__.lower()} of line {event.line} with " + \
        ", ".join(names_of([event]))


# ---------------------------------------------------------------- equation tags

def check_tags(function, back, tags):
    """Both sides have the same tags, the later ones of the forward first in `back`."""
    def places(nodes):
        """tag -> (line, arms of ifs it stands in) for all lines of these statements."""
        return {(tag, line): arms for node, arms in nodes if not is_back(node)
                for line in header(node) for tag in tags.get(line, ())}

    def header(node):
        inner = [b[0].lineno for b in bodies(node) if b]
        return range(node.lineno, min(inner) if inner else node.end_lineno + 1)

    def statements(body, arms=()):
        for s in body:
            yield s, arms
            if not isinstance(s, FUNCTIONS):
                for k, inner in enumerate(bodies(s)):
                    arm = ((s.lineno, k),) if isinstance(s, ast.If) else ()
                    yield from statements(inner, arms + arm)

    def stops(node):
        return any(isinstance(n, ast.Name) and n.id == "_" for t in getattr(node, "targets", [])
                   for n in ast.walk(t))

    forward = places(statements(function.body))
    backward = places(statements(back.body))
    stopped = {tag for tag, _ in places((s, a) for s, a in statements(function.body) if stops(s))}
    front, rear = {tag for tag, _ in forward}, {tag for tag, _ in backward}
    found = [(min(n for t, n in forward if t == tag), f"eq.{tag} is missing in back")
             for tag in front - rear - stopped]
    found += [(min(n for t, n in backward if t == tag), f"eq.{tag} is missing in the forward")
              for tag in rear - front]
    last = {tag: (line, forward[tag, line]) for tag, line in sorted(forward, key=lambda p: p[1])}
    first = dict(sorted(backward, key=lambda p: -p[1]))
    for a in front & rear:
        for b in front & rear:
            if last[a][0] > last[b][0] and first[a] > first[b] and last[a][1] == last[b][1]:
                found.append((first[b], f"eq.{a} comes before eq.{b} on the way back"))
    return found
