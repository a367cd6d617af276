"""Our gradients against autograd: the whole model, in float64 and float32, on the same numbers."""

from types import SimpleNamespace

import numpy as np
import pytest

import iodine_tetris as iodine
from common.params import Params

torch = pytest.importorskip("torch")

SETTINGS = {
    "default": {},
    "dsprites, leaky, lstm": {"data": "dsprites", "activation": "leaky", "lstm": True,
                              "decoder_layers": 2},
    "paper": {"decoder": "broadcast", "kernel": 5, "refine_kernel": 5, "pool": "average"},
    "binary, logistic": {"data": "binary", "components": "logistic", "decoder": "broadcast"},
    "patch": {"decoder": "patch", "patch": 4, "decoder_layers": 3},
    "binary, round patch": {"data": "binary", "decoder": "patch", "patch": 7, "masks": "round"},
    "composite": {"components": "composite"},
}
BOUNDS = {np.float64: 1e-9, np.float32: 1e-4}


def same_numbers(dtype, **changes):
    """A small model, and what `objective` takes."""
    cfg = iodine.Config(canvas=17, iterations=3, latents=6, rank=5, features=6, layers=3,
                        decoder_units=12, refine_features=5, units=9, **changes)
    rng = np.random.default_rng(5)
    p = Params(iodine.init(cfg, 1), dtype)
    p.flat[...] += (0.05 * rng.standard_normal(p.flat.size)).astype(dtype)
    x = rng.random((2, iodine.channels(cfg), 17, 17)).astype(dtype)
    noise = iodine.draw_noise(cfg, 2, 3, 1, 0).astype(dtype)
    return p, cfg, x, noise, SimpleNamespace(sigma=0.5, iterations=[0.1, 0.4, 0.7, 1.0])


def theirs(run, p, cfg, x, noise, weights):
    """The twin's loss, and its gradient by name."""
    tensors = {key: torch.tensor(a, requires_grad=True) for key, a in p.items()}
    loss = run(tensors, cfg, torch.tensor(x), torch.tensor(noise), weights)
    loss.backward()
    return loss.item(), {key: np.zeros(a.shape) if a.grad is None else a.grad.numpy()
                         for key, a in tensors.items()}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("backprop", ["steps", "all"])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_is_that_of_autograd(name, backprop, dtype):
    from bench import twin_iodine

    numbers = same_numbers(dtype, backprop=backprop, **SETTINGS[name])
    loss, back = iodine.objective(*numbers)
    g = numbers[0].grads()
    back(g)
    twin, want = theirs(twin_iodine.objective, *numbers)
    assert loss == pytest.approx(twin, rel=BOUNDS[dtype])
    largest = np.abs(g.flat).max()
    for key, a in want.items():
        assert np.abs(g[key] - a).max() <= BOUNDS[dtype] * largest, key


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_parts_have_the_same_gradient(monkeypatch):
    """By the tracer and the splitter of torch.compile; the code generator takes a minute."""
    from bench import twin_iodine

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend="aot_eager", **how))
    numbers = same_numbers(np.float64)
    loss, want = theirs(twin_iodine.objective, *numbers)
    twin, found = theirs(twin_iodine.compiled(), *numbers)
    assert twin == pytest.approx(loss, rel=1e-12)
    for key, a in want.items():
        assert np.abs(found[key] - a).max() <= 1e-9 * np.abs(a).max(), key
