"""Writes the figures of README.md and docs/ from the records in benchmarks/results.

    python scripts/update_readme.py            # write them
    python scripts/update_readme.py --check    # fail where they are not what the records say

A place for them is `<!-- name: begin -->` to `<!-- name: end -->`; `PLACES` says which function fills it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _document import markdown_table, replace_marked
from _record import packages, place, short_commit
from film_reviews import title

from hf_skein import SkeinConfig


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WEIGHTS = ("pretrained", "random")


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def tokens(n: int) -> str:
    return f"n = {n:,}"


def paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False)


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def cores(record: dict[str, Any]) -> str:
    return count(record["hardware"]["threads"], "CPU core")


def cell(value: float | None, form: str) -> str:
    return "\N{EN DASH}" if value is None else format(value, form)


def settings(config: dict[str, Any]) -> str:
    """What a recorded configuration changes of the defaults; where a sketch begins is left out."""
    fields = {
        k: v for k, v in config.items() if k in SkeinConfig.__dataclass_fields__ and k not in ("min_length", "layers")
    }
    default = SkeinConfig().to_dict()
    changed = [f"{name}={json.dumps(value)}" for name, value in sorted(fields.items()) if value != default[name]]
    return f"`{', '.join(changed)}`" if changed else "default"


# README.md


def speeds() -> str:
    record = load("speed_cpu")
    rows = {(row["n"], row["method"]): row for row in record["rows"]}
    default = next(method for method, config in record["methods"].items() if settings(config) == "default")
    lengths = [n for n in record["lengths"] if "forward_speedup" in rows[n, default]]
    body = []
    for method, config in record["methods"].items():
        cells = []
        for n in lengths:
            row = rows[n, method]
            forward, backward = (cell(row.get(f"{x}_speedup"), ".1f") for x in ("forward", "forward_backward"))
            cells.append(f"{forward} / {backward} ({row['error']:.2f})")
        body.append([settings(config), *cells])
    head = ["times faster than exact attention, forward / with backward (error)", *map(tokens, lengths)]
    longest = max(record["lengths"])
    row = rows[longest, default]
    shape, layers = record["shape"], len(record["layers"])
    caption = paragraph(
        f"One layer of MiniLM on WikiText-2, its {shape['heads']} heads widened to p={shape['p']}, fp32,",
        f"{cores(record)}, side by side with PyTorch's fused exact attention, medians of {record['repeats']};",
        f"the error is the relative Frobenius error of the output, mean over heads and {layers} layers",
        "([record](benchmarks/results/speed_cpu.json), `scripts/benchmark_speed.py`).",
        f"At {tokens(longest)} the default takes {row['forward_seconds']:.1f} s and {row['forward_mib'] / 1024:.1f} GB",
        f"(error {row['error']:.2f}, of {row['error_rows']} of its rows).",
    )
    return f"{markdown_table(head, body)}\n\n{caption}"


ENCODERS = {
    "sdpa": "exact (sdpa)",
    "skein": "skein",
    "longformer": "Longformer",
    "big_bird": "BigBird",
    "nystromformer": "Nyströmformer",
}


SIZES = ("minilm", "base")


def encoders() -> str:
    record = load("encoder_minilm")
    seconds = {(row["pass"], row["method"], row["n"]): row["seconds"] for row in record["rows"]}
    lengths = record["lengths"]

    def of(what: str, method: str) -> list[str]:
        found = (seconds.get((what, method, n)) for n in lengths)
        return [cell(s, ".2f" if s is not None and s < 10 else ".1f") for s in found]

    body = [[f"inference, {ENCODERS[method]}", *of("inference", method)] for method in ENCODERS]
    body += [[f"training step, {ENCODERS[method]}", *of("training", method)] for method in ("sdpa", "skein")]
    crossover, of_base = (
        {row["pass"]: row["tokens"] for row in load(f"encoder_{size}")["crossover"]} for size in SIZES
    )
    long = [row for row in load("encoder_base_long")["rows"] if row["pass"] == "inference"]
    longest = max(row["n"] for row in long)
    exact, skein = (
        row["seconds"] for name in ("sdpa", "skein") for row in long if (row["method"], row["n"]) == (name, longest)
    )
    lead = paragraph(
        f"A whole encoder of MiniLM's size (random weights, fp32, {cores(record)}, medians of {record['repeats']}),",
        "the sketch at every length, beside Transformers' other encoders for long documents in the same size",
        "([record](benchmarks/results/encoder_minilm.json) with memory, tokens per second and the share of attention;",
        "`scripts/benchmark_encoder.py`). Up to 704 tokens Transformers' BigBird is full attention:",
    )
    table = markdown_table(["seconds, one document", *map(tokens, lengths)], body)
    result = paragraph(
        f"Skein is faster than exact attention from {crossover['inference']:,} tokens on in inference and from",
        f"{crossover['training']:,} in training; at BERT-base's size from {of_base['inference']:,} and",
        f"{of_base['training']:,}, and at {longest:,} tokens it takes {skein:.0f} s instead of {exact:.0f} s",
        "([all figures](docs/results.md#whole-encoders)).",
    )
    return f"{lead}\n\n{table}\n\n{result}"


def embeddings() -> str:
    record = load("embeddings")
    rows = {row["case"]: row for row in record["rows"]}
    names = {
        "truncated": f"truncated at {record['truncate']}, exact",
        "exact": f"up to {record['max_length']:,} tokens, exact",
        "skein": f"up to {record['max_length']:,} tokens, skein",
    }
    body = [
        [
            name,
            f"{100 * (row := rows[case])['accuracy']:.1f} ± {100 * row['accuracy_std']:.1f} %",
            f"{row['seconds']:.0f}",
            "1" if case == "exact" else f"{row['cosine_mean']:.3f} ({row['cosine_min']:.3f})",
        ]
        for case, name in names.items()
    ]
    head = ["", "accuracy, mean and deviation over folds", "seconds for all", "cosine to exact, mean (least)"]
    lead = paragraph(
        f"Without any training: mean-pooled MiniLM embeddings of {record['count']:,} film reviews (Pang and Lee; mean",
        f"{record['mean_tokens']:.0f} tokens), the position table tiled to {record['max_length']}, logistic",
        "regression, ten folds, skein on every layer (`min_length=0`, else the defaults;",
        "[record](benchmarks/results/embeddings.json), `scripts/benchmark_embeddings.py`).",
        "Most reviews are below the length from which a sketch pays, so here it costs time as well (one run of each,",
        "one after another):",
    )
    return f"{lead}\n\n{markdown_table(head, body)}"


def film_reviews() -> str:
    record = load("film_reviews")
    start = record["excerpts"]["test"]
    body = [["where all begin", f"{100 * start['accuracy']:.1f} %", f"{start['loss']:.3f}", "", ""]]
    body += [
        [
            title(case, record),
            f"{100 * found['accuracy']:.1f} ± {100 * found['accuracy_std']:.1f} %",
            f"{found['loss']:.3f}",
            f"{found['training_minutes']:.1f}",
            f"{found['peak_memory_mib']:,.0f} MiB",
        ]
        for case, found in record["summary"].items()
    ]
    lengths = next(row for row in record["rows"] if row["case"] == "exact")["lengths"]
    train, test = (
        f"(mean {found['mean']:.0f} tokens, longest {found['max']:,}, {found['truncated']} of them cut)"
        for found in (lengths["train"], lengths["test"])
    )
    lead = paragraph(
        "Training on film reviews (Pang and Lee): MiniLM, extended to",
        f"{record['max_length']:,} tokens, learns from the first {record['excerpt']} tokens",
        "of all training reviews (and is tested on as many), and then, each time from",
        f"that checkpoint, from {lengths['train']['documents']} whole ones {train}, tested on",
        f"{lengths['test']['documents']} of fold 9 {test}; mean and deviation over",
        f"{count(len(record['seeds']), 'seed')}, {record['mixed_precision']}, {cores(record)}; skein is exact up to",
        f"{record['min_length']} tokens ([record](benchmarks/results/film_reviews.json), `scripts/film_reviews.py`):",
    )
    head = ["", "test accuracy", "test loss", "training, CPU minutes", "peak memory"]
    accuracy = {case: found["accuracy"] for case, found in record["summary"].items()}
    exact = accuracy["exact"]
    error = (exact * (1 - exact) / record["test_documents"]) ** 0.5
    differences = ", ".join(
        f"{100 * (found - exact):+.1f} ({case.removeprefix('skein-')})"
        for case, found in accuracy.items()
        if case.startswith("skein-")
    )
    remark = paragraph(
        f"Against exact attention skein is at {differences} points, by its columns; one accuracy on",
        f"{record['test_documents']} reviews has a standard error of {100 * error:.1f} points.",
    )
    return f"{lead}\n\n{markdown_table(head, body)}\n\n{remark}"


# docs/method.md


INGREDIENTS = {
    "default": "default",
    "with 4 pilots per block": "default, 4 pilots",
    "with 128 strata": "default, 128 strata",
    "with 32 strata": "default, 32 strata",
    "with 16 strata": "default, 16 strata",
    "with 1 stratum": "default, 1 stratum",
    "with the mean residual (one virtual key)": "default, mean residual",
    "without residual": "default, no residual",
    "one block for all queries": "default, one block",
    "columns drawn uniformly": "default, uniform columns",
    "without exact rows": "default, no exact rows",
    "blocks of 64, 128 columns": "adaptive, block 64, 64 strata, 128 columns",
    "blocks of 64, 192 columns (256 keys with the strata)": "adaptive, block 64, 64 strata, 192 columns",
    "blocks of 64, 256 columns": "adaptive, block 64, 64 strata, 256 columns",
    "blocks of 64, 256 columns, 1 stratum": "adaptive, block 64, 1 strata, 256 columns",
    "Skeinformer, 256 columns and pilots": "skeinformer, 256 columns",
    "its columns with the second-order residual": "skeinformer, 256 columns, second-order residual",
    "window of 256 and CLS": "window of 256 and CLS",
    "oracle: each row's true top 256 keys, the rest dropped": "oracle, 256 columns",
    "V-Mean": "V-Mean",
}


def ingredients() -> str:
    record = load("fidelity")
    error, cosine = (record["summary"][figure] for figure in ("frobenius", "document_cosine"))
    body = [
        [
            title,
            *(cell(error[method].get(str(n)), ".3f") for n in record["lengths"]),
            cell(cosine.get(method, {}).get("documents"), ".3f"),
        ]
        for title, method in INGREDIENTS.items()
    ]
    return markdown_table(["", *map(tokens, record["lengths"]), "cosine of documents"], body)


def replaced() -> str:
    record = load("ablations")
    body = [[name, *(f"{errors[str(n)]:.3f}" for n in record["lengths"])] for name, errors in record["summary"].items()]
    return markdown_table(["", *map(tokens, record["lengths"])], body)


# docs/framework.md


def framework_products() -> str:
    record = load("framework")
    rows = [row for row in record["rows"] if row["of"] == "product"]
    body = [
        [
            row["weights"],
            row["probabilities"],
            row["columns"],
            f"{row['median_beta']:.3f} ({row['least_beta']:.2g})",
            f"{row['median_error']:.3f}",
            f"{row['median_bound']:.3f}",
            f"{math.sqrt(row['quantile']):.3f}",
            f"{row['squared_error']:.3f}",
        ]
        for row in rows
    ]
    head = [
        "weights",
        "probabilities",
        "d",
        "β (least)",
        "error",
        "bound",
        f"{1 - record['delta']:.0%} quantile/bound",
        "error²/expected",
    ]
    least = min(row["least_within"] for row in rows)
    lead = paragraph(
        f"Eq. 4 with δ = {record['delta']:g} at {tokens(record['length'])}, {record['draws']} draws for each of",
        f"{rows[0]['heads']} heads; errors and bounds, relative to `‖B‖ ‖V‖`, and β are medians over heads. The",
        "probabilities are `q`, those of eq. 5 from `d` pilots, and uniform ones. The bound is to hold for",
        f"{1 - record['delta']:.0%} of draws; of every head, at least {least:.1%} of them are below it. How far below",
        "tells their quantile over the bound (root of the mean of squares over heads).",
    )
    return f"{lead}\n\n{markdown_table(head, body)}"


def framework_pilots() -> str:
    record = load("framework")
    rows = [row for row in record["rows"] if row["of"] == "pilots"]
    share = {(row["weights"], row["pilots"]): row for row in rows}
    head = [
        "pilots",
        *(f"{weights}: {what}" for weights in WEIGHTS for what in ("all columns", "a column", "median β")),
    ]
    body = [
        [
            pilots,
            *(
                cell
                for weights in WEIGHTS
                for cell in (
                    f"{100 * share[weights, pilots]['holds']:.0f} %",
                    f"{100 * share[weights, pilots]['columns']:.1f} %",
                    f"{share[weights, pilots]['beta']:.2f}",
                )
            ),
        ]
        for pilots in record["pilots"]
    ]
    needed = {row["weights"]: row for row in record["rows"] if row["of"] == "needed"}
    lead = paragraph(
        f"Eq. 5 at {tokens(record['length'])}: how often the condition with `β = sqrt(1/3)` holds, for all columns at",
        f"once and for one of them, over {rows[0]['heads']} heads and {record['pilot_draws']} draws each. Pilots that",
        f"our inequality calls enough (δ = {record['delta']:g}), median over heads:",
        f"{needed['pretrained']['median']:,.0f} with MiniLM's weights,",
        f"{needed['random']['median']:,.0f} with random ones.",
    )
    return f"{lead}\n\n{markdown_table(head, body)}"


# docs/results.md


def records() -> str:
    """Where every record comes from."""
    body = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        picture = f", [plot](../benchmarks/results/{path.stem}.png)" if path.with_suffix(".png").exists() else ""
        body.append(
            [
                f"[{path.stem}](../benchmarks/results/{path.name}){picture}",
                place(record),
                packages(record),
                f"`{short_commit(record['commit'])}`",
            ]
        )
    return markdown_table(["record", "hardware", "versions", "commit"], body)


def layer_costs() -> str:
    tables = []
    for name in ("speed_cpu", "speed_cpu_bf16"):
        record = load(name)
        body = [
            [
                f"{row['n']:,}",
                settings(record["methods"][row["method"]]) if row["method"] in record["methods"] else row["method"],
                f"{1e3 * row['forward_seconds']:,.0f}",
                cell(row.get("forward_speedup"), ".1f"),
                cell(row.get("forward_backward_speedup"), ".1f"),
                f"{row['forward_mib']:,.0f}",
                f"{row['error']:.3f}" + (f" ({row['error_rows']} rows)" if row["error_rows"] < row["n"] else ""),
            ]
            for row in record["rows"]
        ]
        head = ["tokens", record["dtype"], "ms", "times faster", "with backward", "MiB", "error"]
        tables.append(markdown_table(head, body))
    ratios = [
        f"{row['forward_seconds'] / row['forward_float32_seconds']:.2f} at {row['n']:,} tokens"
        for row in record["rows"]
        if row["method"] in record["methods"] and settings(record["methods"][row["method"]]) == "default"
    ]
    beside = paragraph(
        f"Time of the default in {record['dtype']} over that in float32 in the same run, forward: {', '.join(ratios)}.",
        "(It computes in float32 inside.)",
    )
    repeated = load("speed_cpu_repeated")
    name = next(method for method, config in repeated["methods"].items() if settings(config) == "default")
    default = next(row for row in repeated["rows"] if row["method"] == name)
    least, most = (1e3 * seconds for seconds in default["forward_range"])
    again = paragraph(
        f"Once more, {repeated['repeats']} times over in float32",
        "([record](../benchmarks/results/speed_cpu_repeated.json)): the default",
        f"at {default['n']:,} tokens took {1e3 * default['forward_seconds']:.0f} ms,",
        f"between {least:.0f} and {most:.0f},",
        f"{default['forward_speedup']:.1f} times faster than exact attention.",
    )
    return "\n\n".join([*tables, beside, again])


def whole_encoders() -> str:
    """A table per record of whole encoders; seconds, and MiB in brackets."""
    tables = []
    for path in sorted(RESULTS.glob("encoder_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = {(row["size"], row["pass"], row["method"], row["n"]): row for row in record["rows"]}
        body = [
            [
                f"{size}, {what}",
                ENCODERS[method],
                *(
                    f"{row['seconds']:.3g} ({row['mib']:,.0f})" if (row := rows.get((*key, n))) else cell(None, "")
                    for n in record["lengths"]
                ),
            ]
            for key in dict.fromkeys(place[:3] for place in rows)
            for size, what, method in [key]
        ]
        lead = paragraph(
            f"[{path.stem}](../benchmarks/results/{path.name}): {record['dtype']}, {cores(record)}, medians of",
            f"{record['repeats']}; seconds, and MiB in brackets. Skein becomes faster at",
            " and ".join(
                f"{row['tokens']:,} tokens in {row['pass']} ({row['size']}, {row['is']})" for row in record["crossover"]
            )
            + ".",
        )
        tables += [lead, markdown_table(["", "", *map(tokens, record["lengths"])], body)]
    return "\n\n".join(tables)


def figure1() -> str:
    record = load("figure1")
    by_place = {(row["weights"], row["n"], row["method"], row["features"]): row for row in record["summary"]}
    tables = []
    for n in record["lengths"]:
        exact = next(row for row in record["rows"] if row["method"] == "exact" and row["n"] == n)
        for weights in WEIGHTS:
            features = [d for d in record["features"] if d < n]
            body = []
            for method in dict.fromkeys(row["method"] for row in record["summary"]):
                rows = [by_place[weights, n, method, d] for d in features]
                time = f"{1e3 * by_place['pretrained', n, method, 128]['seconds']:.0f}"
                body.append([method, *(f"{row['spectral']:.3g} ± {row['standard_error']:.1g}" for row in rows), time])
            heads = by_place[weights, n, "vmean", features[0]]["heads"]
            title = f"{tokens(n)}, {weights} weights, {heads} heads"
            head = [title, *map(str, features), f"ms at 128 (exact: {1e3 * exact['forward_seconds']:.0f})"]
            tables.append(markdown_table(head, body))
    lead = paragraph(
        f"Mean and standard error over heads, of {len(record['layers'])} layers and {record['num_texts']} texts, of",
        f"`{record['model']}`, fp32; times of one layer's forward, medians of {record['repeats']}, on {cores(record)},",
        "all methods in turn.",
    )
    return "\n\n".join([lead, *tables])


def figure1_front() -> str:
    """By what the error falls if a layer may take more time, with the trained weights."""
    record = load("figure1")
    sentences = []
    for n in record["lengths"]:
        exact = next(row for row in record["rows"] if row["method"] == "exact" and row["n"] == n)["forward_seconds"]
        rows = [row for row in record["summary"] if (row["weights"], row["n"]) == ("pretrained", n)]
        rows.sort(key=lambda row: (row["seconds"], row["spectral"]))
        front = [row for i, row in enumerate(rows) if all(row["spectral"] < other["spectral"] for other in rows[:i])]
        first = {row["method"].partition(",")[0]: row for row in reversed(front)}  # whatever the size of blocks
        described = ", ".join(
            f"{method} ({1e3 * row['seconds']:.0f} ms, {row['spectral']:.2f})"
            for method, row in sorted(first.items(), key=lambda item: item[1]["seconds"])
        )
        sentences.append(f"At {tokens(n)} (exact: {1e3 * exact:.0f} ms) the front is {described}.")
    return paragraph(
        "**Against time**, on one thread of a machine that was shared, so take it as rough: the methods that are best",
        "for some time, each with the first such time and its error there.",
        *sentences,
    )


NEEDLES = {
    "truncated": "truncated at {chunk}",
    "pooled": "chunks of {chunk}, pooled",
    "exact": "exact",
    "skein": "skein",
}


def needle() -> str:
    record = load("needle")
    short, *rows = record["rows"]
    found = {(row["method"], row["length"]): row for row in rows}
    head = ["accuracy before → after", *map(tokens, record["lengths"])]
    body = [
        [
            title.format(**record),
            *(
                f"{100 * row['accuracy_before']:.0f} → {100 * row['accuracy']:.0f} %"
                if (row := found.get((method, n)))
                else cell(None, "")
                for n in record["lengths"]
            ),
        ]
        for method, title in NEEDLES.items()
    ]
    lead = paragraph(
        "Over long distances: do a statement in the first quarter of a document and one in its last quarter agree?",
        f"MiniLM, first trained on short documents of at most {short['length']} tokens",
        f"({100 * short['accuracy']:.0f} % of such are then classified correctly), goes on with each method from one",
        f"length to the next: it is tested on {record['test_documents']} documents, trained on",
        f"{record['train_documents']} others, and tested again. Chance is 50 %; one seed,",
        f"{'bf16' if record['bf16'] else 'fp32'}, {cores(record)}; skein has its defaults, and is exact up to",
        f"{record['skein']['min_length']} tokens ([record](benchmarks/results/needle.json), `scripts/needle.py`).",
    )
    return f"{lead}\n\n{markdown_table(head, body)}"


def mlm() -> str:
    tables = []
    for path in sorted(RESULTS.glob("adapt_mlm_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        settings = record["settings"]
        size = settings["batch_size"] * settings["gradient_accumulation_steps"]
        lengths = record["lengths"]
        body = [
            [f"{evaluation['step']}", f"{evaluation['loss']:.3f}", f"{evaluation['exact_loss']:.3f}"]
            for evaluation in record["validation"]
        ]
        lead = paragraph(
            f"[{path.stem}](../benchmarks/results/{path.name}): pieces of {settings['max_length']:,} tokens,",
            f"{lengths['train']['documents']} for training in steps of {size},",
            f"{lengths['validation']['documents']} held out; learning rate {settings['learning_rate']:g},",
            f"{settings['mixed_precision']}, {cores(record)}, {record['training_seconds'] / 60:.0f} minutes.",
        )
        tables += [lead, markdown_table(["steps", "loss of skein", "loss of exact attention"], body)]
    return "\n\n".join(tables)


PLACES: list[tuple[str, str, Callable[[], str]]] = [
    ("README.md", "speeds", speeds),
    ("README.md", "encoders", encoders),
    ("README.md", "embeddings", embeddings),
    ("README.md", "film-reviews", film_reviews),
    ("docs/method.md", "ingredients", ingredients),
    ("docs/method.md", "replaced", replaced),
    ("docs/framework.md", "framework-products", framework_products),
    ("docs/framework.md", "framework-pilots", framework_pilots),
    ("docs/results.md", "records", records),
    ("docs/results.md", "layer-costs", layer_costs),
    ("docs/results.md", "whole-encoders", whole_encoders),
    ("docs/results.md", "figure1-front", figure1_front),
    ("docs/results.md", "figure1", figure1),
    ("README.md", "needle", needle),
    ("docs/results.md", "mlm", mlm),
]


def documents(places: Iterable[tuple[str, str, Callable[[], str]]]) -> tuple[dict[Path, str], list[str]]:
    """The documents as the records say they are, and the places that differ from what stands there."""
    texts: dict[Path, str] = {}
    stale = []
    for document, name, make in places:
        path = ROOT / document
        before = texts[path] if path in texts else path.read_text(encoding="utf-8")
        texts[path] = replace_marked(before, name, make())
        if texts[path] != before:
            stale.append(f"{document}: {name}")
    return texts, stale


def main(argv: list[str] | None = None) -> int:
    """Writes or checks the documents; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if there is something to write")
    args = parser.parse_args(argv)
    texts, stale = documents(PLACES)
    if args.check:
        for place in stale:
            print(f"{place} is not what the record says; run python scripts/update_readme.py.", file=sys.stderr)
        return int(bool(stale))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
