"""Our gradients against autograd: the whole model, in float64, on the same numbers and noise."""

from types import SimpleNamespace

import pytest

import sqair_moving as sqair
from test_sqair import setting

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("changes", [
    {}, {"through_time": True, "explain_away": False, "later": 2}, {"model": "air"},
    {"walls": True, "through_time": True},
    {"objective": "vimco", "particles": 3, "through_time": True}], ids=str)
def test_gradient_is_that_of_autograd(changes, dense):
    from bench import twin_sqair

    cfg, p, videos, noise, weights = setting(batch=6, **changes)
    loss, back = sqair.objective(p, cfg, videos, noise, weights)
    g = p.grads()
    back(g)

    theirs = {name: torch.tensor(a, requires_grad=True) for name, a in p.items()}
    noise = [SimpleNamespace(eps=torch.tensor(n.eps), uniform=torch.tensor(n.uniform))
             for n in noise]
    twin = twin_sqair.objective(theirs, cfg, torch.tensor(videos), noise, weights, dense)
    twin.backward()
    assert loss == pytest.approx(twin.item(), rel=1e-10)
    for name, a in theirs.items():
        want = torch.zeros_like(a) if a.grad is None else a.grad
        error = abs(g[name] - want.numpy()).max()
        assert error <= 1e-10 * abs(g.flat).max(), (name, error)
