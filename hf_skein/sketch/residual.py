"""Residual: what stands for the columns that were not chosen.

Each function returns, for every query, the logarithm of their total mass `Σ exp(s q·k_j)` and the mean value under that
mass, both approximated from statistics that do not depend on the query.
"""

from __future__ import annotations

import math

from torch import Tensor


def geometric(query: Tensor, chosen_key: Tensor, rest_key: Tensor, rest_value: Tensor, scale: float):
    """Eq. 6 of the paper: a column counts as the geometric mean of the *chosen*, `g = exp(s q·mean(K_chosen))`.

    Args:
        query: `[m, p]`.
        chosen_key: `[d, p]`.
        rest_key: `[r, p]`, keys not chosen.
        rest_value: `[r, pv]`.
        scale: Multiplies the logits.

    Returns:
        `[m]` log mass `log r + s q·mean(K_chosen)` and `[pv]` mean value.
    """
    return _log_mass(query, chosen_key.mean(0), len(rest_key), scale), rest_value.mean(0)


def mean(query: Tensor, chosen_key: Tensor, rest_key: Tensor, rest_value: Tensor, scale: float):
    """The geometric mean of the columns *not* chosen, `exp(s q·mean(K_rest))`. Otherwise as `geometric`."""
    return _log_mass(query, rest_key.mean(0), len(rest_key), scale), rest_value.mean(0)


def second_order(query: Tensor, chosen_key: Tensor, rest_key: Tensor, rest_value: Tensor, scale: float):
    """Second-order expansion around the mean of the columns not chosen.

    With `k̄`, `v̄`, `Σ = cov(k, k)`, `C = cov(k, v)` over them and `z = 1 + s²/2 qᵀΣq`: mass `r exp(s q·k̄) z`, mean value
    `v̄ + s Cᵀq / z`. By Cauchy-Schwarz the second term stays within `1/√2` standard deviations of the values.

    Arguments as in `geometric`.

    Returns:
        `[m]` log mass and `[m, pv]` mean value.
    """
    key_mean, value_mean = rest_key.mean(0), rest_value.mean(0)
    key_spread, value_spread = rest_key - key_mean, rest_value - value_mean
    key_covariance = key_spread.T @ key_spread / len(rest_key)
    key_value_covariance = key_spread.T @ value_spread / len(rest_key)
    z = 1 + scale**2 / 2 * ((query @ key_covariance) * query).sum(-1)
    log_mass = _log_mass(query, key_mean, len(rest_key), scale) + z.log()
    return log_mass, value_mean + scale * (query @ key_value_covariance) / z[:, None]


def _log_mass(query: Tensor, key: Tensor, count: int, scale: float) -> Tensor:
    return math.log(count) + scale * (query @ key)


RESIDUALS = {"geometric": geometric, "mean": mean, "second_order": second_order}
