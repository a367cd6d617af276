"""The README's result tables, made from the records that the scripts left under results/.

    python -m viz.table                     print every table
    python -m viz.table README.md ..        rewrite what stands between <!-- table:NAME --> and
                                            <!-- end -->, from the results/ beside or above it
    python -m viz.table README.md --check   exit with 1 if that would change anything

A record is a line of results/<script>/*.jsonl. results/<script>/tables.json says what to show:
{"NAME": [{"label": "two digits", "filter": {"row": "default"}, "metric": "count_accuracy",
           "format": ".1%", "paper": "98 %", "best": "96 %", "command": "python ..."}, ...]}
Of several records with one seed the last counts. "paper", "best" and "command" may be left out;
the command is then the record's own, and a column that nobody fills is not drawn.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from common.errors import Fail
from common.store import write_text
from viz.curves import read_jsonl
from viz.style import duration

TABLE = re.compile(r"(<!-- table:([\w.-]+) -->\n)((?:(?!<!-- table:).)*?)(<!-- end -->)", re.DOTALL)
COLUMNS = ("", "Paper", "Public best", "Here", "Training", "Machine", "Command")


def tables(results):
    """Every table under the results folder as {name: Markdown}."""
    found = {}
    for spec in sorted(Path(results).glob("*/tables.json")):
        records = [r for f in sorted(spec.parent.glob("*.jsonl")) for r in read_jsonl(f)]
        for name, rows in json.loads(spec.read_text(encoding="utf-8")).items():
            if name in found:
                raise Fail(f"{spec}: there is another table called {name}")
            found[name] = markdown([cells(row, records) for row in rows])
    return found


def cells(row, records):
    """One row of a table, from the records that match its filter."""
    metric = row["metric"]
    chosen = {r.get("seed", f"line {i}"): r for i, r in enumerate(records)
              if metric in r and all(r.get(k) == v for k, v in row["filter"].items())}.values()
    machines = dict.fromkeys(r["machine"] for r in chosen if "machine" in r)
    commands = [f"`{command}`" for command in
                [row.get("command")] + [r.get("command") for r in chosen] if command]
    return (row["label"], row.get("paper", ""), row.get("best", ""),
            spread([r[metric] for r in chosen], lambda v: as_text(v, row["format"]),
                   "seed" if any("seed" in r for r in chosen) else "measurement"),
            spread([r["train_seconds"] for r in chosen if "train_seconds" in r], duration),
            ", ".join(machines), commands[0] if commands else "")


def as_text(value, form):
    """A number in the row's format, with the space that a percent sign wants."""
    return format(value, form).replace("%", " %")


def spread(values, text, each=None):
    """Mean, and in brackets the lowest and the highest of several: 98.1 % (97.6 % – 98.6 %)."""
    if not values:
        return "not run" if each else ""
    mean, low, high = text(sum(values) / len(values)), text(min(values)), text(max(values))
    notes = [f"{low} – {high}"] if low != high else []
    notes += [f"{len(values)} {each}" + "s" * (len(values) > 1)] if each else []
    return mean + (f" ({', '.join(notes)})" if notes else "")


def markdown(rows):
    """A table without its empty columns."""
    keep = [c for c in range(len(COLUMNS)) if c == 0 or any(row[c] for row in rows)]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "".join("| " + " | ".join(str(line[c]).replace("|", "\\|") for c in keep) + " |\n"
                   for line in lines)


def rewrite(text, found):
    """The README's text with every table brought up to date."""
    def table(match):
        start, name, _, end = match.groups()
        if name not in found:
            raise Fail(f"no results/*/tables.json describes the table {name}")
        return f"{start}\n{found[name]}\n{end}"

    if len(TABLE.findall(text)) != text.count("<!-- table:"):
        raise Fail("a <!-- table:NAME --> has no <!-- end --> of its own")
    return TABLE.sub(table, text)


def main(argv=None):
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m viz.table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files beside or in results/")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    args = parser.parse_args(argv)
    try:
        if not args.pages:
            for name, table in tables("results").items():
                print(f"{name}\n\n{table}")
        return max([bring_up_to_date(page, args.check) for page in args.pages], default=0)
    except Fail as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def bring_up_to_date(page, check):
    """Rewrite one page; or only say whether that would change it (1) or not (0)."""
    if not page.is_file():
        raise Fail(f"no file {page}")
    root = next((d for d in page.resolve().parents if (d / "results").is_dir()), None)
    if root is None:
        raise Fail(f"{page} has no results/ beside or above it")
    old = page.read_text(encoding="utf-8")
    new = rewrite(old, tables(root / "results"))
    if not check:
        write_text(page, new)
    elif new != old:
        print(f"{page} differs from results/: python -m viz.table {page}", file=sys.stderr)
    return int(check and new != old)


if __name__ == "__main__":
    sys.exit(main())
