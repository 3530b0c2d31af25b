"""Residual: what stands for the columns that were not chosen.

Each function returns, for every query, the logarithm of their total mass `Σ exp(s q·k_j)` and the mean value under that
mass, both approximated from statistics that do not depend on the query.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rest(NamedTuple):
    """The columns that were not chosen.

    Attributes:
        key: `[r, p]`.
        value: `[r, pv]`.
        stratum: `[r]` int64, see `strata.assign`; only `second_order` looks at it.
    """

    key: Tensor
    value: Tensor
    stratum: Tensor


def geometric(query: Tensor, chosen_key: Tensor, rest: Rest, scale: float) -> tuple[Tensor, Tensor]:
    """Eq. 6 of the paper: a column counts as the geometric mean of the *chosen*, `g = exp(s q·mean(K_chosen))`.

    Args:
        query: `[m, p]`.
        chosen_key: `[d, p]`.
        rest: The columns not chosen.
        scale: Multiplies the logits.

    Returns:
        `[m]` log mass `log r + s q·mean(K_chosen)` and `[pv]` mean value.
    """
    return _log_mass(query, chosen_key.mean(0), len(rest.key), scale), rest.value.mean(0)


def mean(query: Tensor, chosen_key: Tensor, rest: Rest, scale: float) -> tuple[Tensor, Tensor]:
    """The geometric mean of the columns *not* chosen, `exp(s q·mean(K_rest))`. Otherwise as `geometric`."""
    return _log_mass(query, rest.key.mean(0), len(rest.key), scale), rest.value.mean(0)


def second_order(query: Tensor, chosen_key: Tensor, rest: Rest, scale: float) -> tuple[Tensor, Tensor]:
    """Second-order expansion around the means of the strata.

    With `N_c`, `k̄_c`, `v̄_c` the size and means of stratum `c` of the columns not chosen, `Σ = cov(k, k)` and
    `C = cov(k, v)` within strata (pooled over them), `z = 1 + s²/2 qᵀΣq` and `w_c = N_c exp(s q·k̄_c)`: mass
    `z Σ_c w_c`, mean value `Σ_c w_c v̄_c / Σ_c w_c + s Cᵀq / z`. By Cauchy-Schwarz the second term stays within
    `1/√2` standard deviations of the values.

    Arguments as in `geometric`.

    Returns:
        `[m]` log mass and `[m, pv]` mean value.
    """
    labels, stratum = rest.stratum.unique(return_inverse=True)
    members = F.one_hot(stratum, len(labels)).to(rest.key.dtype)  # [r, strata]
    size = members.sum(0)
    key_mean, value_mean = members.T @ rest.key / size[:, None], members.T @ rest.value / size[:, None]
    key_spread, value_spread = rest.key - key_mean[stratum], rest.value - value_mean[stratum]
    key_covariance = key_spread.T @ key_spread / len(rest.key)
    key_value_covariance = key_spread.T @ value_spread / len(rest.key)
    z = 1 + scale**2 / 2 * ((query @ key_covariance) * query).sum(-1)
    log_weight = size.log() + scale * query @ key_mean.T
    log_mass = torch.logsumexp(log_weight, -1) + z.log()
    return log_mass, log_weight.softmax(-1) @ value_mean + scale * (query @ key_value_covariance) / z[:, None]


def _log_mass(query: Tensor, key: Tensor, count: int, scale: float) -> Tensor:
    return math.log(count) + scale * (query @ key)


RESIDUALS = {"geometric": geometric, "mean": mean, "second_order": second_order}
