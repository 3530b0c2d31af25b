"""V-Mean: the mean of the values for every row."""

from __future__ import annotations

from torch import Tensor


def v_mean(query: Tensor, value: Tensor) -> Tensor:
    """V-Mean: every row is the mean of the values (the rank-one baseline of the paper).

    Args:
        query: `[..., n_q, p]`, only its shape is used.
        value: `[..., n_k, pv]`.

    Returns:
        `[..., n_q, pv]`.
    """
    return value.mean(-2, keepdim=True).expand(*query.shape[:-1], value.shape[-1])
