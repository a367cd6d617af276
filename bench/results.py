"""Make the runs behind the README's tables again and keep what they print.

    python -m bench.results air_multimnist                      everything: an hour on two cores
    python -m bench.results air_multimnist default nvil         only these rows
    python -m bench.results air_multimnist --showcase           figures and weights from those runs
    SCENES_DATA=... python -m bench.results ...                 with the real MNIST

results/<script>/runs.json names the commands and their seeds; each record is appended as a line to
results/<script>/runs.jsonl, and what has a record already is not run again. Run folders go where
the commands put them (runs/).
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ENOUGH = 0.98                   # the count accuracy whose time is told


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("rows", nargs="*", help="all by default")
    parser.add_argument("--showcase", action="store_true",
                        help="draw and collect what results/<script>/showcase.json lists")
    args = parser.parse_args()
    folder = Path("results") / args.script
    if args.showcase:
        return showcase(folder)
    table, records = json.loads((folder / "runs.json").read_text()), folder / "runs.jsonl"
    lines = records.read_text().splitlines() if records.exists() else []
    done = {(r["row"], r["seed"]) for r in map(json.loads, lines)}
    for row in args.rows or table:
        for seed in table[row]["seeds"]:
            if (row, seed) in done:
                continue
            record = {"row": row, "seed": seed, **measure(table[row]["command"].format(seed=seed))}
            with open(records, "a") as f:
                f.write(json.dumps(record) + "\n")
            print(json.dumps({k: record.get(k) for k in ("row", "seed", "count_accuracy", "elbo",
                                                        "train_seconds", "peak_mb")}), flush=True)


def showcase(folder):
    """Draw what the list says, then copy its files beside it."""
    listed = json.loads((folder / "showcase.json").read_text())
    for command in listed["commands"]:
        subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    for name, source in listed["files"].items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, folder / name)


def measure(command):
    """Run a command; the JSON object that it prints, with machine, time and memory."""
    words = [sys.executable, *shlex.split(command)[1:]]
    if "evaluate" not in words:
        words.append("--resume")
    with (subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process,
          ThreadPoolExecutor(1) as other):
        peak = other.submit(peak_memory, process)
        out = process.stdout.read()
        process.wait()
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}")
    record = {"machine": machine(), "peak_mb": peak.result(),
              **json.loads(out.strip().splitlines()[-1]), "command": command}
    if "run" in record:
        record |= timing(Path(record["run"]) / "metrics.jsonl")
    return record


def peak_memory(process):
    """MB that a run and its forked processes have had at most, pages they share counted once."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):              # one of them ends while it is looked at
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text()
                       for pid in (process.pid, *children))
            kb = sum(int(line.split()[1]) for text in rollups for line in text.splitlines()
                     if line.startswith("Pss:"))
            peak = max(peak, kb // 1024)
        time.sleep(0.3)
    return peak


def timing(path):
    """Seconds of training until the validation scenes were counted well enough."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    enough = [line["seconds"] for line in lines if line.get("count_accuracy", 0) >= ENOUGH]
    return {"seconds_to_98": enough[0] if enough else None}


def machine():
    """The processor by name, and how many cores of it."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            models = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
