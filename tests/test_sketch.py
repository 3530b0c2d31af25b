"""The reference against direct transcriptions of the formulas, in float64."""

import itertools
import math

import pytest
import torch

from hf_skein import SkeinConfig
from hf_skein.sketch import adaptive, skeinformer, strata
from hf_skein.sketch.baselines import v_mean
from hf_skein.sketch.columns import draw_columns, log_value_norm, top_columns
from hf_skein.sketch.pilots import block_pilots, log_mean_exponential, log_rms_attention, random_rows
from hf_skein.sketch.random import COLUMN_STREAM, PILOT_STREAM, gumbel, uniform
from hf_skein.sketch.residual import RESIDUALS, Rest
from hf_skein.sketch.routing import logit_components, num_blocks, route
from hf_skein.sketch.rows import attend, overwrite_rows, sketched_rows


def heads_of(n_q, n_k, p=24, heads=2, dtype=torch.float64):
    query, key, value = (torch.randn(heads, n, p, dtype=dtype) for n in (n_q, n_k, n_k))
    return query, key, value


# --- Algorithm 1 ---


def algorithm_1(query, key, value, pilots, drawn, row_normalization, reuse):
    """Algorithm 1 of the paper for one head, written with its exponentials, products and sums; `n x n` and slow."""
    n, p = key.shape
    a = torch.exp(query @ key.T / math.sqrt(p))
    a_drawn, v_drawn = a[:, drawn], value[drawn]
    if row_normalization == "adaptive":
        g = torch.prod(a_drawn ** (1 / len(drawn)), dim=1, keepdim=True)
        row_sum = a_drawn.sum(1, keepdim=True) + (n - len(drawn)) * g
        undrawn = torch.tensor([i for i in range(n) if i not in set(drawn.tolist())])
        result = (a_drawn @ v_drawn + g * value[undrawn].sum(0)) / row_sum
    elif row_normalization == "simple":
        result = a_drawn @ v_drawn / a_drawn.sum(1, keepdim=True)
    else:
        result = a_drawn @ v_drawn / a.sum(1, keepdim=True)
    if reuse:
        for j in pilots.tolist():
            result[j] = a[j] @ value / a[j].sum()
    return result


@pytest.mark.parametrize(
    ("row_normalization", "reuse", "sampling"),
    list(itertools.product(("adaptive", "simple", "none"), (True, False), ("importance", "uniform"))),
)
def test_skeinformer_is_algorithm_1(row_normalization, reuse, sampling):
    query, key, value = heads_of(93, 93)
    config = SkeinConfig(
        method="skeinformer",
        num_columns=17,
        num_pilots=11,
        row_normalization=row_normalization,
        pilot_reutilization=reuse,
        column_sampling=sampling,
    )
    scale = 24**-0.5
    heads = torch.arange(2)
    selection = skeinformer.select(query, key, value, scale, config, 0, heads)
    output = attend(query, key, value, selection, scale, config)
    pilots = random_rows(uniform(0, 0, heads, PILOT_STREAM, 11), 93)
    for head in range(2):
        expected = algorithm_1(
            query[head], key[head], value[head], pilots[head], selection.columns[head, 0], row_normalization, reuse
        )
        torch.testing.assert_close(output[head], expected, rtol=1e-10, atol=1e-10)
    assert selection.exact_rows.shape == (2, 11 if reuse else 0)


def test_column_probabilities_are_equation_5():
    query, key, value = heads_of(50, 70)
    pilots = query[:, [3, 8, 8, 41]]
    b = torch.softmax(pilots @ key.mT / math.sqrt(24), -1)
    expected = b.square().sum(1).sqrt() * value.norm(dim=-1)
    log_p, weights = skeinformer.log_column_probability(pilots, key, value, 24**-0.5)
    torch.testing.assert_close(weights, b, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_p.softmax(-1), expected / expected.sum(-1, keepdim=True), rtol=1e-12, atol=0)


def test_columns_are_drawn_without_replacement_with_the_given_probabilities():
    probability = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    draws = 20_000
    uniforms = uniform(1, 0, torch.arange(draws), COLUMN_STREAM, 4)
    columns = draw_columns(probability.log().expand(draws, 4), 2, uniforms)
    assert (columns[:, 0] != columns[:, 1]).all()
    # First i then j has probability p_i p_j / (1 - p_i); the pair is unordered.
    for i, j in itertools.combinations(range(4), 2):
        p_i, p_j = probability[i], probability[j]
        expected = p_i * p_j / (1 - p_i) + p_i * p_j / (1 - p_j)
        seen = ((columns == i).any(-1) & (columns == j).any(-1)).double().mean()
        assert abs(seen - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)


def test_zero_probability_is_drawn_last():
    log_p = torch.tensor([[-torch.inf, 0.0, -1.0, -torch.inf]], dtype=torch.float64)
    for seed in range(20):
        assert set(draw_columns(log_p, 2, uniform(seed, 0, torch.arange(1), 1, 4))[0].tolist()) == {1, 2}
        assert {1, 2} < set(draw_columns(log_p, 3, uniform(seed, 0, torch.arange(1), 1, 4))[0].tolist())


# --- random numbers ---


def test_random_numbers_are_uniform_and_keyed():
    numbers = uniform(0, 0, torch.arange(8), 0, 10_000)
    assert ((numbers > 0) & (numbers < 1)).all()
    histogram = torch.histc(numbers.float(), 20, 0, 1)
    assert (histogram - 4000).abs().max() < 5 * math.sqrt(4000)
    flat = numbers.flatten()
    lag = torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1]
    assert abs(lag) < 5 / math.sqrt(len(flat))
    for other in (
        uniform(1, 0, torch.arange(8), 0, 10_000),
        uniform(0, 1, torch.arange(8), 0, 10_000),
        uniform(0, 0, torch.arange(8), 1, 10_000),
        uniform(0, 0, torch.arange(8, 16), 0, 10_000),
    ):
        assert abs(torch.corrcoef(torch.stack([flat, other.flatten()]))[0, 1]) < 5 / math.sqrt(len(flat))


def test_random_numbers_do_not_touch_the_global_generator_or_depend_on_the_count():
    before = torch.get_rng_state()
    long = uniform(3, 2, torch.arange(4), 1, 100)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(long[2:3, :40], uniform(3, 2, torch.tensor([2]), 1, 40))
    assert gumbel(long).isfinite().all()


# --- routing ---


@pytest.mark.parametrize(
    ("n", "blocks"), [(1, 1), (63, 4), (64, 64), (65, 8), (257, 16), (100, 1), (130, 128), (1000, 2), (1001, 4)]
)
def test_blocks_are_balanced_and_hold_every_query_once(n, blocks):
    result = route(torch.randn(3, n, 24), torch.randn(3, 70, 24), blocks)
    sizes = result.filled.sum(-1)
    assert len(sizes) == blocks and sizes.max() - sizes.min() <= 1 and sizes.sum() == n
    for head in range(3):
        assert sorted(result.index[head][result.filled].tolist()) == list(range(n))
        assert torch.equal(result.index[head].flatten()[result.slot[head]], torch.arange(n))


@pytest.mark.parametrize("p", [8, 24])
def test_routing_separates_clusters(p):
    """Eight clusters at the corners of a box with sides 40, 20 and 10: the tree cuts the longest side first.

    The keys spread alike in every direction, so that distances are those of the queries.
    """
    corners = torch.tensor(list(itertools.product((-20, 20), (-10, 10), (-5, 5))), dtype=torch.float32)
    basis = torch.linalg.qr(torch.randn(p, 3)).Q.T
    centers = (corners @ basis).repeat_interleave(16, 0)
    shuffled = torch.randperm(128)
    query = (centers + 0.1 * torch.randn(128, p))[shuffled]
    key = torch.cat([torch.eye(p), -torch.eye(p)])
    blocks = route(query[None], key[None], 8)
    labels = torch.arange(8).repeat_interleave(16)[shuffled]
    assert all(len(set(labels[block].tolist())) == 1 for block in blocks.index[0])


def test_routing_measures_queries_by_their_logits():
    """A difference that no key sees does not separate queries, however large; one that keys see does."""
    seen, unseen = torch.randint(2, (2, 1, 64, 1)).float().unbind()
    seen[0, :, 0], unseen[0, :, 0] = torch.arange(64) % 2, torch.arange(64) // 2 % 2
    query = torch.cat([seen, 50 * unseen, 0.01 * torch.randn(1, 64, 10)], -1)
    key = torch.randn(1, 40, 12) * torch.tensor([1.0, 0.0, *[1.0] * 10])
    blocks = route(query, key, 2)
    assert all(len(set(seen[0, block, 0].tolist())) == 1 for block in blocks.index[0])


def test_routing_of_identical_queries():
    for key in (torch.randn(1, 9, 8), torch.zeros(1, 9, 8)):
        blocks = route(torch.ones(1, 50, 8), key, 8)
        assert sorted(blocks.index[0][blocks.filled].tolist()) == list(range(50))


@pytest.mark.parametrize(
    ("n", "size", "most", "expected"),
    [
        (1, 64, 256, 1),
        (64, 64, 256, 1),
        (65, 64, 256, 2),
        (129, 64, 256, 4),
        (100_000, 64, 256, 256),
        (1000, 10, 100, 64),
        (5, 1, 256, 4),
        (300, 100, 3, 2),
        (9, 3, 1, 1),
    ],
)
def test_number_of_blocks(n, size, most, expected):
    assert num_blocks(n, size, most) == expected


def test_a_split_is_at_the_median():
    """In one dimension the tree sorts: blocks hold what lies between quantiles, also where many queries are equal."""
    for x in (torch.randn(1, 1003, 1), torch.randint(5, (1, 1003, 1)).float()):
        blocks = route(x, torch.randn(1, 20, 1), 8)
        part = [x[0, block[filled], 0] for block, filled in zip(blocks.index[0], blocks.filled, strict=True)]
        part.sort(key=lambda y: y.mean())
        assert all(y.max() <= z.min() for y, z in itertools.pairwise(part))


def test_logit_components_agree_with_the_eigendecomposition():
    """Up to turning, scale and constants: as much of the logits' variance as the best three components keep."""
    query, key = torch.randn(2, 5, 200, 12, dtype=torch.float64) * torch.logspace(0, 2, 12, dtype=torch.float64)
    query, key = query - query.mean(1, keepdim=True), key - key.mean(1, keepdim=True)
    points = logit_components(query, key, 3)
    points = points - points.mean(1, keepdim=True)
    logits = query @ key.mT
    best = torch.linalg.svdvals(logits)[:, :3].square().sum(-1) / logits.square().sum((1, 2))
    explained = points @ torch.linalg.lstsq(points, logits).solution
    kept = explained.square().sum((1, 2)) / logits.square().sum((1, 2))
    assert (kept > 0.98 * best).all()
    assert logit_components(torch.zeros(2, 9, 4), torch.zeros(2, 9, 4), 8).isfinite().all()


def test_distances_of_components_are_those_of_the_logits():
    query = torch.randn(2, 50, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    key = torch.randn(2, 200, 12, dtype=torch.float64)
    points = logit_components(query, key - key.mean(1, keepdim=True), 3)
    for head in range(2):
        ratio = torch.pdist(points[head]) / torch.pdist(query[head] @ (key - key.mean(1, keepdim=True))[head].T)
        assert ratio.max() / ratio.min() < 1.001


# --- strata ---


def test_strata_are_clusters_of_keys():
    center = 10 * torch.randn(2, 5, 8)
    label = torch.randint(5, (2, 400))
    key = center.gather(1, label[..., None].expand(-1, -1, 8)) + 0.01 * torch.randn(2, 400, 8)
    stratum = strata.assign(key, 16)
    assert stratum.shape == (2, 400) and (stratum >= 0).all() and (stratum < 16).all()
    for head in range(2):
        for s in stratum[head].unique():
            assert len(label[head][stratum[head] == s].unique()) == 1


def test_every_key_is_in_the_stratum_of_the_nearest_mean():
    key, means = torch.randn(2, 50, 6, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    assert torch.equal(strata.nearest(key, means), torch.cdist(key, means).argmin(-1))


def test_k_means_lowers_the_spread():
    key = torch.randn(1, 1000, 4)

    def spread(stratum):
        total, size = strata.sums(stratum, 32, key)
        return key.square().sum() - (total.square() / size.clamp_min(1)).sum()

    first = strata.nearest(key, key[:, (2 * torch.arange(32) + 1) * 1000 // 64])
    assert spread(strata.assign(key, 32)) < 0.95 * spread(first)
    assert spread(first) < 0.9 * key.var(1, correction=0).sum() * 1000


@pytest.mark.parametrize(("n", "count"), [(1, 1), (1, 4), (5, 8), (100, 1), (100, 100)])
def test_strata_of_few_or_identical_keys(n, count):
    for key in (torch.randn(2, n, 4), torch.ones(2, n, 4)):
        stratum = strata.assign(key, count)
        assert stratum.shape == (2, n) and (stratum >= 0).all() and (stratum < count).all()
        total, size = strata.sums(stratum, count, key)
        torch.testing.assert_close(total.sum(1), key.sum(1))
        assert (size.sum((1, 2)) == n).all()


# --- pilots, columns, residuals ---


def test_pilots_are_means_of_their_block_and_the_spread_about_them():
    query = torch.randn(2, 65, 8, dtype=torch.float64)
    blocks = route(query, torch.randn(2, 30, 8, dtype=torch.float64), 4)
    pilots = block_pilots(query, blocks, 1)
    spread = torch.zeros(2, 8, 8, dtype=torch.float64)
    for head, block in itertools.product(range(2), range(4)):
        members = query[head, blocks.index[head, block][blocks.filled[block]]]
        torch.testing.assert_close(pilots.mean[head, block, 0], members.mean(0))
        spread[head] += len(members) * torch.cov(members.T, correction=0) / 65
    torch.testing.assert_close(pilots.covariance, spread)
    parts = block_pilots(query, blocks, 4)
    assert parts.mean.shape == (2, 4, 4, 8)
    assert (parts.covariance.diagonal(dim1=1, dim2=2).sum(-1) < spread.diagonal(dim1=1, dim2=2).sum(-1)).all()
    single = block_pilots(query, blocks, 1000)
    assert single.mean.shape[2] == 16
    assert (single.covariance.diagonal(dim1=1, dim2=2).sum(-1) < 0.2 * spread.diagonal(dim1=1, dim2=2).sum(-1)).all()


@pytest.mark.parametrize("pilots", [1, 3, 40, 62, 64])
def test_no_part_of_a_short_block_is_empty(pilots):
    """1000 queries make 16 blocks of 62 and 63."""
    query = torch.randn(1, 1000, 8)
    blocks = route(query, torch.randn(1, 30, 8), 16)
    mean = block_pilots(query, blocks, pilots).mean
    assert mean.shape[2] == min(pilots, 62) and mean.isfinite().all()
    assert mean.abs().amax() <= query.abs().amax()


def test_log_mean_exponential_of_gaussian_queries():
    key, root = torch.randn(1, 5, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64) / 2
    query = torch.randn(200_000, 3, dtype=torch.float64) @ root.T
    expected = (0.7 * query @ key[0].T).exp().mean(0).log()
    torch.testing.assert_close(log_mean_exponential(key, (root @ root.T)[None], 0.7)[0], expected, rtol=0.05, atol=0.02)


def test_rms_attention_over_several_pilots():
    pilots, key = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 20, 8, dtype=torch.float64)
    probability = torch.einsum("hgrp,hnp->hgrn", pilots, key).mul(0.5).softmax(-1)
    expected = probability.square().sum(2).sqrt()
    torch.testing.assert_close(log_rms_attention(pilots, key, 0.5).exp(), expected)
    bias = torch.randn(2, 20, dtype=torch.float64)
    biased = (torch.einsum("hgrp,hnp->hgrn", pilots, key) * 0.5 + bias[:, None, None]).softmax(-1)
    torch.testing.assert_close(log_rms_attention(pilots, key, 0.5, bias).exp(), biased.square().sum(2).sqrt())
    extreme = log_rms_attention(1e4 * pilots.float(), key.float(), 1.0)
    assert extreme.isfinite().all()
    logits = torch.einsum("hgrp,hnp->hgrn", 1e4 * pilots.float().double(), key.float().double())
    torch.testing.assert_close(extreme.double(), logits.log_softmax(-1).mul(2).logsumexp(2) / 2, rtol=1e-4, atol=1)


def test_top_columns_and_value_norms():
    score = torch.tensor([[0.0, 5.0, 4.0, 1.0, -torch.inf]])
    assert set(top_columns(score, 2)[0].tolist()) == {1, 2}
    value = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    assert log_value_norm(value, center=True).exp().tolist() == pytest.approx([2, 0, 2])


def one_stratum(key, value):
    return Rest(key, value, torch.zeros(len(key), dtype=torch.int64))


def test_second_order_residual_is_exact_where_the_expansion_is():
    """As many distinct keys as strata: no spread within them, so the residual is exact attention over the rest."""
    query, value = torch.randn(5, 8, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    stratum = torch.randint(3, (30,))
    key = torch.randn(3, 8, dtype=torch.float64)[stratum]
    log_mass, mean = RESIDUALS["second_order"](query, key[:2], Rest(key, value, 2 * stratum), 0.7)
    torch.testing.assert_close(log_mass, torch.logsumexp(0.7 * query @ key.T, -1))
    torch.testing.assert_close(mean, (0.7 * query @ key.T).softmax(-1) @ value)


def test_second_order_residual_is_second_order():
    """Its error in the mass falls with the third power of the logits, that of the mean with the second."""
    query, key = torch.randn(4, 8, dtype=torch.float64), torch.randn(400, 8, dtype=torch.float64)
    value, stratum = torch.randn(400, 6, dtype=torch.float64), torch.randint(5, (400,))

    def errors(scale):
        logits = scale * query @ key.T
        log_mass, mean = RESIDUALS["second_order"](query, key, Rest(key, value, stratum), scale)
        exact_mean = logits.softmax(-1) @ value
        return (log_mass - logits.logsumexp(-1)).abs().max(), (mean - exact_mean).abs().max()

    (mass, mean), (half_mass, half_mean) = errors(0.02), errors(0.01)
    assert 6 < mass / half_mass < 20
    assert 3 < mean / half_mean < 10


def test_strata_make_the_residual_more_accurate():
    query, key, value = (x[0] for x in heads_of(50, 300, p=4, heads=1))
    logits = 0.5 * query @ key.T
    errors = []
    for count in (1, 64):
        rest = Rest(key, value, strata.assign(key[None], count)[0])
        log_mass, mean = RESIDUALS["second_order"](query, key[:1], rest, 0.5)
        errors.append(
            torch.stack([(log_mass - logits.logsumexp(-1)).norm(), (mean - logits.softmax(-1) @ value).norm()])
        )
    assert (errors[1] < 0.7 * errors[0]).all()


def test_second_order_residual_cannot_run_away():
    key, value = torch.randn(100, 8, dtype=torch.float64), torch.randn(100, 1, dtype=torch.float64)
    query = torch.logspace(-3, 4, 50, dtype=torch.float64)[:, None] * torch.randn(50, 8, dtype=torch.float64)
    _, mean = RESIDUALS["second_order"](query, key, one_stratum(key, value), 1.0)
    deviation = (mean - value.mean(0)).abs().max() / value.std(unbiased=False)
    assert deviation <= 1 / math.sqrt(2)


@pytest.mark.parametrize("residual", ["geometric", "mean", "second_order"])
def test_every_row_is_a_mean_of_the_values(residual):
    query, key, value = (x[0] for x in heads_of(9, 40))
    options = (torch.arange(40) % 3, torch.arange(10), 0.3, "adaptive", residual)
    rows = sketched_rows(query, key, torch.ones_like(value), *options)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    shifted = sketched_rows(query, key + 3, value + 5, *options)
    expected = sketched_rows(query, key, value, *options) + 5
    torch.testing.assert_close(shifted, expected)


def test_all_columns_are_exact_attention():
    query, key, value = (x[0] for x in heads_of(9, 40))
    exact = torch.softmax(0.3 * query @ key.T, -1) @ value
    for row_normalization in ("adaptive", "simple", "none"):
        rows = sketched_rows(
            query, key, value, torch.arange(40) % 3, torch.randperm(40), 0.3, row_normalization, "second_order"
        )
        torch.testing.assert_close(rows, exact)


def test_adaptive_follows_its_definition():
    """Each block against the formulas of its method, with columns taken by a plain argsort."""
    query, key, value = heads_of(50, 60)
    config = SkeinConfig(num_columns=12, num_strata=5, block_size=16, min_length=0, exact_rows=2)
    selection = adaptive.select(query, key, value, 0.2, config, 0, torch.arange(2))
    output = attend(query, key, value, selection, 0.2, config)
    assert selection.columns.shape == (2, 4, 12)
    covariance = block_pilots(query, selection.blocks, 1).covariance
    for head, block in itertools.product(range(2), range(4)):
        members = selection.blocks.index[head, block][selection.blocks.filled[block]]
        spread = 0.02 * ((key[head] @ covariance[head]) * key[head]).sum(-1)
        pilot = torch.softmax(0.2 * query[head, members].mean(0) @ key[head].T + spread, -1)
        score = pilot * (value[head] - value[head].mean(0)).norm(dim=-1)
        score[:2] = torch.inf
        columns = score.argsort(descending=True)[:12]
        assert set(columns.tolist()) == set(selection.columns[head, block].tolist())
        rest = torch.tensor(sorted(set(range(60)) - set(columns.tolist())))
        k, v, stratum = key[head, rest], value[head, rest], selection.stratum[head, rest]
        groups = [stratum == s for s in stratum.unique()]
        within_k, within_v = k.clone(), v.clone()
        for group in groups:
            within_k[group] -= k[group].mean(0)
            within_v[group] -= v[group].mean(0)
        for i in members.tolist():
            if i < 2:
                expected = torch.softmax(0.2 * query[head, i] @ key[head].T, -1) @ value[head]
            else:
                q = query[head, i]
                z = 1 + 0.02 * q @ within_k.T @ within_k @ q / len(rest)
                cross = within_k.T @ within_v / len(rest)
                mass = torch.stack([group.sum() * torch.exp(0.2 * q @ k[group].mean(0)) for group in groups])
                means = torch.stack([v[group].mean(0) for group in groups])
                exact = torch.exp(0.2 * key[head, columns] @ q)
                numerator = exact @ value[head, columns] + z * mass @ means + mass.sum() * 0.2 * q @ cross
                expected = numerator / (exact.sum() + z * mass.sum())
            torch.testing.assert_close(output[head, i], expected, rtol=1e-10, atol=1e-10)


def test_overwriting_repeated_rows_counts_the_gradient_once():
    output = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    replacement = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    result = overwrite_rows(output, torch.tensor([1, 3, 1]), replacement)
    assert result.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    result.sum().backward()
    assert replacement.grad.sum() == 4 and output.grad.sum() == 4


def test_v_mean():
    query, value = torch.randn(2, 7, 4), torch.randn(2, 9, 5)
    torch.testing.assert_close(v_mean(query, value), value.mean(1, keepdim=True).expand(2, 7, 5))
