"""A smooth function of a few coordinates through noisy values, and how far it may be off between them.

Gaussian process regression (Rasmussen and Williams 2006, chapter 2) over a plane with wide priors (section 2.7), with
the Matern 5/2 kernel. A dozen values say little of how quickly a function bends, so no one bend is picked: predictions
of several are averaged by how likely each makes the values, and where they disagree, that is part of the deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_REACHES = (1.5, 3.0, 6.0)  # along each coordinate, over which the function keeps its bend
_BENDS = (0.03, 0.1, 0.3, 1.0)  # standard deviations of what departs from a plane
_ROUGHNESS = (0.004, 0.012, 0.036)  # of what jumps from point to point, whatever is near
_LEVEL, _SLOPE = 3.0, 0.7  # of the plane: its value in the middle, and for each unit of a coordinate


@dataclass(frozen=True)
class Surface:
    """Fitted to values at points; see `fit`.

    level: the values' mean. weights: (k,), of k combinations of bend, reach and roughness. solved: (k, n), inverse:
    (k, n, n), of each.
    """

    points: Array
    middle: Array
    level: float
    reaches: Array
    bends: Array
    roughness: Array
    weights: Array
    solved: Array
    inverse: Array

    @classmethod
    def fit(cls, points: Array, values: Array, noise: Array) -> Surface:
        """points: (n, d), coordinates of a like scale. values: (n,). noise: (n,), standard deviation of each value."""
        dimensions = points.shape[1]
        every = [*product(_BENDS, _ROUGHNESS, *[_REACHES] * dimensions)]
        hyper = np.array(every)
        bends, roughness, reaches = hyper[:, 0], hyper[:, 1], hyper[:, 2:]
        middle = (points.min(axis=0) + points.max(axis=0)) / 2
        covariance = _covariance(points, points, middle, reaches, bends)
        own = noise[None, :] ** 2 + roughness[:, None] ** 2
        covariance += own[:, :, None] * np.eye(len(points))
        inverse = np.asarray(np.linalg.inv(covariance), dtype=float)
        level = float(values.mean())
        solved = inverse @ (values - level)
        _, volume = np.linalg.slogdet(covariance)
        likelihood = -0.5 * (solved @ (values - level)) - 0.5 * volume
        weights = np.exp(likelihood - likelihood.max())
        return cls(points, middle, level, reaches, bends, roughness, weights / weights.sum(), solved, inverse)

    def at(self, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation at each of the points (m, d): (m,) each."""
        cross = _covariance(points, self.points, self.middle, self.reaches, self.bends)  # (k, m, n)
        means = self.level + np.einsum("kmn,kn->km", cross, self.solved)
        plane = _LEVEL**2 + _SLOPE**2 * ((points - self.middle) ** 2).sum(axis=1)
        known = np.einsum("kmn,knl,kml->km", cross, self.inverse, cross)
        variances = plane + (self.bends**2 + self.roughness**2)[:, None] - known
        mean = self.weights @ means
        spread = self.weights @ (np.maximum(variances, 0.0) + (means - mean) ** 2)
        return mean, np.sqrt(spread)


def _covariance(one: Array, other: Array, middle: Array, reaches: Array, bends: Array) -> Array:
    """(k, m, n), of the function's values at m and at n points."""
    apart = one[:, None, :] - other[None, :, :]
    r = np.sqrt(5 * (apart[None] ** 2 / reaches[:, None, None, :] ** 2).sum(axis=-1))
    smooth = bends[:, None, None] ** 2 * (1 + r + r**2 / 3) * np.exp(-r)
    plane = _LEVEL**2 + _SLOPE**2 * (one - middle) @ (other - middle).T
    return np.asarray(smooth + plane)
