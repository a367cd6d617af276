"""One training step of a script beside the same step in PyTorch, on this machine, side by side.

    python -m bench.speed                       AIR, 2 threads, batch 64: prints, and appends
    python -m bench.speed sqair_moving          to results/<script>/speed.jsonl
    python -m bench.speed sqair_moving --task infer         frames a second, latents at their means
    python -m bench.speed --device gpu --batch 64 1024
    python -m bench.speed --startup             seconds until the first update, cold and warm

Every contender lives in a process of its own, with the thread settings that suit it, and sleeps
while the others work; blocks of steps alternate, and medians are compared. With several threads
ours is what a training run is: forked processes that share the batch. Records also hold the
least of each: what is left of a step when the machine has something else to do now and then. One
thread is timed by the processor's time, which other programs do not take away; more are by the
clock on the wall.

A script takes part with a function in SETTINGS below (the arguments of its `objective`) and with
its twin, `bench/twin_<first word of its name>.py`, which offers in PyTorch

    objective(p, cfg, x, noise, weights)    the loss, whose `backward` is the other half of a step
    compiled()                              the same, compiled; without it torch.compile(objective)
    infer(p, cfg, x)                        only for `--task infer`
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

CONTENDERS = ("ours", "torch eager", "torch compile")
BLOCKS, BLOCK, WARM = 10, 10, 20


# ---------------------------------------------------------------- what is timed

def air_setting(air, cfg, start, count):
    from common.scenes import sprites

    x = sprites(0, start, count).images.sum(1, keepdims=True)
    return x, air.draw_noise(cfg, cfg.batch_size, 0, 0, start, count)


def sqair_setting(sqair, cfg, start, count, frames=5):
    """Five frames are what most updates see."""
    from common import data

    glyphs = data.digits("train", None, drawn=True)
    videos = sqair.draw_videos(cfg, glyphs, 0, start, count, frames)
    return videos.images, sqair.draw_noise(cfg, frames, cfg.batch_size, 0, 0, start, count)


def iodine_setting(iodine, cfg, start, count):
    x = iodine.draw_scenes(cfg, 0, start, count).images
    return x, iodine.draw_noise(cfg, cfg.batch_size, cfg.iterations, 0, 0, start, count)


def depth_setting(depth, cfg, start, count):
    x = depth.draw_scenes(cfg, 0, start, count).images
    return x, depth.draw_noise(cfg, cfg.batch_size, 0, 0, start, count)


SETTINGS = {"air_multimnist": air_setting, "sqair_moving": sqair_setting,
            "iodine_tetris": iodine_setting, "depth_scene": depth_setting}


def setting(name, batch):
    """Script, config, weights and schedule of its default run."""
    from common.params import Params

    script = importlib.import_module(name)
    cfg = script.Config(batch_size=batch) if batch else script.Config()
    p = Params(script.init(cfg, 0))
    if name == "sqair_moving":
        p["head.b"][0] = 0          # finds one object a video, as a trained one does, and not three
    return script, cfg, p, script.schedule(cfg, 9)


def inputs(name, script, cfg, start=0, count=None):
    """Scenes and noise of a share of the first batch."""
    x, noise = SETTINGS[name](script, cfg, start, count or cfg.batch_size)
    return x.astype("float32"), noise


def ten_frames(script, cfg):
    """What `--task infer` reads."""
    return sqair_setting(script, cfg, 0, cfg.batch_size, cfg.frames)[0]


# ---------------------------------------------------------------- contenders: a function each

def ours(args):
    from common import processes
    from common.backend import DEVICE, THREADS, to_device, xp
    from common.optim import Optimiser

    if args.task == "step":
        processes.want(THREADS)
    script, cfg, p, weights = setting(args.script, args.batch[0])
    if args.task == "infer":
        videos = ten_frames(script, cfg)
        return lambda: script.infer_videos(p, cfg, videos), cfg, videos
    g, adam, t = p.grads(), Optimiser(p), 0
    processes.fork(cfg.batch_size)
    x, noise = inputs(args.script, script, cfg, *processes.share(cfg.batch_size))
    images = to_device(x)

    def step():
        nonlocal t
        t += 1
        processes.meet()                                    # nobody works while others are timed
        g.zero()
        *_, back = script.objective(p, cfg, images, noise, weights)
        back(g)
        g.average()
        adam.update(g, 1e-6, t)
        if DEVICE == "gpu":
            xp.cuda.Device().synchronize()

    while not processes.is_root():
        step()
    return step, cfg, x


def tensors(a, device):
    """Noise comes as an array, or as some in a list or under names."""
    import torch

    from common.backend import to_host

    if isinstance(a, list):
        return [tensors(each, device) for each in a]
    if isinstance(a, SimpleNamespace):
        return SimpleNamespace(**{name: tensors(each, device) for name, each in vars(a).items()})
    return torch.tensor(to_host(a), device=device)


def torch_contender(args):
    import torch

    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    device = "cuda" if args.device == "gpu" else "cpu"
    twin = importlib.import_module("bench.twin_" + args.script.split("_")[0])
    script, cfg, p, weights = setting(args.script, args.batch[0])
    theirs = {k: torch.tensor(a, device=device, requires_grad=True) for k, a in p.host().items()}
    if args.task == "infer":
        videos = ten_frames(script, cfg)
        return lambda: twin.infer(theirs, cfg, torch.tensor(videos, device=device)), cfg, videos
    x, noise = inputs(args.script, script, cfg)
    images, noise = torch.tensor(x, device=device), tensors(noise, device)
    adam = torch.optim.Adam(theirs.values(), lr=1e-6, fused=True)
    run = twin.objective
    if args.work == "torch compile":
        run = twin.compiled() if hasattr(twin, "compiled") else torch.compile(twin.objective)

    def step():
        adam.zero_grad(set_to_none=True)
        run(theirs, cfg, images, noise, weights).backward()
        adam.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step, cfg, x


def work(args):
    """A contender: for every line on stdin, a block of steps, and their seconds on stdout."""
    alone = args.threads == 1 and args.device == "cpu"
    clock = time.process_time if alone else time.perf_counter
    start = time.perf_counter()
    step, cfg, x = (ours if args.work == "ours" else torch_contender)(args)
    step()
    first = time.perf_counter() - start
    for _ in range(WARM):
        step()
    frames = x.shape[1] if x.ndim == 5 else 1
    report = {"batch": cfg.batch_size, "images": cfg.batch_size * frames, "first": first}
    if args.work == "ours" and args.device == "cpu":
        report["spent"] = time_in_kernels(step, clock)
    print(json.dumps(report), flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(BLOCK):
            start = clock()
            step()
            seconds.append(clock() - start)
        print(json.dumps(seconds), flush=True)


KERNELS = {
    "matrix products": ["backend.gemm", "kernels.times_transposed"],
    "convolutions": ["conv_kernels." + name for name in
                     "conv_forward conv_back_x conv_back_w activate act_back".split()],
    "LSTM gates": ["kernels.lstm_gates", "kernels.lstm_gates_back"],
    "windows, forward": ["kernels.warp"], "windows, backward": ["kernels.warp_back"],
    "mixture": ["mixture.mixture"],
    "layers": ["compose._order_errors", "compose._order_errors_back", "compose.run"],
    "queued gradients joined": ["params.join"], "Adam": ["kernels.adam"],
    "gradients shared": ["processes.mean_over_processes", "processes.meet"],
}


def time_in_kernels(step, clock, steps=40):
    """Milliseconds a step in matrix products, in each kernel, and in all the rest (medians)."""
    import numpy as np

    spent = {}

    def timed(label, f):
        def g(*args, **kwargs):
            inner, start = sum(spent.values()), clock()
            y = f(*args, **kwargs)
            inner = sum(spent.values()) - inner         # kernels that this one has called
            spent[label] = spent.get(label, 0.0) + clock() - start - inner
            return y
        return g

    labels = {}
    for label, places in KERNELS.items():
        for place in places:
            module, name = place.split(".")
            labels[getattr(importlib.import_module("common." + module), name)] = label
    users = [module for name, module in sys.modules.items()
             if name.startswith("common.") or name in SETTINGS]
    kept = [(module, name, f) for module in users for name, f in vars(module).items()
            if callable(f) and getattr(f, "__hash__", None) and f in labels]
    for module, name, f in kept:
        setattr(module, name, timed(labels[f], f))
    rows = []
    for _ in range(steps):
        spent.clear()
        start = clock()
        step()
        total = clock() - start
        rows.append({**spent, "elementwise NumPy and Python": total - sum(spent.values())})
    for module, name, f in kept:
        setattr(module, name, f)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(1e3 * float(np.median([row.get(name, 0.0) for row in rows])), 3)
            for name in names}


# ---------------------------------------------------------------- the race

def race(batch, args):
    import numpy as np

    from bench.results import machine

    racers, reports = {}, {}
    for name in CONTENDERS[:2] if args.eager or args.task == "infer" else CONTENDERS:
        words = [sys.executable, "-m", "bench.speed", args.script, "--work", name, "--batch",
                 str(batch), "--threads", str(args.threads), "--device", args.device, "--task",
                 args.task]
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        racers[name] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, env=env)
        reports[name] = json.loads(racers[name].stdout.readline() or "null")
    seconds = {name: [] for name, report in reports.items() if report}
    for _ in range(BLOCKS):
        for name in seconds:
            racers[name].stdin.write("go\n")
            racers[name].stdin.flush()
            seconds[name] += json.loads(racers[name].stdout.readline())
    for racer in racers.values():
        racer.kill()
    found = reports["ours"]
    record = {"row": f"{args.task}, batch {found['batch']}, {args.device}",
              "threads": args.threads, "machine": machine(),
              "command": " ".join(["python -m bench.speed", *sys.argv[1:]])}
    for name, times in seconds.items():
        record[name + " ms"] = round(1e3 * float(np.median(times)), 2)
        record[name + " least ms"] = round(1e3 * min(times), 2)
        record[name + " images/s"] = round(found["images"] / float(np.median(times)))
        record[name + " first s"] = round(reports[name]["first"], 1)
        if name != "ours":
            record["ours / " + name] = round(np.median(seconds["ours"]) / np.median(times), 3)
            record["ours / " + name + ", least"] = round(min(seconds["ours"]) / min(times), 3)
    if "spent" in found:
        record["ms spent in"] = found["spent"]
        record["share of products"] = round(found["spent"].get("matrix products", 0.0)
                                            / sum(found["spent"].values()), 3)
    return record


def startup(script):
    """Seconds from the command to the end of the first update: cold, then with cached kernels."""
    from bench.results import machine

    record = {"row": "startup", "machine": machine(),
              "command": " ".join(["python -m bench.speed", *sys.argv[1:]])}
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"NUMBA_CACHE_DIR": f"{folder}/numba"}
        for name in ("cold", "warm"):
            words = [sys.executable, f"{script}.py", "--out", f"{folder}/{name}",
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
    parser.add_argument("script", nargs="?", default="air_multimnist", choices=SETTINGS)
    parser.add_argument("--batch", type=int, nargs="+", default=[0], help="default: the script's")
    parser.add_argument("--task", choices=("step", "infer"), default="step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--startup", action="store_true")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task == "infer" and args.script != "sqair_moving":
        parser.error("--task infer is for sqair_moving")
    if args.work:
        return work(args)
    results = Path("results") / args.script / "speed.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    for record in ([startup(args.script)] if args.startup
                   else [race(batch, args) for batch in args.batch]):
        print(json.dumps(record, indent=1))
        with open(results, "a") as f:
            f.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
