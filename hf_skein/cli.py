"""The command `hf-skein`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(help="Pretrained encoders to long documents with skein attention.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Without a callback, typer would make an only command the whole program."""


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
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    for path in done.deleted:
        typer.echo(f"Deleted there: {path}, which could be loaded instead.")
    if done.card_kept:
        typer.echo(f"Left as it was there: {CARD}, which a person edited. --overwrite-card replaces it.")
    typer.echo(f"{'Pushed' if done.is_new else 'Nothing has changed'}: {done.url}")


if __name__ == "__main__":
    app()
