"""Our gradients against autograd: the whole model, in float64, on the same numbers and noise."""

from types import SimpleNamespace

import numpy as np
import pytest

import depth_scene as depth
from common.params import Params

torch = pytest.importorskip("torch")

WEIGHTS = SimpleNamespace(std=0.2, gamma=0.7)


FAST = {"patch": 13, "crop": 12, "what": 5, "trunk": (4, 6, 5), "encoder": (6, 4), "units": 9,
        "decoder": (8, 11)}
TURNS = {**FAST, "formulation": "turns", "looks": 2}
SHADED = {**TURNS, "colours": "shaded"}
PAPER = {"formulation": "paper", "patch": 16, "unet": (4, 8, 4, 8), "maps": (5, 4, 6, 3),
         "stages": (4, 8, 4, 4, 8, 4), "units": 9, "temperature": 9.0}


@pytest.mark.parametrize("objects", [2, 3])
@pytest.mark.parametrize("changes", [FAST, TURNS, SHADED, PAPER],
                         ids=["fast", "turns", "turns, shaded", "paper"])
def test_gradient_is_that_of_autograd(changes, objects, rng):
    from bench import twin_depth

    cfg = depth.Config(canvas=32, objects=objects, **changes)
    p = Params({name: a for name, a in depth.init(cfg, 1).items() if not depth.is_prior(name)},
               np.float64)
    p.flat[...] += 0.1 * rng.standard_normal(p.flat.size)
    x = rng.random((4, 3, 32, 32))
    noise = {k: a.astype(float) for k, a in vars(depth.draw_noise(cfg, 4, 1, 0)).items()}
    loss, _, back = depth.objective(p, cfg, x, SimpleNamespace(**noise), WEIGHTS)
    g = p.grads()
    back(g)

    theirs = {name: torch.tensor(a, requires_grad=True) for name, a in p.items()}
    noise = SimpleNamespace(**{k: torch.tensor(a) for k, a in noise.items()})
    twin = twin_depth.objective(theirs, cfg, torch.tensor(x), noise, WEIGHTS)
    twin.backward()
    assert loss == pytest.approx(twin.item(), rel=1e-10)
    largest = np.abs(g.flat).max()
    for name, a in theirs.items():
        assert np.abs(g[name] - a.grad.numpy()).max() <= 1e-10 * largest, name
