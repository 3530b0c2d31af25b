"""What every kernel shares: how rows are loaded, how large tiles are, and in which precision float32 is multiplied."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """One configuration of a kernel.

    Attributes:
        rows: Rows of a tile (queries, or keys where a kernel owns keys); 0 where there is no choice.
        keys: Rows of what streams by.
        warps: Warps per program.
        stages: Loads in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int


ON_ROCM = torch.version.hip is not None

# By kernel, then by the largest (padded) head dimension that a configuration serves.
CONFIGS: dict[str, dict[int, Config]] = {
    "totals": {
        128: Config(64, 16, 8, 2),
        256: Config(32, 32, 8, 1),
        512: Config(32, 16, 8, 1),
    },
    "blocks": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 32, 8, 1)},
    "residual": {
        64: Config(64, 32, 8, 2),
        128: Config(64, 16, 8, 2),
        256: Config(32, 32, 8, 1),
        512: Config(32, 16, 8, 1),
    },
    "forward": {
        64: Config(64, 64, 4, 2),
        128: Config(64, 32, 8, 2),
        256: Config(32, 32, 8, 1),
        512: Config(16, 16, 8, 1),
    },
    "backward_query": {
        64: Config(64, 32, 4, 2),
        128: Config(32, 32, 8, 2),
        256: Config(32, 16, 8, 1),
        512: Config(16, 16, 8, 1),
    },
    "backward_keys": {
        64: Config(64, 32, 4, 2),
        128: Config(64, 16, 8, 2),
        256: Config(32, 16, 8, 1),
        512: Config(16, 16, 8, 1),
    },
    "covariance": {
        64: Config(64, 64, 4, 2),
        128: Config(32, 32, 8, 2),
        256: Config(16, 16, 8, 1),
        512: Config(16, 16, 8, 1),
    },
    "components": {
        64: Config(0, 64, 4, 1),
        128: Config(0, 32, 8, 1),
        256: Config(0, 16, 8, 1),
        512: Config(0, 16, 8, 1),
    },
    "points": {64: Config(0, 128, 4, 2), 128: Config(0, 64, 4, 2), 256: Config(0, 64, 4, 2), 512: Config(0, 32, 4, 1)},
    "pilots": {
        64: Config(64, 64, 4, 2),
        128: Config(32, 32, 8, 2),
        256: Config(16, 32, 8, 1),
        512: Config(16, 16, 8, 1),
    },
    "score": {
        64: Config(16, 64, 8, 2),
        128: Config(32, 32, 8, 2),
        256: Config(16, 32, 8, 1),
        512: Config(16, 16, 8, 1),
    },
    "strata": {64: Config(0, 64, 4, 2), 128: Config(0, 16, 8, 2), 256: Config(0, 16, 8, 1), 512: Config(0, 16, 8, 1)},
    "exact": {
        64: Config(64, 64, 4, 2),
        128: Config(64, 32, 8, 2),
        256: Config(32, 32, 8, 1),
        512: Config(16, 16, 8, 1),
    },
    "exact_keys": {
        64: Config(64, 32, 8, 2),
        128: Config(64, 16, 8, 2),
        256: Config(32, 16, 8, 1),
        512: Config(16, 16, 8, 1),
    },
}


def config(kernel: str, *head_dims: int, like: Tensor | None = None, dropout: float = 0.0) -> Config:
    """The configuration of a kernel for some (padded) head dimensions.

    Numbers of float32 count four times, because they are multiplied from registers; where a weight may be dropped,
    random numbers take registers, hence warps.
    """
    largest = max(head_dims) * (4 if like is not None and like.dtype == torch.float32 else 1)
    found = next(c for limit, c in CONFIGS[kernel].items() if min(largest, 512) <= limit)
    if dropout:
        found = found._replace(rows=max(16, found.rows // 2), warps=8)
    return found._replace(warps=min(found.warps, 4)) if ON_ROCM else found  # a warp has twice as many threads there


def padded(p: int) -> int:
    """The power of two, at least 16, that holds a head dimension or a number of strata."""
    return max(16, triton.next_power_of_2(p))


def precision(x: Tensor) -> str:
    """How float32 tiles are multiplied: as they are, unless the inputs are shorter or PyTorch allows TF32.

    Of AMD's GPUs only gfx942 has TF32, and Triton refuses it on the others.
    """
    is_short = x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_short and not ON_ROCM else "ieee"


LOG2_E = tl.constexpr(math.log2(math.e))

# Triton's interpreter multiplies bfloat16 as if it were integers; there, it is widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """`b_sum + b_left @ b_right`, the sum in float32; `b_sum` may be None."""
    if INTERPRETED:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def load_rows(p_x, stride, o_rows, m_rows, o_cols, m_cols):
    """Rows of one head. `[N]` row indices and `[P]` columns to `[N, P]`; zero where masked."""
    pointers = p_x + o_rows.to(tl.int64)[:, None] * stride + o_cols[None, :]
    return tl.load(pointers, mask=m_rows[:, None] & m_cols[None, :], other=0.0)


@triton.jit
def load_centred(p_x, stride, o_rows, m_rows, o_cols, m_cols, b_mean):
    """As `load_rows`, less the mean `[P]`, rounded to the dtype of the rows: every kernel sees the same numbers."""
    b_x = load_rows(p_x, stride, o_rows, m_rows, o_cols, m_cols)
    b_centred = tl.where(m_rows[:, None] & m_cols[None, :], b_x.to(tl.float32) - b_mean[None, :], 0.0)
    return b_centred.to(b_x.dtype)


@triton.jit
def store_rows(p_x, stride, o_rows, m_rows, o_cols, m_cols, b_x):
    pointers = p_x + o_rows.to(tl.int64)[:, None] * stride + o_cols[None, :]
    tl.store(pointers, b_x.to(p_x.dtype.element_ty), mask=m_rows[:, None] & m_cols[None, :])


@triton.jit
def softmax_step(b_logit, b_max, b_mass):
    """Online softmax to base 2 over logits `[N, M]`: their weights, the factor `[N, 1]` of what is summed already, and
    the maximum and the mass of each row from here on."""
    b_new_max = tl.maximum(b_max, tl.max(b_logit, 1))
    b_weight, b_shrink = tl.exp2(b_logit - b_new_max[:, None]), tl.exp2(b_max - b_new_max)
    return b_weight, b_shrink[:, None], b_new_max, b_mass * b_shrink + tl.sum(b_weight, 1)


@triton.jit
def kept(p_seed, rate, row, b_keys, n_keys):
    """Dropout: the factor, 0 or `1 / (1 - rate)`, of the weights of rows `[N, 1]` for keys `[1, M]`; `[N, M]`.

    A number depends on the seed, the row (within all heads) and the key alone, so every pass sees the same.
    """
    b_random = tl.rand(tl.load(p_seed), row.to(tl.int64) * n_keys + b_keys)
    return tl.where(b_random >= rate, 1.0 / tl.maximum(1.0 - rate, 1e-30), 0.0)


@triton.jit
def bin_of_rank(b_histogram, rank):
    """The first bin up to and with which there are at least `rank` entries, and how many are below it."""
    b_cumulative = tl.cumsum(b_histogram, 0)
    b_below = b_cumulative < rank
    return tl.sum(b_below.to(tl.int32), 0), tl.max(tl.where(b_below, b_cumulative, 0), 0)
