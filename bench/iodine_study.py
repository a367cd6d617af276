"""What the slots of iodine_tetris.py have learned: analyses of the paper that train no model.

    python -m bench.iodine_study                    all four, of the committed weights
    python -m bench.iodine_study probe pca          some of them
    ... --weights FILE --out DIR                    of other weights; where pictures go
    ... vae --weights FILE --vae FILE               beside a VAE's (vae_scenes.py, multi-dSprites)
    ... places forms --weights FILE                 ARIs without a model, on the weights' data

    probe        an object's factors from its slot's latent, by a linear map          (Fig. 5)
    traversals   one dimension of one slot's latent at a time                         (Fig. 6)
    ambiguous    pictures with several right answers, read again and again            (Fig. 10)
    pca          latents of objects on their first two principal components           (Fig. 25)
    vae          factors of three objects, from their slots and from a VAE's one vector (Fig. 5)
    places       k-means of the lit pixels' coordinates, told how many objects there are
    forms        told all but which object lies before which: what no picture in white can show

Each but the last two writes NAME.png, all append a record to study.jsonl. Scenes for learning the
linear maps are of the validation stream, those that score them of the test stream.
"""

import argparse
import json
import shlex
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import iodine_tetris as iodine  # before NumPy: common.backend sets threads
import vae_scenes

# isort: split
import numpy as np

from bench.results import machine
from common import cli, shapes
from common.backend import to_device, to_host
from common.errors import Fail
from common.metrics import adjusted_rand_index
from common.ops import linear, softmax
from common.optim import Optimiser
from common.params import Params, fitting
from common.store import load_weights
from viz import latents
from viz.depth import interpolations

SCENES = 1000, 320      # for the linear maps to learn from; to be scored on
DILEMMAS, READINGS = 40, 40     # ambiguous pictures; how often each is read
OFTEN = 0.05            # a share of the readings that is no accident
SHOWN = 6               # rows of the figures, and answers
REACH = 2.5             # how far a traversal goes to each side
BLOCK = 5               # pixels of a tetromino's block


# ---------------------------------------------------------------- objects and their latents

def read_objects(p, cfg, seed, total, part=20):
    """Each visible object's factors, and the posterior of the slot that owns most of it."""
    found = []
    for start in range(0, total, part):
        drawn = iodine.draw_scenes(cfg, seed, start, min(part, total - start))
        guess = iodine.infer_scenes(p, cfg, drawn.images, start)
        for b, (masks, owners) in enumerate(zip(drawn.masks, guess.owners[-1], strict=True)):
            for k in range(drawn.counts[b]):
                own = owners[masks == k + 1]
                if own.size:
                    slot = np.bincount(own).argmax()
                    found.append((guess.lam[-1, b, slot], drawn.kinds[b, k], drawn.colours[b, k],
                                  drawn.centres[b, k], drawn.sizes[b, k]))
    lam, *factors = map(np.array, zip(*found, strict=True))
    return lam, dict(zip(("shape", "colour", "centre", "size"), factors, strict=True))


def targets(cfg, factors):
    """What a probe is asked: whole numbers are classes, the rest are quantities."""
    asked = {"shape": factors["shape"]}
    if cfg.data == "tetris":
        asked["colour"] = (factors["colour"] @ [1, 2, 4]).astype(int)
    elif iodine.channels(cfg) == 3:
        asked["colour"] = factors["colour"]
    asked |= {"x": factors["centre"][:, :1], "y": factors["centre"][:, 1:]}
    if cfg.data in ("dsprites", "binary"):
        asked["size"] = factors["size"][:, None]
    return asked


def classify(z, labels, there, updates=1000, lr=0.03, decay=0.01):
    """The classes of `there`, by multinomial logistic regression from z to labels."""
    kinds, wanted = np.unique(labels, return_inverse=True)
    p = Params({"probe.W": np.zeros((z.shape[1], len(kinds))), "probe.b": np.zeros(len(kinds))})
    g, adam = p.grads(), Optimiser(p)
    for t in range(updates):
        logits, back = linear(p, "probe", z)
        g.zero()
        back((softmax(logits)[0] - np.eye(len(kinds), dtype=z.dtype)[wanted]) / len(z), g)
        g.flush()
        g["probe.W"][...] += decay / len(z) * p["probe.W"]
        adam.update(g, lr, t + 1)
    return kinds[linear(p, "probe", there)[0].argmax(1)]


def regress(z, values, there):
    """The quantities of `there`, by least squares from z to values."""
    z, there = (np.concatenate([a, np.ones((len(a), 1), a.dtype)], 1) for a in (z, there))
    return there @ np.linalg.lstsq(z, values, rcond=None)[0]


def told(z, known, there, true):
    """How much of each factor a linear map tells: accuracy of classes, R^2 of quantities."""
    shares = {}
    for name, values in known.items():
        if values.ndim == 1:
            shares[name] = float((classify(z, values, there) == true[name]).mean())
        else:
            away = ((regress(z, values, there) - true[name]) ** 2).sum()
            shares[name] = float(1 - away / ((true[name] - true[name].mean(0)) ** 2).sum())
    return shares


# ---------------------------------------------------------------- the analyses

def probe(p, cfg, path):
    sets = [read_objects(p, cfg, seed, total) for seed, total in
            zip((iodine.VALIDATION, iodine.TEST), SCENES, strict=True)]
    (lam, factors), (there, others) = sets
    known, true = targets(cfg, factors), targets(cfg, others)
    mean, std = lam.mean(0), lam.std(0) + 1e-6
    z, z_there = ((a - mean) / std for a in (lam, there))
    blind = np.random.default_rng(0).permutation(len(z))            # who is taken for whom
    Z = cfg.latents
    shares = {"a linear map of the latent": told(z[:, :Z], known, z_there[:, :Z], true),
              "of another object's latent": told(z[blind, :Z], known, z_there[:, :Z], true)}
    latents.bars(path, shares, "accuracy, or R² (x, y, size)")
    return {"objects": len(true["shape"]), **next(iter(shares.values()))}


def beside_vae(p, cfg, path, weights):
    """The paper's comparison: a VAE's scene must tell the factors of the largest object, the second
    and the third; a slot those of its own object."""
    config, arrays, _ = load_weights(weights)
    other = cli.from_dict(vae_scenes.Config, config, weights)
    if (cfg.data, cfg.canvas) != (other.data, other.canvas):
        raise Fail(f"{weights} was trained on other scenes: {other.data}, canvas {other.canvas}")
    q, cfg = fitting(arrays, vae_scenes.init(other, 0)), replace(cfg, objects=(3,))
    sets = [*zip((iodine.VALIDATION, iodine.TEST), SCENES, strict=True)]
    (lam, known), (there, true) = (read_objects(p, cfg, *part) for part in sets)
    Z = cfg.latents
    own = told(lam[:, :Z], targets(cfg, known), there[:, :Z], targets(cfg, true))
    (z, known), (there, true) = (read_scenes(q, other, cfg, *part) for part in sets)
    ranks = [told(z, targets(cfg, a), there, targets(cfg, b))
             for a, b in zip(known, true, strict=True)]
    whole = {name: float(np.mean([shares[name] for shares in ranks])) for name in own}
    latents.bars(path, {"the object's slot": own, "a VAE's scene": whole},
                 "accuracy, or R² (colour, x, y, size)")
    return {"vae": str(weights), **own, **{f"{name}, vae": v for name, v in whole.items()}}


def read_scenes(q, other, cfg, seed, total):
    """The VAE's mean of each scene, and the factors of its objects from the largest down."""
    drawn = iodine.draw_scenes(cfg, seed, 0, total)
    z = vae_scenes.encode(q, other, to_device(drawn.images))[0]
    names = {"shape": drawn.kinds, "colour": drawn.colours, "centre": drawn.centres,
             "size": drawn.sizes}
    ranked = [{name: a[np.arange(total), k] for name, a in names.items()}
              for k in np.argsort(-drawn.sizes, 1).T]
    return to_host(z), ranked


def places(p, cfg, path, starts=5):
    """Segmentation without a model: what is gained by splitting the picture into neighbourhoods.

    It draws nothing, and has the model's scenes from its config alone.
    """
    drawn, rng = iodine.draw_scenes(cfg, iodine.TEST, 0, SCENES[1]), np.random.default_rng(0)
    lit = (drawn.images - iodine.ground(cfg, drawn.images) != 0).any(1)
    owners = np.zeros(lit.shape, int)
    for own, pixels, count in zip(owners, lit, drawn.counts, strict=True):
        at = np.argwhere(pixels).astype(float)
        own[pixels] = min((k_means(at, count, rng) for _ in range(starts)), key=lambda r: r[0])[1]
    return {"ari_foreground": float(adjusted_rand_index(drawn.masks, owners).mean())}


def k_means(at, count, rng, rounds=30):
    """Squared distances to the nearest of `count` means, summed; and which one is nearest."""
    means = at[rng.choice(len(at), count, replace=False)]
    for _ in range(rounds):
        nearest = ((at[:, None] - means) ** 2).sum(2).argmin(1)
        means = np.array([at[nearest == k].mean(0) if (nearest == k).any() else means[k]
                          for k in range(count)])
    return ((at - means[nearest]) ** 2).sum(), nearest


def forms(p, cfg, path, lots=10):
    """Segmentation by one who knows every form and place, and draws lots for who hides whom."""
    drawn, rng = iodine.draw_scenes(cfg, iodine.TEST, 0, SCENES[1]), np.random.default_rng(0)
    owners = np.zeros((lots, *drawn.masks.shape), int)
    for lot in owners:
        for own, amodal, count in zip(lot, drawn.amodal, drawn.counts, strict=True):
            for k in rng.permutation(count):
                own[amodal[k]] = k + 1
    return {"ari_foreground": float(np.mean([adjusted_rand_index(drawn.masks, lot)
                                             for lot in owners]))}


def pca(p, cfg, path):
    lam, factors = read_objects(p, cfg, iodine.TEST, SCENES[1])
    z = lam[:, :cfg.latents] - lam[:, :cfg.latents].mean(0)
    _, strength, axes = np.linalg.svd(z, full_matrices=False)
    shown = {name: factors["colour"] if name == "colour" else values.ravel()
             for name, values in targets(cfg, factors).items()}
    latents.planes(path, z @ axes[:2].T, shown)
    return {"objects": len(z), "variance of two": float((strength[:2] ** 2).sum()
                                                        / (strength**2).sum())}


def traversals(p, cfg, path, scene=0, steps=7):
    """The dimensions with most KL in the slot of an object, each through its prior's range."""
    images = iodine.draw_scenes(cfg, iodine.TEST, scene, 1).images
    guess, black, Z = iodine.infer_scenes(p, cfg, images), iodine.ground(cfg, images), cfg.latents
    z, log_std = guess.lam[-1, 0, :, :Z], guess.lam[-1, 0, :, Z:]
    kl = (z**2 + np.exp(2 * log_std) - 1) / 2 - log_std             # of each slot and dimension
    slot = foreground(guess.owners[-1, 0], cfg.slots)
    rows = []
    for d in np.argsort(-kl[slot])[:SHOWN]:
        moved = np.repeat(z[None], steps, 0)
        moved[:, slot, d] = np.linspace(-REACH, REACH, steps)
        rows.append((f"{kl[slot, d]:.1f} nats", drawn_by(p, cfg, moved) + black))
    interpolations(path, rows)
    return {"KL of those shown": np.sort(kl[slot])[:-SHOWN - 1:-1].round(2).tolist()}


def foreground(owners, slots):
    """The slot of the largest object."""
    areas = {found["slot"]: found["area"] for found in
             iodine.objects(owners, slots, lambda box: [float(v) for v in box])}
    return max(areas, key=areas.get, default=0)


def drawn_by(p, cfg, z):
    """Scenes (n, C, S, S) that latents (n, K, Z) draw together."""
    flat = to_device(z.reshape(-1, cfg.latents))
    y = to_host(iodine.DECODERS[cfg.decoder](p, cfg, flat)[0])
    y = y.reshape(*z.shape[:2], *y.shape[1:])
    return (softmax(y[:, :, -1:], 1)[0] * y[:, :, :-1]).sum(1)


# ---------------------------------------------------------------- pictures with several answers

@cache
def tetrominoes():
    """The 19 as sets of (row, column), the first cell in reading order at (0, 0)."""
    grids = [picture[::BLOCK, ::BLOCK] > 0 for picture in shapes.oriented_tetrominoes()]
    cells = [[*zip(*map(np.ndarray.tolist, np.nonzero(grid)), strict=True)] for grid in grids]
    return [frozenset((i - own[0][0], j - own[0][1]) for i, j in own) for own in cells]


def tilings(cells):
    """All ways to cut a set of cells into tetrominoes, each a set of pieces."""
    if not cells:
        return [frozenset()]
    i, j = min(cells)
    pieces = (frozenset((i + a, j + b) for a, b in t) for t in tetrominoes())
    return [rest | {piece} for piece in pieces if piece <= cells for rest in tilings(cells - piece)]


def dilemma(rng, side=7):
    """Two touching tetrominoes that could be two others (cells), and a third one apart."""
    shapes_of, inside = tetrominoes(), {*np.ndindex(side, side)}
    while True:
        pieces = []
        for _ in range(3):
            i, j = rng.integers(side, size=2).tolist()
            pieces.append({(i + a, j + b) for a, b in shapes_of[rng.integers(len(shapes_of))]})
        one, two, third = pieces
        cells = one | two
        near = {(i + a, j + b) for i, j in third for a in (-1, 0, 1) for b in (-1, 0, 1)}
        if (cells | third <= inside and len(cells) == 8 and not cells & near
                and len(ways := tilings(frozenset(cells))) > 1):
            return cells, third, ways


def ambiguous(p, cfg, path):
    """How often each dilemma is answered in which way; right are all ways to cut it in two."""
    if cfg.data != "tetris":
        raise Fail("ambiguous pictures are made of tetrominoes: the weights must know those")
    rng, rows = np.random.default_rng(0), []
    for number in range(DILEMMAS):
        cells, third, ways = dilemma(rng)
        image = arrangement([(cells, [1, 0, 0]), (third, [0, 0, 1])])
        answers = Counter(answer(owners, cells) for owners in reread(p, cfg, image, number))
        given = sorted((answers[way] for way in ways), reverse=True)
        rows.append((given, image, [(as_owners(a), f"{100 * n / READINGS:.0f} %"
                                     + ("" if a in ways else ", wrong"))
                                    for a, n in answers.most_common(SHOWN)]))
    rows.sort(key=lambda row: -row[0][1])
    latents.readings(path, [row[1:] for row in rows[:SHOWN]])
    often = [sum(n >= OFTEN * READINGS for n in given) for given, *_ in rows]
    return {"pictures": DILEMMAS, "readings": READINGS,
            "right readings": float(np.mean([sum(given) / READINGS for given, *_ in rows])),
            "mean ways to cut": float(np.mean([len(given) for given, *_ in rows])),
            "read in one right way": float(np.mean([n == 1 for n in often])),
            "in two and more": float(np.mean([n > 1 for n in often]))}


def arrangement(pieces, side=7):
    """Blocks of one colour each as a picture (3, 35, 35)."""
    image = np.zeros((3, side * BLOCK, side * BLOCK), np.float32)
    for cells, colour in pieces:
        for i, j in cells:
            image[:, BLOCK * i:BLOCK * (i + 1), BLOCK * j:BLOCK * (j + 1)] = (
                shapes.BEVEL * np.array(colour)[:, None, None])
    return image


def reread(p, cfg, image, key):
    """Owners of the pixels, (H, W) each, from readings that differ by their noise alone."""
    return iodine.infer_scenes(p, cfg, np.repeat(image[None], READINGS, 0), key).owners[-1]


def answer(owners, cells):
    """The cells as sets with one owner each, by the most of a cell's pixels."""
    sets = {}
    for i, j in cells:
        block = owners[BLOCK * i:BLOCK * (i + 1), BLOCK * j:BLOCK * (j + 1)]
        sets.setdefault(np.bincount(block.ravel()).argmax(), set()).add((i, j))
    return frozenset(map(frozenset, sets.values()))


def as_owners(pieces, side=7):
    """Pieces as a picture of owners, (H, W), -1 where there is none."""
    grid = np.full((side, side), -1)
    for k, piece in enumerate(sorted(pieces, key=min)):
        for i, j in piece:
            grid[i, j] = k
    return np.kron(grid, np.ones((BLOCK, BLOCK), int))


STUDIES = {"probe": probe, "traversals": traversals, "ambiguous": ambiguous, "pca": pca,
           "vae": beside_vae, "places": places, "forms": forms}
FIRST = [*STUDIES][:4]          # those that need no more than the weights of default


def study(names, weights, out, vae=None):
    """Run the analyses, on scenes read with all the noise, as in the paper; their records."""
    config, arrays, _ = load_weights(weights)
    cfg = replace(cli.from_dict(iodine.Config, config, weights), noise=(1.0, 1.0))
    p = fitting(arrays, iodine.init(cfg, 0))
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        more = {"weights": vae} if name == "vae" else {}
        found = STUDIES[name](p, cfg, out / f"{name}.png", **more)
        yield {"study": name, "weights": str(weights), "trained_on": cfg.data, **found}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], metavar="STUDY",
                        help=f"{', '.join(STUDIES)} (default: {', '.join(FIRST)})")
    parser.add_argument("--vae", type=Path, help="weights of vae_scenes.py")
    parser.add_argument("--weights", type=Path, default=Path("results/iodine_tetris/weights.npz"))
    parser.add_argument("--out", type=Path, default=Path("runs/iodine_tetris/study"))
    args = parser.parse_args(argv)
    if ("vae" in args.studies) != (args.vae is not None):
        parser.error("vae needs --vae FILE, and nothing else does")
    command = shlex.join(["python", "-m", "bench.iodine_study",
                          *(sys.argv[1:] if argv is None else argv)])
    try:
        for record in study(args.studies or FIRST, args.weights, args.out, args.vae):
            print(json.dumps(record), flush=True)
            with open(args.out / "study.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps({**record, "machine": machine(), "command": command}) + "\n")
    except Fail as e:
        parser.exit(2, f"error: {e}\n")


if __name__ == "__main__":
    main()
