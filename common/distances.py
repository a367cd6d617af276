"""How far two sets of things are apart, by the features (N, D) of each. Host arrays, host numbers.

Generated pictures are compared with real ones so (Heusel et al., 2017; Binkowski et al., 2018); the
numbers mean what the features do, and compare only with numbers on the same features.
"""

import numpy as np


def frechet(a, b):
    """Frechet's distance, squared, of the Gaussians with the means and covariances of a and b.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), where tr (A B)^(1/2) is the sum of the roots of
    the eigenvalues of A^(1/2) B A^(1/2).
    """
    away = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    A, B = (np.atleast_2d(np.cov(x.T.astype(np.float64))) for x in (a, b))
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
    return float(away @ away + np.trace(A) + np.trace(B) - 2 * both)


def kernel(a, b, block=1000):
    """Unbiased estimate of the squared maximum mean discrepancy, and its standard error.

    The kernel is (x.y / D + 1)^3. Blocks of a meet blocks of b, each feature once; the mean over
    them is told. It can be below 0. Needs two blocks for an error (NaN with one).
    """
    size = min(block, len(a), len(b))
    starts = range(0, min(len(a), len(b)) - size + 1, size)
    each = [discrepancy(a[k:k + size].astype(np.float64), b[k:k + size].astype(np.float64))
            for k in starts]
    error = np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.nan
    return float(np.mean(each)), float(error)


def discrepancy(a, b):
    """Mean k(a, a') + mean k(b, b') - 2 mean k(a, b) over pairs of two different things."""
    aa, ab, bb = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (a, b), (b, b)))
    apart = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb)]
    return sum(apart) - 2 * ab.mean()
