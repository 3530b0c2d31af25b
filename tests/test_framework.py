import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import check_framework
from check_framework import Head


def make_head(n=40, sharpness=1.0):
    attention = (sharpness * torch.randn(n, n, dtype=torch.float64)).softmax(-1)
    return Head(attention, torch.randn(n, 6, dtype=torch.float64))


def test_the_expected_error_is_that_of_all_draws_of_one_column():
    head = make_head()
    exact = head.attention @ head.value
    for probability in (check_framework.importance(head), torch.rand(40, dtype=torch.float64).softmax(0)):
        mean, product = 0.0, 0.0
        for i, p in enumerate(probability):  # with one column there are as many sketches as columns
            one = head.attention[:, i : i + 1] @ head.value[i : i + 1] / p
            mean, product = mean + p * (one - exact).square().sum(), product + p * one
        torch.testing.assert_close(product, exact)  # unbiased, because E[S Sᵀ] is the identity
        assert check_framework.expected_error(head, probability, 1) == pytest.approx(mean.item())
        assert check_framework.expected_error(head, probability, 7) == pytest.approx(mean.item() / 7)


def test_no_probabilities_have_a_smaller_expected_error_than_the_best():
    head = make_head()
    best = check_framework.expected_error(head, check_framework.importance(head), 5)
    for _ in range(50):
        other = check_framework.importance(head) * (0.1 * torch.randn(40, dtype=torch.float64)).exp()
        assert check_framework.expected_error(head, other / other.sum(), 5) > best


def test_a_sketch_is_drawn_from_its_probabilities():
    head, generator = make_head(), torch.Generator().manual_seed(0)
    only = torch.zeros(40, dtype=torch.float64)
    only[[3, 5]] = torch.tensor([0.25, 0.75], dtype=torch.float64)
    products = torch.stack([check_framework.draw_product(head, only, 1, generator) for _ in range(400)])
    third, fifth = (head.attention[:, i : i + 1] @ head.value[i : i + 1] / only[i] for i in (3, 5))
    is_third = (products - third).flatten(1).norm(dim=1) < 1e-9
    assert (is_third | ((products - fifth).flatten(1).norm(dim=1) < 1e-9)).all()
    assert abs(is_third.sum().item() - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)
    args = argparse.Namespace(draws=500, delta=0.1)
    found = check_framework.tally(head, check_framework.importance(head), 8, args, generator)
    assert found.beta == pytest.approx(1)
    assert abs(found.squared_error - 1) < 5 * found.standard_error
    assert 0.3 < found.bias < 3
    assert found.within >= 0.9
    assert found.quantile < 1


def test_the_bound_is_that_of_eq_4():
    """By hand: B = I (2 x 2), V = (3, 4)ᵀ, d = 8, β = 1/2, δ = exp(-4): η = 1 + sqrt(16 · 4) = 9, 81 / 4 · 2 · 25."""
    head = check_framework.Head(torch.eye(2).double(), torch.tensor([[3.0], [4.0]]).double())
    assert check_framework.bound(head, 8, 0.5, math.exp(-4)) == pytest.approx(81 / 4 * 2 * 25)


def test_eq_5_with_all_rows_gives_the_best_probabilities():
    head = make_head()
    best = check_framework.importance(head)
    torch.testing.assert_close(check_framework.pilot_probabilities(head, torch.arange(40)), best)
    few = check_framework.pilot_probabilities(head, torch.tensor([3, 3, 17]))
    weight = (2 * head.attention[3] ** 2 + head.attention[17] ** 2).sqrt() * head.value.norm(dim=1)
    torch.testing.assert_close(few, weight / weight.sum())
    assert check_framework.largest_beta(few, best) == pytest.approx(min((few / best).tolist()))


def test_so_many_pilots_as_needed_are_enough():
    generator = torch.Generator().manual_seed(0)
    for sharpness in (0.3, 1.0):
        head = make_head(sharpness=sharpness)
        best, pilots = check_framework.importance(head), math.ceil(check_framework.pilots_needed(head, 0.1))
        betas = [
            check_framework.largest_beta(
                check_framework.pilot_probabilities(head, torch.randint(40, (pilots,), generator=generator)), best
            )
            for _ in range(100)
        ]
        assert sum(beta >= check_framework.BETA for beta in betas) >= 90


def test_the_record_and_its_picture(text, tmp_path):
    arguments = ["--text", text, "--output", tmp_path / "x", "--length", 100, "--layers", 1, "--draws", 40]
    arguments += ["--pilot-draws", 5, "--columns", 8, 32, "--pilots", 8, 64, 2048]
    record = check_framework.main([str(x) for x in arguments])
    products = [row for row in record["rows"] if row["of"] == "product"]
    assert len(products) == 2 * 3 * 2
    for row in products:
        assert row["least_within"] >= 0.9  # the statement
        assert 0.7 < row["squared_error"] < 1.3
        assert row["beta"] == pytest.approx(1) if row["probabilities"] == "best" else row["beta"] < 1
    for weights in check_framework.WEIGHTS:
        rows = [row for row in record["rows"] if row["of"] == "pilots" and row["weights"] == weights]
        assert rows[0]["columns"] <= rows[1]["columns"] <= rows[-1]["columns"] == 1
        assert rows[0]["holds"] <= rows[1]["holds"] <= rows[-1]["holds"] == 1
        assert rows[0]["beta"] < rows[1]["beta"] < rows[2]["beta"]
    few = next(row for row in record["rows"] if row["of"] == "pilots" and row["weights"] == "pretrained")
    assert few["holds"] < 0.5 and few["columns"] < 0.9
    assert json.loads((tmp_path / "x.json").read_text()) == record
    assert (tmp_path / "x.png").stat().st_size > 10_000
