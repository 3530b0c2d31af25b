"""Checks the two statements of docs/framework.md in numbers, on attention heads of an encoder on a text.

Proposition 1: of the product `BV` of an attention matrix and its values, sketched by `d` sampled columns, how often the
bound of eq. 4 holds, and whether the error is on average what the variance of such a sketch says exactly. Lemma 1: how
often the probabilities of eq. 5, from so many pilots, are those of the proposition with β = sqrt(1/3).

    python scripts/check_framework.py --text text.txt --output benchmarks/results/framework
"""

import argparse
import functools
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _benchmark import (
    capture_layers,
    first_tokens,
    format_table,
    load_encoder,
    make_parser,
    new_figure,
    save_figure,
    start,
)
from _record import ResumableRecord
from torch import Tensor
from tqdm import tqdm


BETA = math.sqrt(1 / 3)
WEIGHTS = ("pretrained", "random")
KINDS = ("best", "pilots", "uniform")  # of probabilities


class Head(NamedTuple):
    """Of one head: `B [n, n]`, its rows softmaxes, and `V [n, pv]`, both float64."""

    attention: Tensor
    value: Tensor


class Tally(NamedTuple):
    """What the draws of one head and one size gave.

    Attributes:
        beta: Of the probabilities drawn from.
        squared_error: Mean of `‖BV - B S Sᵀ V‖²`, over the expectation that the probabilities imply.
        standard_error: Of that mean.
        bias: `‖mean(B S Sᵀ V) - BV‖²` over its expectation, which is that of one draw over their number.
        within: Share of draws within the bound of eq. 4.
        quantile: The `1 - δ` quantile of the squared error, over that bound.
    """

    beta: float
    squared_error: float
    standard_error: float
    bias: float
    within: float
    quantile: float


def importance(head: Head) -> Tensor:
    """`‖B⁽ⁱ⁾‖ ‖V₍ᵢ₎‖` of every column, over their sum: the best probabilities."""
    weight = head.attention.norm(dim=0) * head.value.norm(dim=1)
    return weight / weight.sum()


def pilot_probabilities(head: Head, rows: Tensor) -> Tensor:
    """Eq. 5: the same with the norms of columns taken over some rows, `[pilots]` int64."""
    count = rows.bincount(minlength=len(head.attention)).to(head.attention.dtype)
    weight = (count @ head.attention.square()).sqrt() * head.value.norm(dim=1)
    return weight / weight.sum()


def probabilities(kind: str, head: Head, pilots: int, generator: torch.Generator) -> Tensor:
    """The `best`, those of `pilots` random rows, or `uniform` ones."""
    n = len(head.value)
    if kind == "best":
        return importance(head)
    if kind == "pilots":
        return pilot_probabilities(head, torch.randint(n, (pilots,), generator=generator))
    return torch.full((n,), 1 / n, dtype=torch.float64)


def largest_beta(probability: Tensor, best: Tensor) -> float:
    """The largest β with `p_i >= β q_i` for all `i`, `q` being the best probabilities."""
    return (probability / best).min().item()


def bound(head: Head, size: int, beta: float, delta: float) -> float:
    """Right side of eq. 4, `η² / (β d) ‖B‖² ‖V‖²` with `η = 1 + sqrt(8/β log(1/δ))` (Frobenius norms)."""
    eta = 1 + math.sqrt(8 / beta * math.log(1 / delta))
    return eta**2 / (beta * size) * (head.attention.norm() * head.value.norm()).item() ** 2


def expected_error(head: Head, probability: Tensor, size: int) -> float:
    """`E ‖BV - B S Sᵀ V‖² = (Σ_i ‖B⁽ⁱ⁾‖² ‖V₍ᵢ₎‖² / p_i - ‖BV‖²) / d`, exactly."""
    squares = head.attention.square().sum(0) * head.value.square().sum(1)
    return ((squares / probability).sum() - (head.attention @ head.value).square().sum()).item() / size


def draw_product(head: Head, probability: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`B S Sᵀ V`, the columns of `S` being `e_i / sqrt(d p_i)` with probability `p_i`."""
    index = torch.multinomial(probability, size, replacement=True, generator=generator)
    return head.attention[:, index] @ (head.value[index] / (size * probability[index])[:, None])


def tally(head: Head, probability: Tensor, size: int, args: argparse.Namespace, generator: torch.Generator) -> Tally:
    """Draws `args.draws` sketches of one head."""
    exact, beta = head.attention @ head.value, largest_beta(probability, importance(head))
    expected, limit = expected_error(head, probability, size), bound(head, size, beta, args.delta)
    total, errors = torch.zeros_like(exact), []
    for _ in range(args.draws):
        product = draw_product(head, probability, size, generator)
        total += product
        errors.append((product - exact).square().sum())
    squared = torch.stack(errors)
    return Tally(
        beta,
        squared.mean().item() / expected,
        squared.std().item() / args.draws**0.5 / expected,
        (total / args.draws - exact).square().sum().item() / (expected / args.draws),
        (squared <= limit).double().mean().item(),
        squared.quantile(1 - args.delta).item() / limit,
    )


def pilots_needed(head: Head, delta: float) -> float:
    """So many pilots are enough for the condition with probability `1 - δ`: see docs/framework.md."""
    squares = head.attention.square()
    unevenness = (squares.amax(0) / squares.mean(0)).max().item()
    return 28 / 3 * unevenness * math.log(2 * len(squares) / delta)


def heads_of(args: argparse.Namespace, weights: str) -> list[Head]:
    """All heads of `--layers`."""
    model, tokenizer = load_encoder(args.model, args.length, random_weights=weights == "random")
    ids = first_tokens(tokenizer, args.text.read_text(encoding="utf-8"), args.length)
    layers = capture_layers(model, ids, args.layers)
    return [
        Head((scale * q.double() @ k.double().T).softmax(-1), v.double())
        for _, (query, key, value, scale) in sorted(layers.items())
        for q, k, v in zip(query, key, value, strict=True)
    ]


def product_rows(args: argparse.Namespace, weights: str) -> list[dict[str, Any]]:
    """Proposition 1: a row per kind of probabilities and number of columns, means over heads unless it says median.

    The median error and bound are in units of `‖B‖ ‖V‖`, not squared.
    """
    generator, rows = torch.Generator().manual_seed(0), []
    heads = heads_of(args, weights)
    for kind in KINDS:
        for size in tqdm(args.columns, desc=f"{weights} weights, {kind} probabilities", leave=False):
            tallies, relative, limits = [], [], []
            for head in heads:
                probability = probabilities(kind, head, size, generator)
                tallies.append(one := tally(head, probability, size, args, generator))
                norm = (head.attention.norm() * head.value.norm()).item()
                relative.append(math.sqrt(one.squared_error * expected_error(head, probability, size)) / norm)
                limits.append(math.sqrt(bound(head, size, one.beta, args.delta)) / norm)
            means = {name: statistics.mean(getattr(t, name) for t in tallies) for name in Tally._fields}
            rows.append(
                {
                    "of": "product",
                    "weights": weights,
                    "probabilities": kind,
                    "columns": size,
                    "heads": len(heads),
                    **means,
                    "least_within": min(t.within for t in tallies),
                    "least_beta": min(t.beta for t in tallies),
                    "median_beta": statistics.median(t.beta for t in tallies),
                    "median_error": statistics.median(relative),
                    "median_bound": statistics.median(limits),
                }
            )
    return rows


def pilot_rows(args: argparse.Namespace, weights: str) -> list[dict[str, Any]]:
    """Lemma 1: a row per number of pilots, over heads and draws."""
    generator, rows = torch.Generator().manual_seed(0), []
    heads = heads_of(args, weights)
    best = [importance(head) for head in heads]
    for pilots in tqdm(args.pilots, desc=f"{weights} weights, pilots", leave=False):
        ratios = torch.stack(
            [
                pilot_probabilities(head, torch.randint(len(q), (pilots,), generator=generator)) / q
                for head, q in zip(heads, best, strict=True)
                for _ in range(args.pilot_draws)
            ]
        )
        rows.append(
            {
                "of": "pilots",
                "weights": weights,
                "pilots": pilots,
                "heads": len(heads),
                "holds": (ratios.amin(-1) >= BETA).double().mean().item(),
                "columns": (ratios >= BETA).double().mean().item(),
                "beta": ratios.amin(-1).median().item(),
            }
        )
    needed = torch.tensor([pilots_needed(head, args.delta) for head in heads])
    return [*rows, {"of": "needed", "weights": weights, "least": needed.min().item(), "median": needed.median().item()}]


def print_tables(rows: list[dict[str, Any]]) -> None:
    products = [["weights, probabilities", "columns", "within", "least", "error²/expected", "beta"]]
    pilots = [["weights", "pilots", "holds", "columns that do", "median beta"]]
    for row in rows:
        if row["of"] == "product":
            figures = (row["within"], row["least_within"], row["squared_error"], row["beta"])
            name = f"{row['weights']}, {row['probabilities']}"
            products.append([name, str(row["columns"]), *(f"{x:.3f}" for x in figures)])
        elif row["of"] == "pilots":
            figures = (row["holds"], row["columns"], row["beta"])
            pilots.append([row["weights"], str(row["pilots"]), *(f"{x:.3f}" for x in figures)])
    print(format_table("Eq. 4: share of draws within the bound", products))
    print(format_table("Eq. 5: share of draws with beta = sqrt(1/3)", pilots), flush=True)


def plot(record: dict[str, Any], output: Path) -> None:
    """Left: error and bound over columns. Right: share of draws that satisfy the condition over pilots."""
    figure, ((left, right),) = new_figure(2)
    products = [row for row in record["rows"] if row["of"] == "product" and row["weights"] == "pretrained"]
    for colour, kind in zip(("C0", "C1", "C2"), KINDS, strict=True):
        rows = [row for row in products if row["probabilities"] == kind]
        columns = [row["columns"] for row in rows]
        left.plot(columns, [row["median_error"] for row in rows], color=colour, marker="o", label=f"{kind}: error")
        left.plot(columns, [row["median_bound"] for row in rows], color=colour, linestyle="--", label=f"{kind}: bound")
    left.set(xscale="log", yscale="log", xlabel="columns", ylabel="‖BV - B S Sᵀ V‖ / (‖B‖ ‖V‖), median over heads")
    left.set(title=f"Eq. 4, δ = {record['delta']:g}, pretrained weights")
    left.set_xticks(record["columns"], [str(x) for x in record["columns"]])
    for weights, colour in zip(WEIGHTS, ("C0", "C3"), strict=True):
        rows = [row for row in record["rows"] if row["of"] == "pilots" and row["weights"] == weights]
        pilots = [row["pilots"] for row in rows]
        right.plot(pilots, [row["holds"] for row in rows], color=colour, marker="o", label=f"{weights}: all columns")
        right.plot(pilots, [row["columns"] for row in rows], color=colour, linestyle="--", label=f"{weights}: a column")
    right.set(xscale="log", xlabel="pilots", ylabel="share of draws", title="Eq. 5 satisfies β = sqrt(1/3)")
    right.set_xticks(record["pilots"], [str(x) for x in record["pilots"]], rotation=45)
    for axis in (left, right):
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    heads = next(row["heads"] for row in products)
    title = f"{heads} heads of {record['model']}, {record['length']} tokens of text"
    save_figure(figure, title, record, output)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the checks and returns their record."""
    parser = make_parser(__doc__)
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens, default %(default)s")
    parser.add_argument("--columns", type=int, nargs="+", default=[8, 32, 128, 512], metavar="N")
    parser.add_argument("--pilots", type=int, nargs="+", default=[2**i for i in range(3, 15)], metavar="N")
    parser.add_argument("--draws", type=int, default=200, metavar="N", help="sketches per head, default %(default)s")
    parser.add_argument("--pilot-draws", type=int, default=20, metavar="N", help="per head, default %(default)s")
    parser.add_argument("--delta", type=float, default=0.1, help="default %(default)s")
    args = parser.parse_args(argv)

    record = ResumableRecord(args.output, start(args, __file__))
    for weights in WEIGHTS:
        record.part(f"products, {weights}", functools.partial(product_rows, args, weights))
        record.part(f"pilots, {weights}", functools.partial(pilot_rows, args, weights))
    result = record.finish()
    print_tables(result["rows"])
    plot(result, args.output)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
