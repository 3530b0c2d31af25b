"""Records: where figures come from (hardware, versions, commit), written as they come."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(*packages: str) -> dict[str, Any]:
    """Versions, hardware and commit of this run.

    Args:
        *packages: Names of distributions whose versions matter, besides Python and torch.

    Returns:
        Plain JSON; the commit is None outside a git checkout and ends in `-dirty` with uncommitted changes or new
        Python files.
    """
    versions = {"python": platform.python_version()}
    for package in ("torch", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    hardware = {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"versions": versions, "hardware": hardware, "commit": _commit()}


def origin(record: dict[str, Any]) -> str:
    """Hardware and versions of a record in a line, for pictures."""
    return f"{place(record)}; {packages(record)}"


def place(record: dict[str, Any]) -> str:
    """The GPU of a record or, if it was not used, the processor and its threads."""
    hardware = record["hardware"]
    on_gpu = hardware["gpu"] and not record.get("device", "cuda").startswith("cpu")
    return hardware["gpu"] if on_gpu else f"{hardware['cpu']}, threads: {hardware['threads']}"


def packages(record: dict[str, Any]) -> str:
    """The versions of a record that matter most."""
    versions = record["versions"]
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "triton") if versions.get(name))


def _cpu_name() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or None


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        is_dirty = git("status", "--porcelain", "--untracked-files=no") or git("status", "--porcelain", "--", ":/*.py")
    except OSError:
        return None
    return f"{commit}-dirty" if commit and is_dirty else commit or None


def short_commit(commit: str | None) -> str:
    """The beginning of a commit, and whether there was more than it."""
    name, dash, dirty = (commit or "unknown").partition("-")
    return f"{name[:10]}{dash}{dirty}"


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, a list of numbers on one line, complete or not at all; makes the folder if need be."""
    text = re.sub(r"\[[\d\s.,eE+-]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), json.dumps(value, indent=2))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


class ResumableRecord:
    """A record that is on disk after each part, so that an interruption costs one part.

    While parts are missing it is `<output>.partial.json`. A later run with the same header (settings, hardware,
    versions, commit) continues it.

    Attributes:
        rows: The rows of all parts that this run asked for, in their order.

    Args:
        output: Path of the record without its suffix.
        header: All that the figures depend on, as plain JSON.
        selection: Fields of the header that only say which parts are asked for; they may differ.

    Raises:
        SystemExit: There is a partial record with another header; the message says where they differ.
    """

    def __init__(self, output: Path, header: dict[str, Any], selection: Collection[str] = ()) -> None:
        self._final, self._partial = output.with_suffix(".json"), output.with_suffix(".partial.json")
        self._header = json.loads(json.dumps(header))
        self._parts: dict[str, list[dict]] = {}
        self._asked: list[str] = []
        if self._partial.exists():
            found = json.loads(self._partial.read_text(encoding="utf-8"))
            self._parts = found.pop("parts")
            fields = (found.keys() | self._header.keys()) - set(selection)
            names = sorted(field for field in fields if found.get(field) != self._header.get(field))
            if names:
                raise SystemExit(
                    f"error: {self._partial} was begun with another {', '.join(names)}; finish it as it was begun, "
                    "delete it, or give another --output."
                )
            print(f"Continuing {self._partial}: {len(self._parts)} parts are there.", flush=True)

    @property
    def rows(self) -> list[dict]:
        return [row for name in self._asked for row in self._parts[name]]

    def __contains__(self, name: str) -> bool:
        """Whether a part is on disk."""
        return name in self._parts

    def part(self, name: str, make: Callable[[], list[dict]]) -> list[dict]:
        """The rows of a part: those on disk, or else those that `make` returns, which are then written."""
        if name not in self._parts:
            self._parts[name] = json.loads(json.dumps(make()))
            write_json(self._partial, {**self._header, "parts": self._parts})
        self._asked.append(name)
        return self._parts[name]

    def finish(self, **results: Any) -> dict[str, Any]:
        """Writes the header, the results and the rows to `<output>.json`.

        The partial record is removed, unless it has parts that were not asked for this time.
        """
        record = {**self._header, **results, "rows": self.rows}
        write_json(self._final, record)
        more = sorted(self._parts.keys() - set(self._asked))
        if more:
            print(f"{self._partial} stays: it has what was not asked for now ({', '.join(more)}).", flush=True)
        else:
            self._partial.unlink(missing_ok=True)
        return record
