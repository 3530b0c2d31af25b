"""Checkpoints: folders `step-XXXXXXXX` of `accelerator.save_state`, each with the digest of every file."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _data import InputError
from _record import write_json
from accelerate import Accelerator
from huggingface_hub.utils.sha import sha_fileobj


MANIFEST = "checkpoint.json"
# What may differ between a run and its continuation.
FREE_SETTINGS = ("output_dir", "resume", "overwrite", "save_every", "tracker", "push_to_hub", "private", "lora_merge")


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, best: int, keep: int = 2) -> None:
    """Saves everything a run needs to continue, complete or not at all.

    All checkpoints are deleted but the last `keep` and those that were the best when one of these was saved.

    Args:
        accelerator: Saves what it has prepared, and what is registered with it.
        folder: Of the checkpoints.
        step: Steps done.
        best: The step of the best evaluation so far, 0 if there was none; it is `step` or has a checkpoint.
        keep: How many to keep.
    """
    final = _path(folder, step)
    partial = folder / f"{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / MANIFEST, {"best": best, "sha256": _digests(partial)})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        kept = _checkpoints(folder)[-keep:]
        kept += [_path(folder, _manifest(path)["best"]) for path in kept]
        for path in set(_checkpoints(folder)) - set(kept):
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> Path | None:
    """Restores the last checkpoint that is complete, and deletes those after it; `None` if there are none at all.

    One whose best one is damaged is taken only if there is no other.

    Raises:
        InputError: There are checkpoints, and all are damaged.
    """
    paths = _checkpoints(folder)[::-1]
    if not paths:
        return None
    damage = {path: find_damage(path) for path in paths}
    complete = [path for path in paths if damage[path] is None]
    lost = {path: _damage_of_best(path) for path in complete}
    chosen = next((path for path in complete if lost[path] is None), complete[0] if complete else None)
    if chosen is None:
        raise InputError(f"All checkpoints in {folder} are damaged ({damage[paths[0]]}); start anew with --overwrite.")
    skipped = paths[: paths.index(chosen)]
    for path in skipped:
        found = damage[path] or lost[path]
        accelerator.print(f"Skipping the checkpoint {path.name}: it is incomplete or damaged ({found}).")
    accelerator.load_state(str(chosen))
    accelerator.print(f"Resuming from {chosen.name}.")
    accelerator.wait_for_everyone()  # all have looked at those that are deleted
    if accelerator.is_main_process:
        for path in skipped:
            shutil.rmtree(path)
    return chosen


def is_complete(folder: Path, step: int) -> bool:
    """Whether there is an undamaged checkpoint of a step."""
    return find_damage(_path(folder, step)) is None


def load_best(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Restores the checkpoint of a step, and with it all that is registered.

    Raises:
        InputError: It was damaged since it was saved.
    """
    path = _path(folder, step)
    damage = find_damage(path)
    if damage is not None:
        raise InputError(f"The best checkpoint, {path.name}, is damaged ({damage}). --resume goes on without it.")
    accelerator.load_state(str(path))


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; `None` if nothing is."""
    # Digests are compared before anything is loaded: a bad file must not leave the model half overwritten.
    try:
        manifest = _manifest(path)
        damaged = sorted(name for name, digest in manifest["sha256"].items() if digest != _sha256(path / name))
    except (OSError, ValueError) as error:
        return type(error).__name__
    return ", ".join(damaged) or None


def _damage_of_best(path: Path) -> str | None:
    """What is wrong with the checkpoint that was the best when a complete one was saved; `None` if nothing is."""
    step = _manifest(path)["best"]
    best = _path(path.parent, step)
    damage = find_damage(best) if step else None
    return damage and f"of the best one, {best.name}: {damage}"


def check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Compares settings to those that the run in `folder` began with.

    Raises:
        InputError: They differ, and the message says where; or there are checkpoints of nobody knows what.
    """
    path = folder / "settings.json"
    if not path.exists():
        if _checkpoints(folder):
            raise InputError(f"{folder} has checkpoints, but no {path.name}; start anew with --overwrite.")
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    changed = [
        f"{name} (was {before.get(name)}, now {value})"
        for name, value in now.items()
        if value != before.get(name) and name not in FREE_SETTINGS
    ]
    if changed:
        raise InputError(
            f"{folder.parent} holds a run with another {', '.join(changed)}; delete it or name another --output-dir."
        )


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def _manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not manifest.keys() >= {"best", "sha256"}:
        raise ValueError(f"{path / MANIFEST} is no manifest")
    return manifest


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()
