"""scripts/ablate_adaptive.py: each replacement is what it says, and the record has all of them."""

import ablate_adaptive as script
import torch

from hf_skein.sketch import routing
from hf_skein.sketch.columns import top_columns


def blocks_and_queries():
    query, key = torch.randn(2, 3, 50, 8)
    return query, key, routing.route(query, key, 4)


def test_blocks_in_order_are_consecutive(monkeypatch):
    query, key, _ = blocks_and_queries()
    monkeypatch.setattr(routing, "logit_components", script.in_order)
    index, filled, _ = routing.route(query, key, 4)
    assert torch.equal(index[:, filled].sort(-1).values, torch.arange(50).expand(3, 50))
    assert (index[:, 1:].amin(-1) > index[:, :-1].amax(-1)).all()


def test_a_random_query_is_one_of_its_block():
    query, _, blocks = blocks_and_queries()
    found = script.random_query(query, blocks, 1)
    assert found.mean.shape == (3, 4, 1, 8) and found.covariance.abs().sum() == 0
    for head in range(3):
        for block in range(4):
            members = query[head, blocks.index[head, block, blocks.filled[block]]]
            assert (members == found.mean[head, block]).all(-1).any()
    assert not torch.equal(found.mean, script.random_query(query, blocks, 1).mean)


def test_without_spread_the_mean_stays():
    query, _, blocks = blocks_and_queries()
    found, plain = script.without_spread(query, blocks, 1), script.pilots.block_pilots(query, blocks, 1)
    assert torch.equal(found.mean, plain.mean) and found.covariance.abs().sum() == 0 < plain.covariance.abs().sum()


def test_columns_are_drawn_by_their_scores():
    score = torch.tensor([0.0, 3.0, torch.inf, 1.0, -torch.inf]).expand(2000, 5)
    found = script.drawn(score, 2)
    assert (found == 2).any(-1).all()  # what is always a column
    other = torch.where(found[:, 0] == 2, found[:, 1], found[:, 0])
    shares = other.bincount(minlength=5) / 2000
    wanted = torch.tensor([1.0, torch.e**3, 0.0, torch.e, 0.0])
    torch.testing.assert_close(shares, wanted / wanted.sum(), atol=0.04, rtol=0)
    assert (top_columns(score, 2).sort(-1).values == torch.tensor([1, 2])).all()


def test_the_record_has_every_variant(text, tmp_path):
    record = script.main(["--text", str(text), "--lengths", "300", "--layers", "1", "--output", str(tmp_path / "x")])
    errors = {name: by["300"] for name, by in record["summary"].items()}
    assert errors.keys() == script.VARIANTS.keys() and len(set(errors.values())) == len(errors)
    assert len(record["rows"]) == len(errors) and all(0 < error < 1 for error in errors.values())
    args = script.make_parser("", [300]).parse_args(["--text", str(text), "--layers", "1", "--output", "x"])
    again = script.error_rows(args, 300)
    assert [row["frobenius"] for row in again] == [row["frobenius"] for row in record["rows"]]
    assert (tmp_path / "x.png").stat().st_size > 10_000
