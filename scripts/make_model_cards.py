"""Writes the cards in model_cards/, from the records in benchmarks/results/ alone: no figure is typed in.

python scripts/make_model_cards.py
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from _record import short_commit

from hf_skein.card import Facts, Table, render
from hf_skein.config import SkeinConfig


ROOT = Path(__file__).parents[1]


def embeddings_table(record: dict[str, Any]) -> Table:
    """What `benchmark_embeddings.py` measured."""
    folds = len(record["rows"][0]["fold_accuracies"])
    text = (
        f"Embeddings of {record['count']} documents (`{record['documents']}`, {record['mean_tokens']:.0f} tokens on "
        f"average, {record['truncated']} of them above {record['truncate']}), without any training of the encoder: "
        f"accuracy of a logistic regression, mean and deviation over {folds} folds, and cosine to the embeddings of "
        f"exact attention. {record['hardware']['cpu']}, {record['hardware']['threads']} threads, torch "
        f"{record['versions']['torch']}, transformers {record['versions']['transformers']}, hf-skein at commit "
        f"{short_commit(record['commit'])}; one run of each, one after another; `scripts/{record['script']}`."
    )
    columns = ["attention", "tokens", "accuracy", "cosine: mean", "least", "seconds for all"]
    rows = [
        [
            row["case"],
            str(row["max_length"]),
            f"{100 * row['accuracy']:.2f} ± {100 * row['accuracy_std']:.2f} %",
            f"{row['cosine_mean']:.3f}",
            f"{row['cosine_min']:.3f}",
            f"{row['seconds']:.0f}",
        ]
        for row in record["rows"]
    ]
    return Table("Measured", text, columns, rows)


def mini_lm(record: dict[str, Any]) -> Facts:
    """MiniLM, its positions extended, as the embeddings were made with it."""
    name = record["model"]
    return Facts(
        repo_id=f"your-name/{name}-skein-{record['max_length']}",
        architecture="BertModel",
        settings=SkeinConfig.from_dict(record["cases"]["skein"]),
        base_model=f"sentence-transformers/{name}",
        carried_over={"license": "apache-2.0", "language": "en"},
        max_length=record["max_length"],
        limits=[
            f"Rows {record['truncate']} and up of the position table are copies of the first {record['truncate']} "
            "(`tile`), and nothing has been trained on them.",
            "An embedding is the mean of the last hidden states over all tokens but padding, scaled to length 1.",
        ],
        tables=[embeddings_table(record)],
    )


def main(argv: list[str] | None = None) -> None:
    """Writes every card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "model_cards", help="default: model_cards/")
    args = parser.parse_args(argv)
    record = json.loads((ROOT / "benchmarks/results/embeddings.json").read_text(encoding="utf-8"))
    for facts in [mini_lm(record)]:
        path = args.output_dir / f"{facts.repo_id.rpartition('/')[2]}.md"
        render(facts).save(path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
