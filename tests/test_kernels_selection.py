"""What the kernels select, against the reference in `hf_skein/sketch`: in Triton's interpreter, or on a GPU."""

import math

import pytest
import torch

from hf_skein import SkeinConfig
from hf_skein.kernels import columns, exact_rows, pilots, random, routing, selection, strata
from hf_skein.kernels.layout import num_blocks, ragged
from hf_skein.sketch import adaptive, skeinformer
from hf_skein.sketch import columns as reference_columns
from hf_skein.sketch import pilots as reference_pilots
from hf_skein.sketch import routing as reference_routing
from hf_skein.sketch import strata as reference_strata
from hf_skein.sketch.random import COLUMN_STREAM, uniform


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Scores are 16-bit integers over their range; and float32 (or shorter) products differ from float64 by so much of it.
SCORE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of NumPy, about poisoned padding


class Case:
    """Random inputs of some sequences, as views that Transformers passes; NaN in the padding, which comes first."""

    def __init__(self, lengths, heads=2, kv_heads=1, p=24, pv=16, dtype=torch.float32, block_size=32, max_blocks=4):
        self.lengths, self.heads, self.kv_heads, n = lengths, heads, kv_heads, max(lengths)
        self.scale, self.num_blocks = p**-0.5, num_blocks(n, block_size, max_blocks)
        valid = torch.arange(n, device=DEVICE).flip(0) < torch.tensor(lengths, device=DEVICE)[:, None]
        padding = ~valid[:, None, :, None]
        self.query, self.key, self.value = (
            (torch.randn(len(lengths), n, h, width, device=DEVICE) + shift)
            .to(dtype)
            .transpose(1, 2)
            .masked_fill_(padding, torch.nan)
            for h, width, shift in ((heads, p, 0), (kv_heads, p, 1), (kv_heads, pv, 0))
        )
        self.valid = valid
        self.layout = ragged(valid, valid, self.query, self.key, block_size, max_blocks, 16)
        self.prepare()

    def prepare(self):
        self.means = exact_rows.rows_and_means(self.query, self.key, self.value, 0, self.layout, 1.0)[:2]

    def adaptive(self, **options):
        options = {"num_columns": 16, "num_strata": 4, "room": self.num_blocks, **options}
        inputs = (self.query, self.key, self.value, self.layout)
        return selection.adaptive(*inputs, scale=self.scale, blocks=self.num_blocks, **options)[2]

    def sequence(self, b, dtype=torch.float64):
        """Valid queries, centred keys and values of all heads of a sequence."""
        group = self.heads // self.kv_heads
        q, k, v = (x[b][:, self.valid[b]].to(dtype) for x in (self.query, self.key, self.value))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        return q, k - k.mean(1, keepdim=True), v

    def ranks(self, b, positions):
        """Positions in the padded sequence as ranks among the valid ones."""
        return positions.long() - (len(self.valid[b]) - self.lengths[b])

    def blocks(self, b, order):
        """The blocks of a sequence as the reference holds them."""
        order = torch.where(order < 0, -1 - order, order)  # without the marks of exact rows
        order, length, count = self.ranks(b, order[b, :, : self.lengths[b]]), self.lengths[b], self.layout.blocks[b]
        bounds = torch.arange(count + 1, device=DEVICE) * length // count
        table, filled = reference_routing._segments(bounds[:-1], bounds[1:])
        slots = torch.arange(table.numel(), device=DEVICE).view_as(table)[filled].expand_as(order)
        return reference_routing.Blocks(order[:, table], filled, torch.empty_like(order).scatter_(1, order, slots))


def assert_highest(score, chosen, tolerance):
    """Distinct, and nothing that was left out has a higher score by more than the tolerance times the range."""
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()
    least = score.gather(-1, chosen).amin(-1)
    most = score.scatter(-1, chosen, -torch.inf).amax(-1)
    finite = score.masked_fill(~score.isfinite(), torch.nan)
    spread = finite.nan_to_num(-torch.inf).amax(-1) - finite.nan_to_num(torch.inf).amin(-1)
    assert (least >= most - tolerance * spread).all()


# --- routing ---


def within_blocks(query, key, blocks):
    """Variance of the logits within blocks, over that of all: what routing wants small."""
    logits = query @ key.mT
    parts = [[logits[h, i[f]] for i, f in zip(blocks.index[h], blocks.filled, strict=True)] for h in range(len(query))]
    within = torch.stack([sum((x - x.mean(0)).square().sum() for x in head) for head in parts])
    return within / (logits - logits.mean(1, keepdim=True)).square().sum((1, 2))


@pytest.mark.parametrize(
    ("lengths", "p", "dtype", "factor"),
    [
        ((257, 100), 24, torch.float32, 1),
        ((300,), 128, torch.bfloat16, 1),
        ((300,), 40, torch.float16, 300),  # logits of 1e5
    ],
)
def test_routing_is_as_good_as_the_reference(poisoned, lengths, p, dtype, factor):
    case = Case(lengths, p=p, dtype=dtype, kv_heads=2)
    mixing = torch.randn(p, p, device=DEVICE) * torch.logspace(0, -1.5, p, device=DEVICE)[:, None]
    case.query = (factor * case.query.float() @ mixing).to(dtype)
    case.key = (factor * case.key.float()).to(dtype)
    order = routing.route(case.query, case.key, case.num_blocks, case.layout)
    positions = torch.arange(max(lengths), device=DEVICE, dtype=torch.int32)
    torch.testing.assert_close(order.sort(-1).values, positions.expand_as(order))
    for b, count in enumerate(case.layout.blocks.tolist()):
        query, key, _ = case.sequence(b, torch.float32)
        ours = within_blocks(query, key, case.blocks(b, order))
        theirs = within_blocks(query, key, reference_routing.route(query, key, count))
        assert theirs.max() < 0.95
        assert ((ours - theirs).abs() < 0.05).all(), (ours, theirs)


@pytest.mark.parametrize(("length", "blocks"), [(257, 8), (64, 64), (65, 2), (4500, 2)])
def test_a_split_is_at_the_median_of_the_coordinate_that_varies_most(length, blocks):
    case = Case((length,), heads=1, p=16, block_size=1, max_blocks=blocks)
    points = torch.randn(1, 1, 8, length, device=DEVICE)
    points[:, :, 3] *= 4
    points[:, :, 3, : length // 3] = 7  # ties
    order = routing.split(points, case.layout, blocks)[0, 0].long()
    values = points[0, 0, 3, order]
    middle = length // 2
    assert values[:middle].max() <= values[middle:].min() + 4 / 2**12  # 16 bits of two standard deviations
    # The halves keep their order, and equal queries go by position.
    if blocks == 2:
        assert (order[:middle].diff() > 0).all() and (order[middle:].diff() > 0).all()
        tied = order[values == 7]
        assert (tied.diff() > 0).all()
    assert len(order.unique()) == length


def test_routing_of_identical_and_of_broken_queries():
    case = Case((130,), kv_heads=2)
    case.query[:, 0] = 1
    case.query[:, 1, 5:9] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])[:, None]
    order = routing.route(case.query, case.key, case.num_blocks, case.layout)
    assert (order.sort(-1).values == torch.arange(130, device=DEVICE)).all()
    query, key, _ = case.sequence(0, torch.float32)
    ours = within_blocks(query.nan_to_num(0, 0, 0), key, case.blocks(0, order))[1]
    theirs = within_blocks(query.nan_to_num(0, 0, 0), key, reference_routing.route(query, key, 4))[1]
    assert ours < theirs + 0.05


def test_coordinates_are_the_principal_components_of_the_logits():
    case = Case((300,), heads=2, kv_heads=1, p=24)
    case.query = case.query * torch.logspace(0, -6, 24, device=DEVICE)
    found = routing.directions(case.query, case.key, case.layout)
    for h in range(2):
        query, key, _ = case.sequence(0)
        query, key = query[h] - query[h].mean(0), key[h]
        factor = torch.linalg.cholesky(key.T @ key)
        covariance = factor.T @ query.T @ query @ factor
        expected = factor @ torch.linalg.eigh(covariance).eigenvectors[:, -2:].flip(1)
        angle = torch.cosine_similarity(found[0, h, :, :2].double(), expected, 0)
        assert (angle.abs() > 0.99).all(), angle


# --- strata ---


@pytest.mark.parametrize(
    ("lengths", "p", "count", "dtype"),
    [((257, 90), 24, 8, torch.float32), ((65, 18), 128, 20, torch.bfloat16), ((63,), 40, 64, torch.float16)],
)
def test_strata_are_those_of_the_reference(poisoned, lengths, p, count, dtype):
    case = Case(lengths, heads=2, kv_heads=2, p=p, dtype=dtype)
    stratum = strata.assign(case.key, case.means[0], count, case.layout)
    assert stratum.dtype == torch.int32 and stratum.shape == case.key.shape[:3]
    for b in range(len(lengths)):
        expected = reference_strata.assign(case.sequence(b)[1], count)
        # Rounded means can put a key that lies between two strata into the other.
        assert (stratum[b][:, case.valid[b]] == expected).float().mean() > (1 if dtype == torch.float32 else 0.9) - 1e-3


def test_strata_of_identical_keys():
    case = Case((70,))
    case.key.fill_(2)
    case.prepare()
    assert (strata.assign(case.key, case.means[0], 4, case.layout) == 0).all()


def test_a_broken_key_has_a_stratum_that_exists():
    case = Case((70,), heads=1)
    case.key[:, :, 4:9] = torch.tensor([1e20, -1e20, torch.inf, torch.nan, 3e38])[:, None]
    stratum = strata.assign(case.key, torch.zeros_like(case.means[0]), 3, case.layout)
    assert ((stratum >= 0) & (stratum < 3)).all()


# --- columns ---


@pytest.mark.parametrize(
    ("lengths", "dtype", "p", "parts", "exact_rows", "sizes"),
    [
        ((257, 17, 130), torch.float32, 24, 1, 2, (32, 4)),
        ((63,), torch.bfloat16, 128, 1, 0, (32, 4)),
        ((65,), torch.float16, 40, 1, 1, (32, 4)),
        ((90,), torch.float32, 16, 3, 1, (32, 4)),
        ((60, 95), torch.float32, 16, 6, 1, (4, 16)),  # the smallest blocks have 3 and 5 queries
    ],
)
def test_columns_have_the_highest_scores(poisoned, lengths, dtype, p, parts, exact_rows, sizes):
    case = Case(lengths, heads=2, kv_heads=1, p=p, pv=40, dtype=dtype, block_size=sizes[0], max_blocks=sizes[1])
    chosen = case.adaptive(num_pilots=parts, exact_rows=exact_rows)
    assert chosen.columns.dtype == torch.int32 and chosen.columns.shape == (len(lengths), 2, case.num_blocks, 16)
    for b, length in enumerate(lengths):
        query, key, value = case.sequence(b)
        blocks = case.blocks(b, chosen.order)
        mean, covariance = reference_pilots.block_pilots(query, blocks, parts)
        bias = reference_pilots.log_mean_exponential(key, covariance, case.scale)
        score = reference_pilots.log_rms_attention(mean, key, case.scale, bias)
        norm = reference_columns.log_value_norm(value, center=True)
        norm[:, :exact_rows] = torch.inf
        columns = case.ranks(b, chosen.columns[b, :, : len(blocks.filled)])
        assert columns.min() >= 0 and columns.max() < length
        assert_highest(score + norm[:, None], columns, SCORE_TOLERANCE[dtype])
        rows = case.ranks(b, chosen.exact_rows[b])
        assert (rows == torch.arange(exact_rows, device=DEVICE)).all()


def test_columns_of_a_sequence_do_not_depend_on_the_batch_or_padding():
    alone = Case((90,))
    together = Case((257, 90, 33))
    for x in ("query", "key", "value"):
        getattr(together, x)[1][:, together.valid[1]] = getattr(alone, x)[0]
    together.prepare()
    a, b = alone.adaptive(exact_rows=1), together.adaptive(exact_rows=1)
    assert (a.order[0, :, :90] < 0).sum() == 2  # the exact row of each head is marked
    assert (alone.blocks(0, a.order).index == together.blocks(1, b.order).index).all()
    assert (a.columns[0] == together.ranks(1, b.columns[1, :, : a.columns.shape[2]])).all()
    assert (a.stratum[0] == b.stratum[1][:, together.valid[1]]).all()


def top(score, count):
    """`shared_columns` of given scores `[B, H, n]`."""
    batch, heads, n = score.shape
    case = Case((n,) * batch, heads=heads, p=16)
    return columns.shared_columns(score, count, case.layout)[:, :, 0]


def test_top_columns_of_given_scores(poisoned):
    score = torch.randn(2, 2, 5000, device=DEVICE).exp()  # several tiles
    found = top(score, 200).long()
    assert (found.diff(dim=-1) > 0).all()
    assert_highest(score, found, 2**-16)


def test_ties_go_by_position_and_infinities_first():
    score = torch.zeros(1, 5, 2100, device=DEVICE)
    score[0, 1, 2090:] = 1.0
    score[0, 2, [7, 2099]] = torch.inf
    score[0, 2, :5] = -torch.inf
    score[0, 3] = torch.nan
    score[0, 3, 40] = torch.inf
    score[0, 4, :2040] = -1.0  # ties on both sides of the end of a tile
    found = top(score, 20)[0].tolist()
    assert found[0] == list(range(20))
    assert found[1] == [*range(10), *range(2090, 2100)]
    assert found[2] == [*range(5, 24), 2099]
    assert found[3] == [*range(19), 40]
    assert found[4] == list(range(2040, 2060))


@pytest.mark.parametrize("parts", [1, 2])
def test_scores_in_a_smaller_workspace_choose_the_same(parts, poisoned, monkeypatch):
    case = Case((130,), heads=2, block_size=4, max_blocks=32)
    covariance = torch.eye(24, device=DEVICE).expand(1, 2, -1, -1).contiguous()
    means = strata.means(case.key, case.means[0], 70, case.layout)
    inputs = (torch.randn(1, 2, 32, parts, 24, device=DEVICE), case.key, case.value, *case.means, covariance, means)

    def choose():
        return columns.block_columns(*inputs, 20, case.scale, 1, 32, case.layout)

    assert columns.at_once(2, 32, 130) == (32, 2)
    whole, stratum = choose()
    assert torch.equal(stratum, strata.assign(case.key, case.means[0], 70, case.layout))
    for workspace, at_once in ((4 * 130 * 32, (32, 1)), (1, (16, 1))):
        monkeypatch.setattr(columns, "WORKSPACE", workspace)
        assert columns.at_once(2, 32, 130) == at_once
        assert all(torch.equal(x, y) for x, y in zip((whole, stratum), choose(), strict=True))


def test_extreme_logits_do_not_make_columns_equal():
    case = Case((130,), heads=1, kv_heads=1, dtype=torch.float16)
    case.query, case.key = case.query * 100, case.key * 100
    case.prepare()
    chosen = case.adaptive()
    query, key, _ = case.sequence(0)
    blocks = case.blocks(0, chosen.order)
    mean, covariance = reference_pilots.block_pilots(query, blocks, 1)
    bias = reference_pilots.log_mean_exponential(key, covariance, case.scale)
    score = reference_pilots.log_rms_attention(mean, key, case.scale, bias)
    assert score.amax() - score.amin() > 1e4
    assert_highest(score, case.ranks(0, chosen.columns[0]), SCORE_TOLERANCE[torch.float16])


# --- random numbers, and Algorithm 1 ---


@pytest.mark.parametrize(("seed", "layer"), [(0, 0), (2**32 - 1, 3)])
def test_draws_are_those_of_the_reference(seed, layer):
    case = Case((200, 77), heads=3, kv_heads=3)
    options = {"num_columns": 16, "num_strata": 1, "num_pilots": 20, "seed": seed, "layer": layer}
    inputs = (case.query, case.key, case.value, case.layout)
    chosen = selection.skeinformer(*inputs, scale=case.scale, **options)[2]
    config = SkeinConfig(method="skeinformer", num_columns=16, num_pilots=20, seed=seed)
    for b in range(2):
        heads = torch.arange(3, device=DEVICE)
        expected = skeinformer.select(*case.sequence(b), case.scale, config, layer, heads)
        assert (case.ranks(b, chosen.columns[b, :, 0]) == expected.columns[:, 0].sort(-1).values).all()
        for rows, theirs in zip(chosen.exact_rows[b], expected.exact_rows, strict=True):
            ours = case.ranks(b, rows[rows >= 0]).tolist()
            assert len(set(ours)) == len(ours) and set(ours) == set(theirs.tolist())
    for order, rows, index in zip(chosen.order, chosen.exact_rows, case.layout.query_index, strict=True):
        is_exact = (index[:, None, None] == rows).any(-1).T
        assert (order == torch.where(is_exact, -1 - index, index)).all()


def test_uniform_columns_are_those_of_the_reference():
    case = Case((120,))
    chosen = case.adaptive(uniform=True, exact_rows=2, seed=5, layer=1)
    config = SkeinConfig(num_columns=16, exact_rows=2, column_sampling="uniform", seed=5, block_size=32, max_blocks=4)
    query, key, value = case.sequence(0)
    expected = adaptive.select(query, key, value, case.scale, config, 1, torch.arange(2, device=DEVICE))
    assert (chosen.columns[0] == expected.columns.sort(-1).values).all()

    numbers = random.random_key(5, 1)
    score = columns.draw_scores(None, case.query, case.key, case.value, 1.0, numbers, 0, case.layout)
    noise = uniform(5, 1, torch.arange(2), COLUMN_STREAM, 120).to(DEVICE)
    torch.testing.assert_close(score[0].double(), -torch.log(-torch.log(noise)), rtol=1e-6, atol=1e-6)


def test_pilots_without_reutilization_are_no_exact_rows():
    case = Case((40,))
    inputs = (case.query, case.key, case.value, case.layout)
    options = {"num_columns": 8, "num_strata": 1, "num_pilots": 5}
    chosen = selection.skeinformer(*inputs, scale=1.0, pilot_reutilization=False, uniform=True, **options)[2]
    assert chosen.exact_rows.shape == (1, 2, 0)


@pytest.mark.parametrize("rows", [0, 3, torch.tensor([5, 0, 5])])
def test_exact_rows_and_means_in_one_pass(rows, poisoned):
    case = Case((1100, 2, 40), heads=4, kv_heads=2, p=16, pv=20)  # two chunks; too short to be sketched; one chunk
    given = rows
    if isinstance(rows, torch.Tensor):
        given = case.layout.query_index[:, None, rows].expand(-1, 4, -1).contiguous()
    found = exact_rows.rows_and_means(case.query, case.key, case.value, given, case.layout, case.scale)
    assert all((x[1] == 0).all() for x in found)
    for b in (0, 2):
        query, key, value = (x[b][:, case.valid[b]].double() for x in (case.query, case.key, case.value))
        query = query[:, rows] if isinstance(rows, torch.Tensor) else query[:, :rows]
        logits = case.scale * query @ key.repeat_interleave(2, 0).mT
        expected = (
            key.mean(1), value.mean(1), logits.softmax(-1) @ value.repeat_interleave(2, 0),
            logits.logsumexp(-1) / math.log(2),
        )  # fmt: skip
        torch.testing.assert_close(tuple(x[b].double() for x in found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_sums_of_exponentials_over_several_chunks(biased, poisoned):
    case = Case((2100, 40), heads=1, p=16)
    rows = torch.randn(2, 1, 5, 16, device=DEVICE)
    bias = torch.randn(2, 1, 2100, device=DEVICE)
    found = pilots.log_sum_exp(rows, case.key, bias if biased else None, 0.5, case.layout)
    for b, length in enumerate(case.lengths):
        logits = 0.5 * rows[b].double() @ case.key[b][:, case.valid[b]].double().mT
        expected = (logits + bias[b, :, :length].double() * biased).logsumexp(-1)
        torch.testing.assert_close(found[b].double(), expected, rtol=1e-5, atol=1e-5)


def test_block_means(poisoned):
    case = Case((257, 40), heads=1)
    order = case.layout.query_index[:, None].contiguous()
    means = pilots.block_means(case.query, order, case.num_blocks, 3, case.layout)
    for b, count in enumerate(case.layout.blocks.tolist()):
        expected = reference_pilots.block_pilots(case.sequence(b)[0], case.blocks(b, order), 3).mean
        torch.testing.assert_close(means[b, :, :count].double(), expected, rtol=1e-5, atol=1e-5)
