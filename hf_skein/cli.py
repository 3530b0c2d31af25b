"""The command `hf-skein`."""

from __future__ import annotations

import typer


app = typer.Typer(help="Pretrained encoders to long documents with skein attention.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Without a callback, typer would make an only command the whole program."""


if __name__ == "__main__":
    app()
