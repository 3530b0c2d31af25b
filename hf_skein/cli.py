"""The command `hf-skein`."""

from __future__ import annotations

import json
import sys
from collections import Counter
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
def _prepare(context: typer.Context) -> None:
    if context.invoked_subcommand != "push":  # it does without Transformers, which takes a while to import
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
    min_cosine: Annotated[float, typer.Option(help="Least cosine of any document's mean hidden state.")] = 0.9,
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
        typer.echo("No plot: Matplotlib is not installed (pip install matplotlib).")
    if not found.passed:
        _fail("something is off: see the lines marked OFF.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What `hf-skein convert` or `save_pretrained` wrote.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; created if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, created if need be, or refs/pr/N.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a card on the Hub that a person edited.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace another model that the name holds.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Its name on the Hub, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card; default: the base model's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
) -> None:
    """Upload a model with skein attention, its tokenizer, records and card to the Hub, in one commit.

    Never uploaded are optimizer states, checkpoints, tokens and whatever else does not belong to a model. The same
    command continues an interrupted upload. The token is that of `hf auth login` or HF_TOKEN.
    """
    from .hub import CARD, HubError, select_files
    from .hub import push as push_folder

    try:
        files = select_files(folder)
        typer.echo(f"To upload from {folder}:")
        for path in [*files.uploaded, *([] if CARD in files.uploaded else [CARD])]:
            size = (folder / path).stat().st_size if path in files.uploaded else None
            typer.echo(f"  {path} ({'made for the upload' if size is None else f'{size:,} bytes'})")
        for name, count in Counter(path.split("/")[0] for path in files.left_out).items():
            typer.echo(f"  not {name}" + (f" ({count} files)" if (folder / name).is_dir() else ""))
        if dry_run:
            return
        done = push_folder(
            folder,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            overwrite_card=overwrite_card,
            replace=replace,
            base_model=base_model,
            license=license,
            report=typer.echo,
        )
    except HubError as error:
        _fail(error)
    for path in done.deleted:
        typer.echo(f"Deleted there: {path}, which could be loaded instead.")
    if done.card_kept:
        typer.echo(f"Left as it was there: {CARD}, which a person edited. --overwrite-card replaces it.")
    typer.echo(f"{'Pushed' if done.is_new else 'Nothing has changed'}: {done.url}")


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
