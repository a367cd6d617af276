"""Our gradients against autograd: the whole model, in float64, on the same numbers and noise."""

from types import SimpleNamespace

import numpy as np
import pytest

import air_multimnist as air
from common.params import Params

torch = pytest.importorskip("torch")

WEIGHTS = SimpleNamespace(temperature=3.0, spread=0.4, C=2.0, presence=1.5, tau=0.7)


@pytest.mark.parametrize("data", ["digits", "sprites"])
@pytest.mark.parametrize("estimator", air.ESTIMATORS)
@pytest.mark.parametrize("model", air.FIND)
def test_gradient_is_that_of_autograd(model, estimator, data, rng):
    from bench import twin_air

    cfg = air.Config(model=model, estimator=estimator, data=data, canvas=20, glimpse=9, hidden=24,
                     what=7, units=16)
    p = Params(air.init(cfg, 1), np.float64)
    p.flat[...] += 0.1 * rng.standard_normal(p.flat.size)
    x = rng.random((6, air.channels(cfg), 20, 20))
    noise = {k: a.astype(float) for k, a in vars(air.draw_noise(cfg, 6, 1, 0)).items()}
    loss, back = air.objective(p, cfg, x, SimpleNamespace(**noise), WEIGHTS)
    g = p.grads()
    back(g)

    theirs = {name: torch.tensor(a, requires_grad=True) for name, a in p.items()}
    noise = SimpleNamespace(**{k: torch.tensor(a) for k, a in noise.items()})
    twin = twin_air.objective(theirs, cfg, torch.tensor(x), noise, WEIGHTS)
    twin.backward()
    if estimator != "nvil":                             # whose surrogate has no value to compare
        assert loss == pytest.approx(twin.item(), rel=1e-10)
    largest = np.abs(g.flat).max()
    for name, a in theirs.items():
        want = np.zeros(a.shape) if a.grad is None else a.grad.numpy()
        assert np.abs(g[name] - want).max() <= 1e-10 * largest, name
