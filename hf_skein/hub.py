"""Pushing a model with skein attention to the Hub: what goes is listed, and goes in one commit or not at all."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import (
    BadRequestError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from safetensors import SafetensorError, safe_open

from . import __version__
from .card import (
    RECORDS,
    HubError,
    is_untouched,
    make_card,
    read_config,
    read_json,
    read_remote,
)


__all__ = ["HubError", "Pushed", "Selection", "make_card", "push", "select_files"]

CARD = "README.md"
INDEX = "model.safetensors.index.json"

# Only what is known to belong to a model goes: all else may be an optimizer's state, a checkpoint or a secret.
_UPLOADED = re.compile(
    r"config\.json|generation_config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
    r"|vocab\.(txt|json)|merges\.txt|dict\.txt|bpe\.codes|word_(shape|pronunciation)\.json|(spiece|tokenizer|sentencepiece(\.bpe)?)\.model"
    rf"|{CARD}|LICENSE[\w.-]*|NOTICE[\w.-]*|{'|'.join(map(re.escape, RECORDS))}"
    r"|modules\.json|sentence_bert_config\.json|config_sentence_transformers\.json"
    r"|\d+_\w+/(config\.json|model\.safetensors)"
)
# What from_pretrained would load.
_WEIGHTS = re.compile(r"(model|pytorch_model|tf_model|flax_model)[\w.-]*\.(safetensors|bin|h5|msgpack)(\.index\.json)?")
_TOKEN = re.compile(rb"\b(hf|api_org)_[A-Za-z0-9]{30,}\b")

_WAITS = (1.0, 3.0)  # seconds before another attempt
_LONGEST_WAIT = 300.0  # seconds, if the Hub asks for it
_CHANGED = frozenset({409, 412})  # somebody else is changing the repository, or has
_PASSING = frozenset({429, 500, 502, 503, 504})

T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """The files of a folder.

    Args:
        uploaded: Paths, relative to the folder, that go to the Hub.
        left_out: Paths that stay.
    """

    uploaded: list[str]
    left_out: list[str]


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Args:
        url: Of the commit or, if one was asked for, of the pull request.
        commit: Sha of the commit that holds the files.
        is_new: Whether there was anything to commit.
        files: Paths of the repository that are as in the folder now.
        deleted: Weights that were there and would have been loaded in place of these, or beside them.
        card_kept: The card on the Hub was edited by a person and stays as it was.
    """

    url: str
    commit: str
    is_new: bool
    files: list[str]
    deleted: list[str]
    card_kept: bool


# --- what goes ---


def select_files(folder: str | Path) -> Selection:
    """The files of a model's folder that go to the Hub.

    Configuration, safetensors weights, tokenizer, card, license and records go; all else stays, hence optimizer states,
    checkpoints and tokens.

    Raises:
        HubError: It is not the folder of a model with skein attention, its weights are missing or damaged, or a file
            that would go holds an access token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HubError(f"{folder} is not a folder. Give the folder that `hf-skein convert` or `save_pretrained` wrote.")
    read_config(folder)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    uploaded = [path for path in paths if _UPLOADED.fullmatch(path)]
    _check_weights(folder, [path for path in uploaded if path.endswith(".safetensors")])
    for path in set(paths) - set(uploaded):
        if re.fullmatch(r"\d+_\w+/pytorch_model\.bin", path) and f"{path[:-17]}model.safetensors" not in uploaded:
            raise HubError(
                f"{folder / path} holds weights as a pickle, which is not pushed. Load the model with "
                "sentence-transformers and save it again, as safetensors."
            )
    for path in uploaded:
        if not path.endswith(".safetensors") and _TOKEN.search((folder / path).read_bytes()):
            raise HubError(
                f"{folder / path} holds an access token of the Hub. Take it out; revoke it if others saw it."
            )
    return Selection(uploaded, [path for path in paths if path not in uploaded])


def _check_weights(folder: Path, present: list[str]) -> None:
    needed = ["model.safetensors"]
    if (folder / INDEX).exists():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise HubError(f"{folder / INDEX} has no `weight_map`, so it lists no weights. Convert the model again.")
        needed = sorted(set(shards.values()))
    missing = [path for path in needed if path not in present]
    if missing:
        raise HubError(
            f"{folder} lacks the weights {', '.join(missing)}. Save the model with model.save_pretrained(folder), "
            "which writes safetensors; pickled weights (.bin) are not pushed."
        )
    for path in present:
        try:
            with safe_open(folder / path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise HubError(
                f"{folder / path} is damaged or incomplete ({error}). Save or convert the model again."
            ) from None


# --- pushing ---


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
    replace: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    commit_message: str = "Upload a model with skein attention",
    token: str | bool | None = None,
    report: Callable[[str], None] = print,
) -> Pushed:
    """Uploads a model with skein attention, its tokenizer, its records and its card, in one commit.

    The repository is created if need be. An interrupted push is continued by the same call: files that have arrived are
    not sent again. Weights of the repository that are not in the folder are deleted in the same commit, since
    `from_pretrained` could load them instead.

    The card is the folder's `README.md` if a person wrote or edited it, else it is made anew by `make_card`. One on the
    Hub that a person edited, or that was not made by hf-skein, is left as it is unless `overwrite_card`.

    Args:
        folder: What `hf-skein convert` or `save_pretrained` wrote. Nothing in it is changed.
        repo_id: `owner/name`, or `name` for one's own.
        private: Create the repository as a private one.
        revision: Branch to push to, created if need be, or an open pull request (`refs/pr/1`). Default: `main`.
        create_pr: Open a pull request instead of committing; the repository may be somebody else's.
        overwrite_card: Replace a card that a person edited.
        replace: Replace another model that the repository holds.
        base_model: Its name on the Hub, for the card; default: what the conversion or the training recorded.
        license: For the card, as the Hub spells it; default: the base model's.
        commit_message: First line of the commit.
        token: Default: of `hf auth login` or the environment variable `HF_TOKEN`.
        report: Is given a line of text at every step.

    Raises:
        HubError: Anything went wrong; the message says why, what is on the Hub now, and what to do.
    """
    folder = Path(folder)
    selection = select_files(folder)
    if create_pr and revision is not None:
        raise HubError(
            f"A pull request is against the main branch; got a revision ({revision}) too. Give one of the two. An open "
            "pull request is continued with revision='refs/pr/N' alone."
        )
    api = HfApi(token=token, library_name="hf-skein", library_version=__version__)
    state = _State("Nothing was uploaded.")
    with _explained(api, repo_id, state, report):
        user = _patiently(api.whoami, report)
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        card = _local_card(folder, repo_id, base_model, license, token, report)
        _patiently(lambda: _validate(api, card), report)
        _patiently(lambda: _open(api, repo_id, private, revision, create_pr, state), report)
        attempt = _Attempt(api, repo_id, folder, selection.uploaded, card, revision, create_pr, state)
        # Another attempt sends only what is missing, but it would open a second pull request.
        return _patiently(
            lambda: attempt(overwrite_card, replace, commit_message, report),
            report,
            passing=(_CHANGED | {429}) if create_pr else (_CHANGED | _PASSING),
            is_safe_again=not create_pr,
        )


@dataclass
class _State:
    """What is on the Hub.

    Args:
        text: What to say of it if the push fails now.
        is_new: Whether this push created the repository.
        head: The commit that this push found.
    """

    text: str
    is_new: bool = False
    head: str | None = None


def _local_card(
    folder: Path,
    repo_id: str,
    base_model: str | None,
    license: str | None,
    token: str | bool | None,
    report: Callable[[str], None],
) -> str:
    path = folder / CARD
    if path.exists() and not is_untouched(path.read_text(encoding="utf-8")):
        if base_model or license:
            raise HubError(
                f"{path} was edited by a person and is pushed as it is, so base_model and license have no effect. "
                "State them there, or delete it to have a card made."
            )
        return path.read_text(encoding="utf-8")
    card = _patiently(lambda: make_card(folder, repo_id, base_model=base_model, license=license, token=token), report)
    for name, why in (("base_model", "the model it was made from"), ("license", "what others may do with it")):
        if card.data.get(name) is None:
            report(f"The card does not say {why}: give --{name.replace('_', '-')}.")
    return str(card)


def _validate(api: HfApi, card: str) -> None:
    """Has the Hub check the metadata of a card."""
    # ModelCard.validate does the same, but always at huggingface.co in older releases.
    body = {"content": card, "repoType": "model"}
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml", json=body, headers=build_hf_headers(token=api.token)
    )
    try:
        hf_raise_for_status(response)
    except BadRequestError as error:
        said = "; ".join(entry["message"] for entry in response.json()["errors"])
        raise HubError(
            f"The Hub does not accept the metadata of the card: {said}. Nothing was uploaded. Give another base_model "
            "or license, or mend README.md."
        ) from error


def _open(api: HfApi, repo_id: str, private: bool, revision: str | None, create_pr: bool, state: _State) -> None:
    """Sees to it that the repository and the branch are there."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise HubError(
                f"There is no model {repo_id} to open a pull request for. Push without --create-pr."
            ) from None
        try:
            api.create_repo(repo_id, private=private or None)
        except HTTPError as error:
            if _is_unsure(error):
                state.text, state.is_new = f"The repository {repo_id} may have been created; it is empty.", True
            raise
        state.text, state.is_new = f"The repository {repo_id} was created; it is empty.", True
    else:
        if private and not info.private and not state.is_new:
            raise HubError(
                f"{repo_id} exists and is public, and --private is for one to be created. Nothing was uploaded. Make "
                f"it private first ({api.endpoint}/{repo_id}/settings), or choose another name."
            )
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


@dataclass(frozen=True)
class _Attempt:
    """Looks at what is there, uploads what is missing, and commits."""

    api: HfApi
    repo_id: str
    folder: Path
    files: list[str]
    card: str
    revision: str | None
    create_pr: bool
    state: _State

    def __call__(
        self, overwrite_card: bool, replace: bool, commit_message: str, report: Callable[[str], None]
    ) -> Pushed:
        info = self.api.model_info(self.repo_id, revision=self.revision)
        self.state.head = self.state.head or info.sha
        present = {sibling.rfilename for sibling in info.siblings or ()}
        if not (replace or self.create_pr):
            self.check_same_model(info, present)
        card_kept = not overwrite_card and self.was_edited(info, present)
        additions = [CommitOperationAdd(path, self.folder / path) for path in self.files if path != CARD]
        if not card_kept:
            additions.append(CommitOperationAdd(CARD, self.card.encode()))
        files = sorted(addition.path_in_repo for addition in additions)
        deleted = sorted(path for path in present if _WEIGHTS.fullmatch(path) and path not in files)

        untouched = "is empty" if self.state.is_new else "is as it was"
        if self.revision is not None and not self.revision.startswith("refs/"):
            untouched += f", with a branch {self.revision}"
        self.state.text = (
            f"Nothing was committed: the repository {self.repo_id} {untouched}. Large files that have arrived are kept "
            "in the Hub's storage, unseen, and are not sent again: the same command continues."
        )
        self.api.preupload_lfs_files(
            self.repo_id, additions, revision=self.revision, create_pr=self.create_pr, free_memory=False
        )
        try:
            commit = self.api.create_commit(
                self.repo_id,
                [*additions, *(CommitOperationDelete(path) for path in deleted)],
                commit_message=commit_message,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=info.sha,
            )
        except HTTPError as error:
            if _is_unsure(error):
                page = "discussions" if self.create_pr else f"commits/{self.revision or 'main'}"
                place = f"{self.api.endpoint}/{self.repo_id}/{page}"
                self.state.text = (
                    f"Whether the commit has arrived is not known (as a whole, or not at all): look at {place}"
                    + ("." if self.create_pr else ", or repeat the command, which commits what is missing.")
                )
            raise
        is_new = commit.oid != self.state.head
        return Pushed(commit.pr_url or commit.commit_url, commit.oid, is_new, files, deleted, card_kept)

    def check_same_model(self, info: ModelInfo, present: Collection[str]) -> None:
        """Raises if the repository holds another model."""
        ours, theirs = read_config(self.folder), {}
        if "config.json" in present:
            theirs = json.loads(self.read("config.json", info))
        elif not any(_WEIGHTS.fullmatch(path) for path in present):
            return
        differing = [name for name in ("model_type", "architectures") if theirs.get(name) != ours.get(name)]
        if "skein" in theirs and not differing:
            return
        what = "a model without skein's settings"
        if "skein" in theirs:
            what = " and ".join(f"{name} {theirs.get(name)} where yours has {ours.get(name)}" for name in differing)
        raise HubError(
            f"The name {self.repo_id} is taken: the repository holds another model ({what}). Nothing was uploaded. "
            "Choose another name or, to replace that model, give --replace; --create-pr proposes it instead."
        )

    def was_edited(self, info: ModelInfo, present: Collection[str]) -> bool:
        """Whether there is a card that is neither ours nor the one to be uploaded."""
        if CARD not in present:
            return False
        text = self.read(CARD, info)
        return text != self.card and not is_untouched(text)

    def read(self, path: str, info: ModelInfo) -> str:
        return read_remote(self.repo_id, path, revision=info.sha, token=self.api.token)


# --- when something goes wrong ---


def _patiently(
    action: Callable[[], T],
    report: Callable[[str], None],
    passing: Collection[int] = _PASSING,
    is_safe_again: bool = True,
) -> T:
    """The result of `action`, tried again after errors that pass.

    Args:
        action: What to do.
        report: Is told of each wait.
        passing: Status codes after which it is tried again.
        is_safe_again: Whether it is tried again after a connection broke, when nobody knows what has been done.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except HTTPError as error:
            status, asked = _status(error), _retry_after(error)
            may_pass = status in passing if status is not None else is_safe_again
            if wait is None or not may_pass or asked > _LONGEST_WAIT:
                raise
            seconds = max(wait, asked)
            what = f"The Hub answers {status}" if status is not None else f"The connection failed ({error})"
            report(f"{what}; trying again in {seconds:g} s.")
            time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_unsure(error: BaseException) -> bool:
    """Whether the Hub may have done what it was asked for."""
    status = _status(error)
    return status is None or status >= 500


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks to wait for, 0 if it does not."""
    response = getattr(error, "response", None)
    value = "" if response is None else response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


@contextlib.contextmanager
def _explained(api: HfApi, repo_id: str, state: _State, report: Callable[[str], None]) -> Iterator[None]:
    """Turns what huggingface_hub raises into a `HubError` that also says what is on the Hub."""
    try:
        yield
    except HubError:
        raise
    except KeyboardInterrupt:
        report(f"Interrupted. {state.text}")
        raise
    except (HTTPError, RuntimeError, ValueError, OSError) as error:
        cause: BaseException = error
        while not isinstance(cause, HTTPError) and cause.__cause__ is not None:  # an upload's own error lies deeper
            cause = cause.__cause__
        raise HubError(f"{_reason(cause, api, repo_id)} {state.text}") from error


def _reason(error: BaseException, api: HfApi, repo_id: str) -> str:
    """Why a push failed and what to do."""
    if isinstance(error, LocalTokenNotFoundError):
        return (
            "There is no token. Log in with `hf auth login`, or set HF_TOKEN to a token with write access "
            f"({api.endpoint}/settings/tokens)."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "The offline mode is on. Unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) to push."
    status = _status(error)
    said = getattr(error, "server_message", None) or " ".join(str(error).split())
    if status is None and isinstance(error, HTTPError):
        return f"The connection to {api.endpoint} failed ({error}). Check the network, the proxy and HF_ENDPOINT."
    if status == 413 or "too large" in said.lower():
        return (
            f"The Hub finds a file too large ({said}). Save the model in smaller pieces: "
            'model.save_pretrained(folder, max_shard_size="5GB").'
        )
    known = {
        401: "The Hub refuses the token. Log in again with `hf auth login`, or set HF_TOKEN to a valid one",
        403: f"The token may not write to {repo_id}. Use one with write access to it, or another owner's name",
        404: f"The Hub does not find {repo_id}, or a part of it. Check the name and the revision",
        409: f"The name {repo_id} is taken, or somebody else is changing it. Choose another name, or try again later",
        412: f"Somebody else keeps changing {repo_id}. Try again later",
        429: f"The Hub limits the rate of requests. Wait {_retry_after(error):g} s or more and try again",
    }
    if status in known:
        return f"{known[status]} ({said})."
    if status is not None and status >= 500:
        return f"The Hub has trouble of its own ({status}: {said}). Try again later."
    return f"The Hub cannot take it ({said})."
