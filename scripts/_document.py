"""Tables in Markdown documents, between markers, written by the scripts whose records they show."""

import re
from collections.abc import Iterable
from pathlib import Path


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_marked(document: str, name: str, text: str) -> str:
    """`document` with `text` between `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
        ValueError: There is not exactly one such place.
    """
    marked = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.S)
    document, count = marked.subn(lambda m: f"{m[1]}{text}\n{m[2]}", document)
    if count != 1:
        raise ValueError(
            f"The document has {count} places between `<!-- {name}: begin -->` and its end; expected is one."
        )
    return document


def rewrite(path: Path, name: str, text: str) -> None:
    path.write_text(replace_marked(path.read_text(encoding="utf-8"), name, text), encoding="utf-8")
