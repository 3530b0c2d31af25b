"""The command `hf-skein`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(
    help="Pretrained encoders to long documents with skein attention.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _prepare() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Name on the Hub, or a folder.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of the longest document; default: what the source takes.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="tile, interpolate or keep; default: tile, or rotary angles as they are.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of SkeinConfig; repeatable.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the source's: name or folder.")] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Go without a tokenizer.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the source's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin if need be.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the destination, at the end.")] = False,
) -> None:
    """Write an encoder that reads long documents with skein attention: same class, same weights."""
    from .convert import convert_checkpoint

    if tokenizer is not None and no_tokenizer:
        _fail("--tokenizer and --no-tokenizer exclude each other.")
    try:
        done = convert_checkpoint(
            source,
            destination,
            max_length,
            positions=positions,
            settings=_settings(setting or []),
            tokenizer=False if no_tokenizer else tokenizer,
            dtype=dtype,
            revision=revision,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
        )
    except (ValueError, OSError) as error:
        _fail(error)
    typer.echo(f"{done.model_class}, {done.old_length} -> {done.max_length} tokens ({done.positions}): {destination}")
    for note in done.notes:
        typer.echo(f"- {note}")
    typer.echo(f"Check it: hf-skein verify {source} {destination}")


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="The original: name on the Hub, or a folder.")],
    destination: Annotated[str, typer.Argument(help="What was converted: a folder, or name on the Hub.")],
    text: Annotated[Path | None, typer.Option(help="A text to use; default: Python's documentation.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens to measure at; repeatable.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents per length.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Timed forward passes per length.")] = 3,
    min_cosine: Annotated[float, typer.Option(help="Least cosine of a document's mean hidden state.")] = 0.9,
    device: Annotated[str, typer.Option(help="Where to run, e.g. cuda.")] = "cpu",
    output: Annotated[
        Path | None, typer.Option(help="Folder for skein_verify.json and .png; default: the converted one.")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin if need be.")] = False,
) -> None:
    """Compare a converted model with its original, and skein with exact attention; status 1 if something is off."""
    from .convert import verify as verification

    if output is None and not Path(destination).is_dir():
        _fail("The converted model is no folder here; say where to write: --output FOLDER.")
    try:
        found = verification.verify(
            source,
            destination,
            text=text,
            lengths=length or None,
            documents=documents,
            repeats=repeats,
            min_cosine=min_cosine,
            device=device,
            allow_pickle=allow_pickle,
        )
        written = verification.save(found, output or destination)
    except (ValueError, OSError) as error:
        _fail(error)
    typer.echo(verification.table(found))
    typer.echo("\nWritten: " + ", ".join(map(str, written)))
    if len(written) == 1:
        typer.echo('No plot: Matplotlib is not installed (pip install "hf-skein[plot]").')
    if not found.passed:
        _fail("something is off: see the lines marked OFF.")


def _settings(pairs: list[str]) -> dict[str, Any]:
    """`FIELD=VALUE` pairs; a value is JSON, or else text."""
    settings = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set expects FIELD=VALUE, got {pair!r}.")
        try:
            settings[field] = json.loads(value)
        except json.JSONDecodeError:
            settings[field] = value
    return settings


def _fail(error: object) -> None:
    """End the program with a message and status 1."""
    typer.echo(f"error: {error}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    app()
