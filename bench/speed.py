"""One training step of AIR beside the same step in PyTorch, on this machine, side by side.

    python -m bench.speed                       2 threads, batch 64: prints, and appends the table
    python -m bench.speed --device gpu --batch 64 1024      to results/air_multimnist/speed.jsonl
    python -m bench.speed --startup             seconds until the first update, cold and warm

Every contender lives in a process of its own, with the thread settings that suit it, and sleeps
while the others work; blocks of steps alternate, and medians are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path("results/air_multimnist/speed.jsonl")
CONTENDERS = ("ours", "torch eager", "torch compile")
BLOCKS, BLOCK = 10, 10


# ---------------------------------------------------------------- contenders: a function each

def setting(batch):
    """Config, weights, scenes, noise and schedule of the default run, half-way."""
    import numpy as np

    import air_multimnist as air
    from common.params import Params
    from common.scenes import sprites

    cfg = air.Config(batch_size=batch)
    x = sprites(0, 0, batch).images.sum(1, keepdims=True).astype(np.float32)
    return cfg, Params(air.init(cfg, 0)), x, air.draw_noise(cfg, batch, 0, 0), air.schedule(cfg, 9)


def ours(batch):
    import air_multimnist as air
    from common.backend import DEVICE, to_device, xp
    from common.optim import Optimiser

    cfg, p, x, noise, weights = setting(batch)
    g, adam, t, x = p.grads(), Optimiser(p), 0, to_device(x)

    def step():
        nonlocal t
        t += 1
        g.zero()
        _, back = air.objective(p, cfg, x, noise, weights)
        back(g)
        adam.update(g, 1e-6, t)
        if DEVICE == "gpu":
            xp.cuda.Device().synchronize()

    return step


def torch_step(batch, device, compiled):
    import torch

    from bench import twin_air

    cfg, p, x, noise, weights = setting(batch)
    torch.set_flush_denormal(True)
    theirs = {k: torch.tensor(a, device=device, requires_grad=True) for k, a in p.items()}
    x = torch.tensor(x, device=device)
    for name, a in vars(noise).items():
        setattr(noise, name, torch.tensor(a, device=device))
    adam = torch.optim.Adam(theirs.values(), lr=1e-6, fused=True)
    run = torch.compile(twin_air.objective) if compiled else twin_air.objective

    def step():
        adam.zero_grad(set_to_none=True)
        run(theirs, cfg, x, noise, weights).backward()
        adam.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def work(args):
    """A contender: for every line on stdin, a block of steps, and their seconds on stdout."""
    if args.work == "ours":
        step = ours(args.batch[0])
    else:
        import torch

        torch.set_num_threads(args.threads)
        device = "cuda" if args.device == "gpu" else "cpu"
        step = torch_step(args.batch[0], device, args.work == "torch compile")
    for _ in range(20):
        step()
    if args.work == "ours" and args.device == "cpu":
        print(json.dumps(share_of_products(step)), flush=True)
    else:
        print("{}", flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(BLOCK):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def share_of_products(step, steps=60):
    """Milliseconds a step in matrix products, in each kernel, and in all the rest (medians)."""
    import numpy as np

    from common import kernels, ops, optim, params, sampler

    spent = {}

    def timed(name, f):
        def g(*args, **kwargs):
            start = time.perf_counter()
            y = f(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            return y
        return g

    places = [(ops, "gemm", "matrix products"), (params, "gemm", "matrix products"),
              (sampler, "warp", "windows, forward"), (sampler, "warp_back", "windows, backward"),
              (ops, "lstm_gates", "LSTM gates"), (ops, "lstm_gates_back", "LSTM gates"),
              (optim, "adam", "Adam"), (params, "join", "queued gradients joined")]
    kept = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, label in places:
        setattr(module, name, timed(label, getattr(module, name)))
    rows = []
    for _ in range(steps):
        spent.clear()
        start = time.perf_counter()
        step()
        total = time.perf_counter() - start
        rows.append({**spent, "elementwise NumPy and Python": total - sum(spent.values())})
    for module, name, f in kept:
        setattr(module, name, f)
    assert kernels.DEVICE == "cpu"
    return {k: round(1e3 * float(np.median([r[k] for r in rows])), 3) for k in rows[0]}


# ---------------------------------------------------------------- the race

def race(batch, args):
    import numpy as np

    from bench.results import machine

    racers, parts = {}, {}
    for name in CONTENDERS:
        words = [sys.executable, "-m", "bench.speed", "--work", name, "--batch", str(batch),
                 "--threads", str(args.threads), "--device", args.device]
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        racers[name] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, env=env)
        parts[name] = json.loads(racers[name].stdout.readline() or "null")
    seconds = {name: [] for name, found in parts.items() if found is not None}
    for _ in range(BLOCKS):
        for name in seconds:
            racers[name].stdin.write("go\n")
            racers[name].stdin.flush()
            seconds[name] += json.loads(racers[name].stdout.readline())
    for racer in racers.values():
        racer.kill()
    record = {"row": f"step, batch {batch}, {args.device}", "threads": args.threads,
              "machine": machine(), "command": " ".join(["python -m bench.speed", *sys.argv[1:]])}
    for name, times in seconds.items():
        record[name + " ms"] = round(1e3 * float(np.median(times)), 2)
        record[name + " images/s"] = round(batch / float(np.median(times)))
        if name != "ours":
            record["ours / " + name] = round(np.median(seconds["ours"]) / np.median(times), 3)
    if parts["ours"]:
        record["ms spent in"] = parts["ours"]
        record["share of products"] = round(parts["ours"]["matrix products"]
                                            / sum(parts["ours"].values()), 3)
    return record


def startup():
    """Seconds from the command to the end of the first update: cold, then with cached kernels."""
    from bench.results import machine

    record = {"row": "startup", "machine": machine(), "command": "python -m bench.speed --startup"}
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"NUMBA_CACHE_DIR": f"{folder}/numba"}
        for name in ("cold", "warm"):
            words = [sys.executable, "air_multimnist.py", "--out", f"{folder}/{name}",
                     "--steps", "1000", "--save-every", "1"]
            start = time.perf_counter()
            with subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL) as process:
                while not Path(f"{folder}/{name}/checkpoint.npz").exists():
                    if process.poll() is not None:
                        raise SystemExit("training ended before its first checkpoint")
                    time.sleep(0.02)
                record[name + " s"] = round(time.perf_counter() - start, 2)
                process.kill()
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--startup", action="store_true")
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    for record in [startup()] if args.startup else [race(batch, args) for batch in args.batch]:
        print(json.dumps(record, indent=1))
        with open(RESULTS, "a") as f:
            f.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
