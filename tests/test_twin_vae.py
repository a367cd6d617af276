"""The VAE's gradients against autograd: the whole model, in float64, on the same noise."""

import numpy as np
import pytest

from test_vae import setting

torch = pytest.importorskip("torch")


def test_gradient_is_that_of_autograd():
    import vae_scenes as vae
    from bench import twin_vae

    cfg, p, x, eps = setting(batch=4, kl_weight=2.0)
    loss, _, _, back = vae.objective(p, cfg, x, eps, 0.2)
    g = p.grads()
    back(g)
    theirs = {name: torch.tensor(a, requires_grad=True) for name, a in p.items()}
    twin = twin_vae.objective(theirs, cfg, torch.tensor(x), torch.tensor(eps), 0.2)
    twin.backward()
    assert loss == pytest.approx(twin.item(), rel=1e-10)
    largest = np.abs(g.flat).max()
    for name, a in theirs.items():
        assert np.abs(g[name] - a.grad.numpy()).max() <= 1e-10 * largest, name
