"""What the Triton kernels move and compute, stage by stage, and the least time that it takes: a model, no measurement.

    python scripts/kernel_costs.py            # print the table
    python scripts/kernel_costs.py --table    # write it into docs/kernels.md

Bytes count what a stage reads and writes once per launch, as if nothing stayed in a cache; operations count products, a
multiply and an add as two, and twice that where they are multiplied in float32, with TF32 at half the speed. A stage
takes at least as long as either, and stages follow one another.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from _document import markdown_table, rewrite

from hf_skein import SkeinConfig


DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
HEADS = {4096: 96, 16384: 48, 65536: 12}  # batch times heads, by length
WIDTH = 2  # bytes of a number, bf16
SAMPLE = {"routing": 512, "pilots": 1024, "strata": 8}  # rows that a stage looks at; strata: per stratum
COMPONENTS = 8
CHUNK = 1024  # keys of one program
TILE = 16  # the narrowest tile of a product: so many components or pilots cost as much as fewer


class Gpu(NamedTuple):
    bandwidth: float  # bytes per second
    speed: float  # operations per second, bf16


# H200: both measured on one. A100 (SXM, 80 GB): NVIDIA's data sheet.
GPUS = {"H200": Gpu(4.3e12, 790e12), "A100": Gpu(2.039e12, 312e12)}


class Stage(NamedTuple):
    """Per head.

    Attributes:
        name: What it does.
        bytes: Read and written.
        operations: Of products.
        part: What it is for: `"choice"` of blocks and columns, `"residual"` (statistics of the other keys) or
            `"attention"`.
    """

    name: str
    bytes: float
    operations: float
    part: str = "choice"

    def seconds(self, gpu: Gpu, heads: int) -> float:
        return heads * max(self.bytes / gpu.bandwidth, self.operations / gpu.speed)


def num_blocks(n: int, config: SkeinConfig) -> int:
    return 1 << min((math.ceil(n / config.block_size) - 1).bit_length(), config.max_blocks.bit_length() - 1)


def _parts(n: int, numbers: int) -> float:
    """Bytes of some float32 numbers per chunk of the keys, which are written, read and added."""
    return math.ceil(n / CHUNK) * numbers * 4 * 2


def _sums(n: int, p: int, strata: int) -> Stage:
    return Stage(
        "sums over strata, and products",
        2 * n * p * WIDTH + 4 * n + _parts(n, 2 * p * (strata + p)),
        4 * n * p * (strata + p),
        "residual",
    )


def _attention(n: int, p: int, keys: int, blocks: int, d: int, strata: int) -> list[Stage]:
    """Residual and attention of `blocks` blocks to `keys` columns and strata; second order if there are strata."""
    means = max(strata, 1)  # of one stratum at least
    written = 4 * (means * 2 * p + (p * 2 * p if strata else 0))
    read = 2 * d * p * WIDTH
    products = 2 * (d + 2 * strata) * p * 2 * p if strata else 0
    return [
        Stage(
            "residual of the blocks",
            blocks * (read + written) + (written if strata else 0),
            blocks * (2 * d * means * 2 * p + products),
            "residual",
        ),
        Stage(
            "attention",
            2 * n * p * WIDTH + 8 * n + blocks * (read + written),
            4 * n * keys * p + (2 * 4 * n * p * p if strata else 0),
            "attention",
        ),
    ]


def adaptive(n: int, p: int, config: SkeinConfig) -> list[Stage]:
    """The stages of the forward pass of `method="adaptive"`, as the launchers run them."""
    blocks, d, c = num_blocks(n, config), config.num_columns, config.num_strata
    rows, levels, pilots = n * p * WIDTH, int(math.log2(blocks)), TILE * math.ceil(blocks / TILE)
    points = 4 * COMPONENTS * n
    keys = SAMPLE["strata"] * c  # that k-means looks at
    return [
        Stage(
            "exact rows, and means of keys and values",
            2 * rows + _parts(n, 2 * p + config.exact_rows * (p + 1)),
            4 * n * p * max(TILE, config.exact_rows),
            "attention",
        ),
        Stage(
            "routing: coordinates",
            2 * SAMPLE["routing"] * p * WIDTH + 2 * 2 * 4 * p * p + 2 * 4 * COMPONENTS * p + rows + 4 * n + points,
            2 * 2 * 2 * SAMPLE["routing"] * p * p + 2 * n * p * TILE,
        ),
        Stage("routing: tree", levels * (4 * n + points + 4 * n), 0),
        Stage("pilots", rows + 4 * n + SAMPLE["pilots"] * p * WIDTH, 2 * 2 * SAMPLE["pilots"] * p * p),
        Stage("strata: means", 2 * (keys * p * WIDTH + 2 * 4 * c * p), 2 * 4 * keys * p * c),
        Stage(
            "scores, and strata of keys",
            2 * rows + 4 * p * p + 4 * n + 4 * n * blocks,
            2 * n * p * (2 * p + c + pilots),
        ),
        Stage("columns", 4 * n * blocks + 4 * n + 4 * blocks * d + 8 * n, 0),
        _sums(n, p, c),
        *_attention(n, p, d + c, blocks, d, c),
    ]


def skeinformer(n: int, p: int, config: SkeinConfig) -> list[Stage]:
    """The same for `method="skeinformer"`, with the residual of the paper."""
    d = config.num_columns
    rows = n * p * WIDTH
    return [
        Stage(
            "exact rows, and means of keys and values",
            2 * rows + _parts(n, 2 * p + d * (p + 1)),
            4 * n * p * d,
            "attention",
        ),
        Stage("scores by the pilots", 2 * rows + 4 * n, 2 * n * p * d),
        Stage("columns", 8 * n + 8 * n, 0),
        *_attention(n, p, d + 1, 1, d, 0),
    ]


METHODS = {"adaptive": adaptive, "skeinformer": skeinformer}


def exact_seconds(n: int, p: int, gpu: Gpu, heads: int) -> float:
    return Stage("exact", 4 * n * p * WIDTH, 4 * n * n * p).seconds(gpu, heads)


def table(method: str, p: int) -> str:
    """Markdown: bytes, operations and floors of every stage at every length, and the whole beside exact attention."""
    by_length = {n: METHODS[method](n, p, SkeinConfig()) for n in HEADS}

    def cells(n: int, moved: float, computed: float, seconds: list[float]) -> list[str]:
        times = " / ".join(f"{1e6 * s:.0f}" for s in seconds)
        return [f"{HEADS[n] * moved / 2**20:.0f} MiB, {HEADS[n] * computed / 1e9:.1f} G, {times} µs"]

    body = []
    for stages in zip(*by_length.values(), strict=True):
        row = [stages[0].name]
        for n, s in zip(by_length, stages, strict=True):
            row += cells(n, s.bytes, s.operations, [s.seconds(gpu, HEADS[n]) for gpu in GPUS.values()])
        body.append(row)
    total, ratio = ["**all stages**"], ["exact attention at its floor, over this"]
    chooses, prepares = ["share of choosing"], ["share of choosing and of the residual"]
    for n, stages in by_length.items():
        seconds = [sum(s.seconds(gpu, HEADS[n]) for s in stages) for gpu in GPUS.values()]
        total += cells(n, sum(s.bytes for s in stages), sum(s.operations for s in stages), seconds)
        ratios = [exact_seconds(n, p, gpu, HEADS[n]) / s for gpu, s in zip(GPUS.values(), seconds, strict=True)]
        ratio.append(" / ".join(f"{x:.1f}x" for x in ratios))
        for cell, parts in ((chooses, ("choice",)), (prepares, ("choice", "residual"))):
            some = [sum(s.seconds(gpu, HEADS[n]) for s in stages if s.part in parts) for gpu in GPUS.values()]
            cell.append(" / ".join(f"{a / b:.0%}" for a, b in zip(some, seconds, strict=True)))
    head = [f"`{method}`, p={p}", *(f"n={n}, {heads} heads" for n, heads in HEADS.items())]
    return markdown_table(head, [*body, total, chooses, prepares, ratio])


def tables() -> str:
    return "\n\n".join(table(method, p) for method in METHODS for p in (64, 128))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help=f"write the tables into {DOCUMENT.name}")
    if parser.parse_args(arguments).table:
        rewrite(DOCUMENT, "costs", tables())
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
