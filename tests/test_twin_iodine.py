"""Our gradients against autograd: the whole model, in float64 and float32, on the same numbers."""

from types import SimpleNamespace

import numpy as np
import pytest

import iodine_tetris as iodine
from common.params import Params

torch = pytest.importorskip("torch")

SETTINGS = {
    "default": {},
    "dsprites, leaky, lstm": {"data": "dsprites", "activation": "leaky", "lstm": True},
    "paper": {"decoder": "broadcast", "kernel": 5, "refine_kernel": 5, "pool": "average"},
    "binary, logistic": {"data": "binary", "components": "logistic", "decoder": "broadcast"},
    "patch": {"decoder": "patch", "patch": 4},
    "binary, patch": {"data": "binary", "decoder": "patch", "patch": 7},
    "composite": {"components": "composite"},
}
BOUNDS = {np.float64: 1e-9, np.float32: 1e-4}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("backprop", ["steps", "all"])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_is_that_of_autograd(name, backprop, dtype):
    from bench import twin_iodine

    cfg = iodine.Config(backprop=backprop, canvas=17, iterations=3, latents=6, rank=5, features=6,
                        layers=3, decoder_units=12, refine_features=5, units=9, **SETTINGS[name])
    rng = np.random.default_rng(5)
    p = Params(iodine.init(cfg, 1), dtype)
    p.flat[...] += (0.05 * rng.standard_normal(p.flat.size)).astype(dtype)
    x = rng.random((2, iodine.channels(cfg), 17, 17)).astype(dtype)
    noise = iodine.draw_noise(cfg, 2, 3, 1, 0).astype(dtype)
    weights = SimpleNamespace(sigma=0.5, iterations=[0.1, 0.4, 0.7, 1.0])
    loss, back = iodine.objective(p, cfg, x, noise, weights)
    g = p.grads()
    back(g)

    theirs = {key: torch.tensor(a, requires_grad=True) for key, a in p.items()}
    twin = twin_iodine.objective(theirs, cfg, torch.tensor(x), torch.tensor(noise), weights)
    twin.backward()
    assert loss == pytest.approx(twin.item(), rel=BOUNDS[dtype])
    largest = np.abs(g.flat).max()
    for key, a in theirs.items():
        want = np.zeros(a.shape) if a.grad is None else a.grad.numpy()
        assert np.abs(g[key] - want).max() <= BOUNDS[dtype] * largest, key
