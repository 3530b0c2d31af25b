"""ListOps of Long Range Arena: random expressions of nested operators on digits, and their values.

The specification is the published one (Tay et al. 2021, arXiv 2011.04006; after Nangia and Bowman 2018, arXiv
1804.06028): a node is an operator with probability 1/4, else a digit, and always a digit at the greatest depth, 10; an
operator (MAX, MIN, MED, SM, the sum modulo 10) has 2 to 10 arguments; expressions whose length is not between 500 and
2000 tokens are thrown away. The value is the label.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np


OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: int(statistics.median(values)),  # an even number of arguments: the mean, rounded down
    "[SM": lambda values: sum(values) % 10,
}
CLOSE = "]"
TOKENS = (*map(str, range(10)), *OPERATORS, CLOSE)
VOCABULARY = {token: i for i, token in enumerate(TOKENS, start=1)}  # 0 is padding

OPERATOR_PROBABILITY = 0.25


class _TooLong(Exception):
    """The expression has more tokens than allowed."""


def random_expression(
    draw: np.random.Generator, max_depth: int = 10, max_arguments: int = 10, max_length: int = 2000
) -> tuple[list[str], int] | None:
    """The tokens of one random expression and its value; `None` if it has `max_length` tokens or more."""
    tokens: list[str] = []

    def grow(depth: int) -> int:
        if len(tokens) >= max_length:
            raise _TooLong
        if depth == max_depth or draw.random() >= OPERATOR_PROBABILITY:
            digit = int(draw.integers(10))
            tokens.append(str(digit))
            return digit
        operator = list(OPERATORS)[draw.integers(len(OPERATORS))]
        tokens.append(operator)
        values = [grow(depth + 1) for _ in range(draw.integers(2, max_arguments + 1))]
        tokens.append(CLOSE)
        return OPERATORS[operator](values)

    try:
        value = grow(1)
    except _TooLong:
        return None
    return (tokens, value) if len(tokens) < max_length else None


def generate(
    count: int,
    seed: int,
    *,
    balanced: bool = False,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_arguments: int = 10,
) -> Iterator[tuple[list[str], int]]:
    """Distinct random expressions, as tokens, with their values.

    Args:
        count: How many.
        seed: The same seed gives the same expressions.
        balanced: Take as many of every value (up to one); else values are as frequent as the specification makes them.
        min_length: Expressions have more tokens than this.
        max_length: Expressions have fewer tokens than this.
        max_depth: Depth of the deepest digit; the root has depth 1.
        max_arguments: Most arguments of an operator.
    """
    draw = np.random.default_rng(seed)
    quota = [count // 10 + (value < count % 10) if balanced else count for value in range(10)]
    seen: set[tuple[str, ...]] = set()
    while len(seen) < count:
        expression = random_expression(draw, max_depth, max_arguments, max_length)
        if expression is None or len(expression[0]) <= min_length:
            continue
        tokens, value = expression
        if quota[value] == 0 or tuple(tokens) in seen:
            continue
        quota[value] -= 1
        seen.add(tuple(tokens))
        yield tokens, value


def parse(source: str) -> list[str]:
    """Tokens of an expression as Long Range Arena writes it; round brackets, which say nothing, are left out.

    Raises:
        ValueError: A token is not of ListOps.
    """
    tokens = source.replace("(", " ").replace(")", " ").split()
    unknown = sorted(set(tokens) - VOCABULARY.keys())
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))} in an expression; its tokens are {' '.join(TOKENS)}.")
    return tokens
