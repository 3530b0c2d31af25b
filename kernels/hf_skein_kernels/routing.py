"""Routing: the balanced tree of `sketch.routing`, on the device.

A level of the tree is one launch with one program per node: its queries lie side by side, so the program finds the
median of the coordinate that varies most by two histograms of 256 bins, and then copies the queries to either half.
Nothing is sorted, the halves keep their order, and no two programs exchange anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .covariance import covariance, finite
from .layout import Layout
from .tiles import bin_of_rank, config, dot, load_rows, padded, precision


COMPONENTS = 8
SAMPLE = 512  # queries and keys that the components are taken from
SUBSPACE_ITERATIONS = 2
CHUNK = 1024  # queries of one program, for their coordinates
STRIDE = 5  # in a large node, every so many queries are looked at for the variance
WIDTH = tl.constexpr(16)  # of a tile that holds the components: the narrowest that tensor cores take

_TILE = 2048  # ranks of a node that are looked at together: one size for all, so that padding changes no rounding


# --- kernels ---


@triton.jit
def largest_entry(p_matrix, p: tl.constexpr, P: tl.constexpr, BK: tl.constexpr):
    o_p = tl.arange(0, P)
    b_largest = tl.zeros([P], tl.float32)
    for first in tl.static_range(0, P, BK):
        o_k = first + tl.arange(0, BK)
        # [P, BK]
        b_matrix = load_rows(p_matrix, p, o_p, o_p < p, o_k, o_k < p)
        b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_matrix), 1))
    return tl.maximum(tl.max(b_largest, 0), 1e-37)


@triton.jit
def symmetric_product(
    p_matrix, b_x, largest, p: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """`matrix / largest @ x`, with `x [P, WIDTH]`.

    Tiles of `x` are picked by a sum, not by way of memory: on AMD a barrier does not wait for what was written there.
    """
    o_p, o_tile = tl.arange(0, P), tl.arange(0, P // BK)
    b_tiles = tl.reshape(b_x, [P // BK, BK, WIDTH])
    b_product = tl.zeros([P, WIDTH], tl.float32)
    for i in range(0, P // BK):  # not unrolled: all tiles would be in shared memory at a time
        o_k = i * BK + tl.arange(0, BK)
        # [P, BK], [BK, WIDTH]
        b_matrix = load_rows(p_matrix, p, o_p, o_p < p, o_k, o_k < p) / largest
        b_tile = tl.sum(tl.where((o_tile == i)[:, None, None], b_tiles, 0.0), 0)
        b_product = dot(b_matrix, b_tile, b_product, PRECISION)
    return b_product


@triton.jit
def components_kernel(
    p_keys, p_queries, p_blocks, p_out, HEADS, GROUP,
    p: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, COMPONENTS: tl.constexpr, ITERATIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Directions `[p, COMPONENTS]` whose products with a query are the principal components of its logits.

    With the covariances `Σ = LLᵀ` of keys and `C` of queries these are `y = L u` for the top eigenvectors `u` of
    `LᵀCL`. Written with `y = Σ e` no factor is needed: iterate `e ← C Σ e` and keep `eᵀΣe` the identity.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    if tl.load(p_blocks + i_bh // HEADS) < 2:
        return
    p_keys += (i_bh // GROUP) * p * p  # HEADS is GROUP times the number of key heads
    p_queries += i_bh * p * p
    o_p, o_c = tl.arange(0, P), tl.arange(0, WIDTH)
    of_keys, of_queries = largest_entry(p_keys, p, P, BK), largest_entry(p_queries, p, P, BK)

    # Start from the coordinates that matter most.
    o_diagonal = o_p * (p + 1)
    b_diagonal = tl.load(p_keys + o_diagonal, mask=o_p < p, other=-1.0) / of_keys
    b_diagonal *= tl.load(p_queries + o_diagonal, mask=o_p < p, other=1.0) / of_queries
    b_e = tl.zeros([P, WIDTH], tl.float32)
    for i in range(COMPONENTS):
        o_top = tl.argmax(b_diagonal, 0)
        b_e = tl.where((o_p == o_top)[:, None] & (o_c == i)[None, :], 1.0, b_e)
        b_diagonal = tl.where(o_p == o_top, -1.0, b_diagonal)
    b_y = symmetric_product(p_keys, b_e, of_keys, p, P, BK, PRECISION)
    for _ in range(ITERATIONS + 1):
        b_e = symmetric_product(p_queries, b_y, of_queries, p, P, BK, PRECISION)
        b_y = symmetric_product(p_keys, b_e, of_keys, p, P, BK, PRECISION)
        b_before = tl.sum(b_e * b_y, 0)
        for i in range(COMPONENTS):  # Gram-Schmidt
            b_this = tl.where(o_c == i, 1.0, 0.0)
            b_e_i, b_y_i = tl.sum(b_e * b_this[None, :], 1), tl.sum(b_y * b_this[None, :], 1)
            b_dots = tl.sum(b_e * b_y_i[:, None], 0)
            square, before = tl.sum(b_dots * b_this, 0), tl.sum(b_before * b_this, 0)
            # What others span up to rounding is left out: zeros are coordinates that never vary.
            inverse = tl.where(square > 1e-5 * before, 1.0 / tl.sqrt(tl.maximum(square, 1e-37)), 0.0)
            b_factor = tl.where(o_c > i, b_dots * inverse * inverse, tl.where(o_c == i, 1.0 - inverse, 0.0))
            b_e -= b_e_i[:, None] * b_factor[None, :]
            b_y -= b_y_i[:, None] * b_factor[None, :]
    b_y /= tl.maximum(tl.max(tl.max(tl.abs(b_y), 1), 0), 1e-37)
    p_tile = p_out + (i_bh * p + o_p[:, None]) * COMPONENTS + o_c[None, :]
    tl.store(p_tile, b_y, mask=(o_p < p)[:, None] & (o_c < COMPONENTS)[None, :])


@triton.jit
def points_kernel(
    p_q, p_directions, p_index, p_length, p_blocks, p_out, stride_b, stride_h, stride_n, n, HEADS, CHUNKS,
    p: tl.constexpr, P: tl.constexpr, COMPONENTS: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    if tl.load(p_blocks + i_b) < 2:
        return
    length = tl.load(p_length + i_b)
    o_p, o_c = tl.arange(0, P), tl.arange(0, WIDTH)
    # [P, WIDTH]
    b_directions = load_rows(p_directions + i_bh * p * COMPONENTS, COMPONENTS, o_p, o_p < p, o_c, o_c < COMPONENTS)
    for first in range(i_chunk * CHUNK, tl.minimum(i_chunk * CHUNK + CHUNK, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        # [BN, P]
        b_q = load_rows(p_q + i_b * stride_b + i_h * stride_h, stride_n, o_n, m_rank, o_p, o_p < p)
        b_points = finite(dot(b_q, b_directions.to(b_q.dtype), None, PRECISION))
        b_points = tl.minimum(tl.maximum(b_points, -1e15), 1e15)  # squares stay finite
        p_tile = p_out + (i_bh * COMPONENTS + o_c[None, :]) * n + o_n[:, None]
        tl.store(p_tile, b_points, mask=m_rank[:, None] & (o_c < COMPONENTS)[None, :])


@triton.jit
def load_codes(p_points, p_in, o_rank, m_rank, mean, unit):
    """Queries at some ranks, and their coordinates as 16-bit integers."""
    o_n = tl.load(p_in + o_rank, mask=m_rank, other=0)
    b_x = tl.load(p_points + o_n, mask=m_rank, other=0.0)
    return o_n, tl.minimum(tl.maximum((b_x - mean) * unit + 32768.0, 0.0), 65535.0).to(tl.int32)


@triton.jit
def split_kernel(
    p_points, p_in, p_out, p_length, p_blocks, in_stride_b, in_stride_h, n, HEADS, nodes,
    COMPONENTS: tl.constexpr, BN: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Part a node in two; or copy the order of a sequence that has no more nodes to part."""
    i_node, i_bh = tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    length, blocks = tl.load(p_length + i_b).to(tl.int64), tl.load(p_blocks + i_b).to(tl.int64)
    p_in += i_b * in_stride_b + i_h * in_stride_h
    p_out += i_bh * n
    if i_node == 0:  # padding, and queries that stay where they are
        for start in range(tl.where(blocks > nodes, length, 0), n, BN):
            o_rank = start + tl.arange(0, BN)
            tl.store(p_out + o_rank, tl.load(p_in + o_rank, mask=o_rank < n), mask=o_rank < n)
    if blocks <= nodes:
        return
    leaves = blocks // nodes
    first = i_node * leaves * length // blocks
    middle = (i_node * leaves + leaves // 2) * length // blocks
    last = (i_node + 1) * leaves * length // blocks
    # The coordinate that varies most.
    stride = tl.where(last - first >= 32 * STRIDE, STRIDE, 1)
    o_c = tl.arange(0, COMPONENTS)
    p_all = p_points + (i_bh * COMPONENTS + o_c) * n
    b_shift = tl.load(p_all + tl.load(p_in + first))
    b_sum, b_square = tl.zeros([COMPONENTS], tl.float32), tl.zeros([COMPONENTS], tl.float32)
    for start in range(first, last, BN // COMPONENTS * stride):
        o_rank = start + tl.arange(0, BN // COMPONENTS) * stride
        o_n = tl.load(p_in + o_rank, mask=o_rank < last, other=0)
        # [COMPONENTS, BN // COMPONENTS]
        b_x = tl.load(p_all[:, None] + o_n[None, :], mask=(o_rank < last)[None, :], other=0.0) - b_shift[:, None]
        b_x = tl.where((o_rank < last)[None, :], b_x, 0.0)
        b_sum += tl.sum(b_x, 1)
        b_square += tl.sum(b_x * b_x, 1)
    count = tl.cdiv(last - first, stride).to(tl.float32)
    b_variance = b_square / count - (b_sum / count) * (b_sum / count)
    axis = tl.argmax(b_variance, 0)
    mean = tl.sum(tl.where(o_c == axis, b_shift + b_sum / count, 0.0), 0)
    # No median is farther from the mean than one standard deviation; the 16 bits reach to two.
    unit = 16384.0 / tl.sqrt(tl.maximum(tl.max(b_variance, 0), 1e-37))
    p_axis = p_points + (i_bh * COMPONENTS + axis) * n
    # Its median: of all codes up to that of the last query of the lower half, first the upper 8 bits, then the lower.
    b_histogram = tl.zeros([256], tl.int32)
    for start in range(first, last, BN):
        o_rank = start + tl.arange(0, BN)
        o_n, b_code = load_codes(p_axis, p_in, o_rank, o_rank < last, mean, unit)
        b_histogram += tl.histogram(b_code >> 8, 256, mask=o_rank < last)
    upper_bits, below = bin_of_rank(b_histogram, middle - first)
    b_histogram = tl.zeros([256], tl.int32)
    for start in range(first, last, BN):
        o_rank = start + tl.arange(0, BN)
        o_n, b_code = load_codes(p_axis, p_in, o_rank, o_rank < last, mean, unit)
        b_histogram += tl.histogram(b_code & 255, 256, mask=(o_rank < last) & (b_code >> 8 == upper_bits))
    lower_bits, below_here = bin_of_rank(b_histogram, middle - first - below)
    median = upper_bits * 256 + lower_bits
    ties = middle - first - below - below_here  # queries of the median's own code that belong to the lower half
    lower, seen = first * 0, first * 0
    for start in range(first, last, BN):
        o_rank = start + tl.arange(0, BN)
        m_rank = o_rank < last
        o_n, b_code = load_codes(p_axis, p_in, o_rank, m_rank, mean, unit)
        b_tie = ((b_code == median) & m_rank).to(tl.int32)
        b_lower = (b_code < median) | ((b_code == median) & (seen + tl.cumsum(b_tie, 0) <= ties))
        b_lower = (b_lower & m_rank).to(tl.int32)
        b_place = lower + tl.cumsum(b_lower, 0) - b_lower  # lower ones before this one
        b_place = tl.where(b_lower == 1, first + b_place, middle + o_rank - first - b_place)
        tl.store(p_out + b_place, o_n, mask=m_rank)
        lower += tl.sum(b_lower, 0)
        seen += tl.sum(b_tie, 0)


# --- launchers ---


def directions(query: Tensor, key: Tensor, layout: Layout) -> Tensor:
    """Directions of the principal components of the logits: `[B, H, p, COMPONENTS]` float32, as `routing.route`."""
    batch, heads, _, p = query.shape
    of_queries = covariance(query, layout.query_index, layout.query_length, layout.blocks, sample=SAMPLE, least=2)
    of_keys = covariance(key, layout.key_index, layout.key_length, layout.blocks, sample=SAMPLE, least=2)
    out = torch.empty(batch, heads, p, COMPONENTS, dtype=torch.float32, device=query.device)
    conf = config("components", padded(p), like=query)
    components_kernel[(batch * heads,)](
        of_keys, of_queries, layout.blocks, out, heads, heads // key.shape[1],
        p=p, P=padded(p), BK=min(conf.keys, padded(p)), COMPONENTS=COMPONENTS, ITERATIONS=SUBSPACE_ITERATIONS,
        PRECISION=precision(query), num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    return out


def route(query: Tensor, key: Tensor, blocks: int, layout: Layout) -> Tensor:
    """Order the queries of every head block by block.

    Args:
        query: `[B, H, n_q, p]`, last stride 1.
        key: `[B, HK, n_k, p]`, last stride 1.
        blocks: Most blocks that a sequence of the padded length has; a power of two.
        layout: Where the valid tokens are, and how many blocks each sequence has.

    Returns:
        `[B, H, n_q]` int32, see `Selection.order`.
    """
    batch, heads, n, p = query.shape
    if blocks == 1:
        return layout.query_index[:, None].expand(-1, heads, -1)
    points = torch.empty(batch, heads, COMPONENTS, n, dtype=torch.float32, device=query.device)
    conf, chunks = config("points", padded(p), like=query), triton.cdiv(n, CHUNK)
    points_kernel[(batch * heads * chunks,)](
        query, directions(query, key, layout), layout.query_index, layout.query_length, layout.blocks, points,
        *query.stride()[:3], n, heads, chunks,
        p=p, P=padded(p), COMPONENTS=COMPONENTS, CHUNK=CHUNK, BN=conf.keys, PRECISION=precision(query),
        num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    return split(points, layout, blocks)


def split(points: Tensor, layout: Layout, blocks: int) -> Tensor:
    """The tree over `points [B, H, COMPONENTS, n_q]` float32; otherwise as `route`."""
    batch, heads, components, n = points.shape
    order, strides = layout.query_index, (n, 0)
    nodes = 1
    while nodes < blocks:
        out = torch.empty(batch, heads, n, dtype=torch.int32, device=points.device)
        split_kernel[(batch * heads, nodes)](
            points, order, out, layout.query_length, layout.blocks, *strides, n, heads, nodes,
            COMPONENTS=components, BN=_TILE, STRIDE=STRIDE, num_warps=8,
        )  # fmt: skip
        order, strides, nodes = out, (heads * n, n), 2 * nodes
    return order
