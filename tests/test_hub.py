"""Pushing to a Hub on localhost with the real client, faults included, and the cards that go along."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hub_server import running
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from hf_skein import hub as hub_module
from hf_skein.card import is_untouched
from hf_skein.convert import convert_checkpoint
from hf_skein.convert import verify as verification


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(40))]
MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
MODEL_FILES |= {"skein_conversion.json"}
BASE_CARD = "---\nlicense: bsd-3-clause\nlanguage: en\ntags: [old]\n---\n# The base model\n"
EDITED = "---\nlicense: mit\n---\n# What a person wrote\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny converted model."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForMaskedLM(BertConfig(vocab_size=len(WORDS), **sizes, max_position_embeddings=40, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "source")
    settings = {"num_columns": 8, "block_size": 8, "num_strata": 1, "min_length": 0}
    convert_checkpoint(folder / "source", folder / "model", 512, settings=settings)
    return folder / "model"


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def hub():
    with running() as hub:
        hub.create("google/bert", {"README.md": BASE_CARD})
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Runs Python in a process of its own whose Hub is `hub`; returns status, output and errors in one text."""

    def run(*arguments, token="hf_writer", **environment):
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}
        variables |= ({"HF_TOKEN": token} if token else {}) | environment
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=variables, cwd=tmp_path, text=True, capture_output=True, timeout=600)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def push(run, folder):
    """`hf-skein push` of `folder` to me/x."""

    def push(*options, repo="me/x", **environment):
        return run("-m", "hf_skein.cli", "push", folder, repo, *options, **environment)

    return push


def files(hub, repo="me/x", revision="main"):
    return hub.repos[repo].files(revision)


def commits(hub, repo="me/x"):
    return len(hub.repos[repo].commits) - 1


def assert_complete(hub, folder, revision="main"):
    """The repository holds what the folder does."""
    there = files(hub, revision=revision)
    assert {path: there[path] for path in MODEL_FILES} == {path: (folder / path).read_bytes() for path in MODEL_FILES}
    assert is_untouched(there["README.md"].decode())


# --- a model goes there and comes back ---


LOAD = """
import sys, torch
{}
assert ("hf_skein" in sys.modules) == {}
torch.save([type(model).__name__, model.eval()(torch.load("ids.pt"))[0]], "loaded.pt")
"""


@pytest.mark.parametrize("is_skein", [True, False])
def test_a_fresh_process_loads_what_was_pushed_as_its_card_says(hub, push, run, folder, tmp_path, is_skein):
    status, text = push("--base-model", "google/bert")
    assert status == 0, text
    assert_complete(hub, folder)
    ids = torch.randint(5, len(WORDS), (2, 60))
    torch.save(ids, tmp_path / "ids.pt")
    blocks = re.findall(r"```python\n(.*?)```", files(hub)["README.md"].decode(), re.DOTALL)
    assert [len(block.split("\n\n")) for block in blocks] == [2, 2]
    status, text = run("-c", LOAD.format(blocks[0] if is_skein else blocks[1], is_skein))
    assert status == 0, text

    name, logits = torch.load(tmp_path / "loaded.pt")
    expected = {}
    for attention in ("skein", "sdpa"):
        model = BertForMaskedLM.from_pretrained(folder, attn_implementation=attention).eval()
        with torch.no_grad():
            expected[attention] = model(ids)[0]
    assert name == "BertForMaskedLM"
    assert torch.equal(logits, expected["skein" if is_skein else "sdpa"])
    assert not torch.allclose(expected["skein"], expected["sdpa"], atol=1e-3)


def test_push_to_hub_of_a_model_keeps_settings_and_card(hub, push, run, folder):
    code = f"""
import hf_skein, torch
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained({str(folder)!r}, attn_implementation="skein").eval()
hf_skein.configure(model, num_columns=16)
for repo in ("me/x", "me/new"):
    model.push_to_hub(repo)
    again = AutoModelForMaskedLM.from_pretrained(repo, attn_implementation="skein").eval()
    ids = torch.arange(60)[None] % 9
    assert torch.equal(model(ids)[0], again(ids)[0])
"""
    assert push("--base-model", "google/bert")[0] == 0
    card = files(hub)["README.md"]
    status, text = run("-c", code)
    assert status == 0, text
    assert files(hub)["README.md"] == card
    assert json.loads(files(hub, "me/new")["config.json"])["skein"]["num_columns"] == 16
    # Transformers writes a card of its own where there is none.
    assert "README.md" in files(hub, "me/new")


# --- what goes ---


def test_only_what_belongs_to_the_model_goes_and_all_is_listed(hub, push, folder):
    extra = ["optimizer.pt", "scheduler.pt", "training_args.bin", "token", ".env", "credentials.json", "rng_state.pth"]
    extra += ["checkpoints/step-1/model.safetensors", "checkpoint-5/config.json", "runs/events", "pytorch_model.bin"]
    extra += ["trainer_state.json", "test_predictions.csv", ".git/config", "optimizer.safetensors"]
    for path in extra:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("secret")
    (folder / "LICENSE").write_text("terms")
    status, text = push("--dry-run")
    assert status == 0, text
    assert not hub.log
    listed = set(re.findall(r"^  (?!not )(\S+) \(", text, re.MULTILINE))
    assert listed == MODEL_FILES | {"README.md", "LICENSE"}
    assert set(re.findall(r"^  not (\S+)", text, re.MULTILINE)) == {path.split("/")[0] for path in extra}
    status, text = push()
    assert status == 0, text
    assert set(files(hub)) == listed | {".gitattributes"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} >= set(extra)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "README.md"])
def test_a_token_is_found(folder, name):
    text = (folder / name).read_text() if (folder / name).exists() else ""
    (folder / name).write_text(text + "hf_" + "aB3" * 12)
    with pytest.raises(hub_module.HubError, match=rf"{name} holds an access token"):
        hub_module.select_files(folder)


def _without_skein(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["skein"]
    (folder / "config.json").write_text(json.dumps(config))


def _truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _without_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "is not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (_without_skein, "has no `skein`.*hf_skein.configure"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks the weights model.safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no `weight_map`"),
        (_without_a_shard, "lacks the weights model-00002-of-00002.safetensors"),
        (_truncated, "model.safetensors is damaged or incomplete"),
    ],
)
def test_what_is_no_complete_model_is_refused_before_anything_is_sent(folder, spoil, message):
    spoil(folder)
    with pytest.raises(hub_module.HubError, match=message):
        hub_module.push(folder, "me/x")


def test_large_files_go_in_parts(push, hub, folder):
    hub.part_size = 10_000
    status, text = push()
    assert status == 0, text
    assert len(hub.requests("PUT .*/part/")) > 1
    assert_complete(hub, folder)


# --- where it goes ---


def test_private_and_a_branch(hub, push, folder):
    status, text = push("--private", "--revision", "long")
    assert status == 0, text
    assert hub.repos["me/x"].private
    assert set(files(hub)) == {".gitattributes"}
    assert_complete(hub, folder, revision="long")
    # A name without an owner is one's own; what is there already is not committed again.
    status, text = push("--revision", "long", repo="x")
    assert status == 0 and "Nothing has changed" in text
    assert commits(hub) == 1


def test_private_does_not_hide_what_is_public(hub, push):
    hub.create("me/x")
    status, text = push("--private")
    assert status == 1 and "exists and is public" in text and "Nothing was uploaded" in text
    assert not hub.requests("preupload")


def test_a_pull_request_to_somebody_else(hub, push, folder):
    hub.create("google/other", {"config.json": "{}", "README.md": EDITED})
    status, text = push("--create-pr", repo="google/other")
    assert status == 0 and "/google/other/discussions/1" in text, text
    there = hub.repos["google/other"]
    assert set(there.files()) == {".gitattributes", "config.json", "README.md"}
    assert there.files("refs/pr/1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert there.files("refs/pr/1")["README.md"].decode() == EDITED
    assert "refs/pr/2" not in there.refs


def test_a_pull_request_is_continued_by_its_revision(hub, push, folder):
    hub.create("me/x")
    assert push("--create-pr")[0] == 0
    (folder / "LICENSE").write_text("terms")
    status, text = push("--revision", "refs/pr/1")
    assert status == 0, text
    assert "LICENSE" in files(hub, revision="refs/pr/1") and set(files(hub)) == {".gitattributes"}


def test_a_pull_request_that_cannot_be(hub, push):
    status, text = push("--create-pr")
    assert status == 1 and "no model me/x to open a pull request for" in text and "me/x" not in hub.repos
    status, text = push("--create-pr", "--revision", "long")
    assert status == 1 and "refs/pr/N" in text


@pytest.mark.parametrize("config", [{"model_type": "bert", "architectures": ["BertForMaskedLM"]}, {"skein": {}}])
def test_a_name_that_holds_another_model_is_taken(hub, push, folder, config):
    old = {"config.json": json.dumps(config), "pytorch_model.bin": "old", "model-00001-of-00002.safetensors": "old"}
    hub.create("me/x", old | {"notes.txt": "keep"})
    status, text = push()
    assert status == 1 and "The name me/x is taken" in text and "--replace" in text
    assert commits(hub) == 0 and not hub.stored
    status, text = push("--replace")
    assert status == 0 and "Deleted there: pytorch_model.bin" in text, text
    assert_complete(hub, folder)
    # Weights that would be loaded in place of the new ones are gone, in the same commit.
    assert set(files(hub)) == MODEL_FILES | {".gitattributes", "README.md", "notes.txt"} and commits(hub) == 1


# --- cards ---


def test_a_card_that_a_person_edited_is_kept(hub, push, folder):
    assert push()[0] == 0
    hub.change("me/x", "README.md", files(hub)["README.md"].decode().replace("# x", "# My own title"))
    (folder / "LICENSE").write_text("terms")
    status, text = push()
    assert status == 0 and "Left as it was there: README.md" in text, text
    assert "# My own title" in files(hub)["README.md"].decode() and files(hub)["LICENSE"] == b"terms"
    status, text = push("--overwrite-card")
    assert status == 0 and "Left" not in text
    assert_complete(hub, folder)


def test_a_card_that_nobody_edited_is_made_anew(hub, push, folder):
    assert push()[0] == 0
    config = json.loads((folder / "config.json").read_text())
    config["skein"]["num_columns"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    assert push()[0] == 0
    assert "`num_columns` | 24" in files(hub)["README.md"].decode()
    # Nor is one that lies in the folder, as after a download.
    (folder / "README.md").write_bytes(files(hub)["README.md"])
    assert push("--license", "mit")[0] == 0
    assert "license: mit" in files(hub)["README.md"].decode()


def test_a_card_edited_while_we_push_is_seen(hub, push):
    assert push()[0] == 0
    hub.before("POST .*/commit/", lambda: hub.change("me/x", "README.md", EDITED))
    status, text = push("--license", "mit")
    assert status == 0 and "The Hub answers 412" in text and "Left as it was" in text, text
    assert files(hub)["README.md"].decode() == EDITED


def test_a_card_written_in_the_folder_goes_as_it_is(hub, push, folder):
    (folder / "README.md").write_text(EDITED)
    status, text = push("--license", "apache-2.0")
    assert status == 1 and "no effect" in text and "me/x" not in hub.repos
    assert push()[0] == 0
    assert files(hub)["README.md"].decode() == EDITED


def test_the_card_says_where_the_model_comes_from_and_passes_validation(hub, push, run, folder, tmp_path):
    status, text = push("--base-model", "google/bert")
    assert status == 0, text
    path = tmp_path / "README.md"
    path.write_bytes(files(hub)["README.md"])
    expected = {"base_model": "google/bert", "license": "bsd-3-clause", "language": "en"}
    expected |= {"library_name": "transformers", "pipeline_tag": "fill-mask", "tags": ["skein", "long-context"]}
    assert metadata_load(path) == expected
    assert ModelCard.load(path).data.to_dict() == expected
    text = path.read_text()
    for part in (
        "up to 512 tokens",
        "`num_columns` | 8",
        "`hf_skein` is the package hf-skein",
        "## Limits",
        "## Intended use",
    ):
        assert part in text
    assert str(tmp_path) not in text


def test_a_card_that_lacks_something_is_pushed_and_says_so(hub, push):
    status, text = push("--base-model", "nobody/nothing")
    assert status == 0 and "give --license" in text and "--base-model" not in text.split("README.md")[-1]


def test_metadata_that_the_hub_refuses(hub, push):
    status, text = push("--license", "do-what-you-want")
    assert status == 1 and "does not accept the metadata" in text and "license" in text
    assert "me/x" not in hub.repos


def test_a_change_of_any_kind_is_an_edit(folder):
    text = str(hub_module.make_card(folder, "me/x", license="mit"))
    assert is_untouched(text) and is_untouched(text.replace("\n", "\r\n"))
    assert not is_untouched(text.replace("license: mit", "license: other"))
    assert not is_untouched(text.replace("# x", "# y"))
    assert not is_untouched(text + "More.\n")
    assert not is_untouched(text[: text.rindex("<!--")])


# --- when something goes wrong ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"token": None}, "There is no token. Log in with `hf auth login`, or set HF_TOKEN"),
        ({"token": "hf_wrong"}, "The Hub refuses the token"),
        ({"token": "hf_reader"}, "The token may not write to me/x"),
        ({"token": "hf_stranger"}, "The token may not write to me/x"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "The connection to http://127.0.0.1:9 failed"),
        ({"HF_HUB_OFFLINE": "1"}, "The offline mode is on. Unset HF_HUB_OFFLINE"),
    ],
)
def test_no_way_in(hub, push, options, message):
    status, text = push(**options)
    assert status == 1 and message in text, text
    assert "Nothing was uploaded." in text and "Traceback" not in text
    assert set(hub.repos) == {"google/bert"} and not hub.stored


def test_the_name_is_somebody_elses_secret(hub, push):
    hub.create("you/x", private=True)
    status, text = push(repo="you/x")
    assert status == 1 and "may not write to you/x" in text


def test_a_name_that_cannot_be(push):
    status, text = push(repo="me/x/y")
    assert status == 1 and "Repo id must be" in text and "Nothing was uploaded." in text


def test_the_conversion_is_in_the_card(folder):
    path = folder / "skein_conversion.json"
    record = json.loads(path.read_text())
    card = hub_module.make_card(folder, "me/x", license="mit")
    assert card.data.base_model is None  # it was a folder
    assert record["notes"]
    for part in ("a `BertForMaskedLM` for 40 tokens; positions: `tile`", "up to 512 tokens", *record["notes"]):
        assert part in card.text
    path.write_text(json.dumps(record | {"source": "bert-base-uncased", "commit": "0" * 40}))
    card = hub_module.make_card(folder, "me/x", license="mit")
    assert card.data.base_model == "bert-base-uncased" and "at commit 000000000000;" in card.text


def test_what_verify_found_is_in_the_card(saved, folder, text):
    found = verification.verify(saved.parent / "source", folder, text=text, lengths=[64], repeats=1, min_cosine=0)
    verification.save(found, folder)
    assert {"skein_verify.json", "skein_verify.png"} <= set(hub_module.select_files(folder).uploaded)
    card = hub_module.make_card(folder, "me/x", license="mit").text
    row = found.rows[0]
    numbers = [row.relative_error[-1], row.token_cosine[-1], row.document_cosine[-1], row.exact_seconds]
    assert "| 64 | " + " | ".join(f"{number:.4g}" for number in numbers) + " |" in card
    assert "](skein_verify.png)" in card
    assert all(f"| {check.name} | {'yes' if check.passed else '**no**'} |" in card for check in found.checks)

    path = folder / "skein_verify.json"
    record = json.loads(path.read_text())
    assert found.passed and "All of these hold" in card
    record["checks"][0]["passed"] = False
    path.write_text(json.dumps(record))
    assert "**Not all of these hold**" in hub_module.make_card(folder, "me/x", license="mit").text
    record["skein"]["num_columns"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(hub_module.HubError, match="made with other settings"):
        hub_module.make_card(folder, "me/x", license="mit")
    verification.save(found, folder)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).add_(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(hub_module.HubError, match="made with other weights"):
        hub_module.make_card(folder, "me/x", license="mit")


def test_settings_that_are_left_out_are_in_the_card(saved, folder, text):
    """`config.skein` may hold some fields only, and a window counts as columns."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    few = {name: config["skein"][name] for name in ("min_length", "block_size")}
    path.write_text(json.dumps(config | {"skein": few, "attention_window": 24}))
    found = verification.verify(saved.parent / "source", folder, text=text, lengths=[64], repeats=1, min_cosine=0)
    verification.save(found, folder)
    assert "| `num_columns` | 24 |" in hub_module.make_card(folder, "me/x", license="mit").text


@pytest.mark.parametrize(
    ("settings", "wanted", "unwanted"),
    [
        ({}, "tokens are computed exactly, so skein gains", "unless"),
        (
            {"layers": {"0": {"min_length": 0}}},
            "are computed exactly, unless `layers` says otherwise, so",
            "All sequences",
        ),
        ({"method": "exact"}, "All sequences are computed exactly, at a cost", "approximation"),
        ({"method": "vmean"}, "every query gets the mean of\n  all values", "approximation"),
    ],
)
def test_the_limits_are_those_of_the_method(folder, settings, wanted, unwanted):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"skein": {**config["skein"], **settings}}))
    limits = hub_module.make_card(folder, "me/x", license="mit").text.partition("## Limits")[2]
    assert wanted in limits and unwanted not in limits


def test_files_of_tokenizers_and_pickled_modules(folder):
    (folder / "1_Dense").mkdir()
    for name in ("word_shape.json", "word_pronunciation.json", "1_Dense/config.json"):
        (folder / name).write_text("{}")
    save_file({"weight": torch.ones(2)}, folder / "1_Dense" / "model.safetensors")
    assert {"word_shape.json", "word_pronunciation.json"} <= set(hub_module.select_files(folder).uploaded)
    (folder / "1_Dense" / "model.safetensors").rename(folder / "1_Dense" / "pytorch_model.bin")
    with pytest.raises(hub_module.HubError, match=r"1_Dense/pytorch_model\.bin holds weights as a pickle"):
        hub_module.select_files(folder)


def test_a_record_that_is_not_ours(folder):
    (folder / "record.json").write_text('{"settings": {}}')
    with pytest.raises(hub_module.HubError, match=r"lacks versions, hardware"):
        hub_module.make_card(folder, "me/x", license="mit")


def test_a_conflict_over_the_name(hub, push):
    hub.fail("POST /api/repos/create", 409, message="This name is reserved")
    status, text = push()
    assert status == 1 and "The name me/x is taken" in text and "This name is reserved" in text


def test_too_large(hub, push):
    hub.max_size = 1000
    status, text = push()
    assert status == 1 and "finds a file too large" in text and "max_shard_size" in text
    assert "Nothing was committed: the repository me/x is empty." in text
    assert set(files(hub)) == {".gitattributes"}


def test_an_upload_that_failed_is_continued(hub, push, folder):
    hub.fail("POST .*/commit/", 403, message="Not now")
    status, text = push("--revision", "long")
    assert status == 1 and "Nothing was committed: the repository me/x is empty, with a branch long." in text
    assert "are not sent again" in text
    assert len(hub.requests("PUT /storage/")) == 1 and set(files(hub)) == {".gitattributes"}
    status, text = push()
    assert status == 0, text
    assert len(hub.requests("PUT /storage/")) == 1
    assert_complete(hub, folder)


@pytest.mark.parametrize("place", ["GET /api/whoami", "PUT /storage/", "POST .*/commit/"])
def test_a_limited_rate_is_waited_for(hub, push, folder, place):
    hub.fail(place, 429, Retry_After="1")
    status, text = push()
    assert status == 0, text
    assert len(hub.requests(place)) == 2
    assert_complete(hub, folder)


def test_a_limited_rate_that_would_take_too_long(hub, push):
    hub.fail("POST .*/commit/", 429, Retry_After="3600")
    status, text = push()
    assert status == 1 and "Wait 3600 s or more" in text and "Nothing was committed" in text


@pytest.mark.parametrize("place", ["POST /api/repos/create", "POST .*/lfs/objects/batch", "POST .*/commit/"])
@pytest.mark.parametrize("fault", [500, None])
def test_trouble_that_passes(hub, push, folder, place, fault):
    hub.fail(place, fault)
    status, text = push()
    assert status == 0, text
    assert_complete(hub, folder)
    assert commits(hub) == 1


def test_trouble_that_stays(hub, push):
    hub.fail("POST .*/commit/", 503, times=9)
    status, text = push()
    assert status == 1 and "trouble of its own (503" in text
    assert "not known" in text and "repeat the command" in text
    assert commits(hub) == 0


@pytest.mark.parametrize("fault", [502, None])
def test_an_answer_that_is_lost_does_not_make_a_second_commit(hub, push, folder, fault):
    hub.fail("POST .*/commit/", fault, after=True)
    status, text = push()
    assert status == 0 and "Pushed" in text, text
    assert commits(hub) == 1
    assert_complete(hub, folder)


def test_an_answer_that_is_lost_does_not_make_a_second_pull_request(hub, push):
    hub.create("me/x")
    hub.fail("POST .*/commit/", None, after=True)
    status, text = push("--create-pr")
    assert status == 1 and "not known" in text and "/me/x/discussions" in text
    assert hub.repos["me/x"].pull_requests == 1


def test_a_connection_dropped_within_a_large_file(hub, push, folder):
    hub.part_size = 40_000
    hub.fail("PUT .*/part/2", None)
    status, text = push()
    assert status == 0, text
    assert_complete(hub, folder)


def test_an_interruption_says_what_is_there(hub, run, folder):
    code = f"""
import huggingface_hub
from hf_skein import hub

def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

huggingface_hub.HfApi.create_commit = interrupt
hub.push({str(folder)!r}, "me/x")
"""
    status, text = run("-c", code)
    assert status != 0 and "Interrupted. Nothing was committed: the repository me/x is empty." in text


def test_a_server_without_xet_says_so(hub, push):
    status, text = push(HF_HUB_DISABLE_XET="0")
    assert status == 1 and "Nothing was committed" in text and "Traceback" not in text


# --- packaging ---


def test_the_cards_are_what_the_records_say(tmp_path):
    command = [sys.executable, ROOT / "scripts/make_model_cards.py", "--output-dir", tmp_path]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    made, there = ({path.name: path.read_text() for path in folder.glob("*.md")} for folder in (tmp_path, CARDS))
    assert made and made == there
    for card in map(ModelCard, made.values()):
        assert card.data.license == "apache-2.0" and card.data.base_model.startswith("sentence-transformers/")


def test_a_wheel_holds_the_template(tmp_path):
    source = tmp_path / "source"
    for name in ("hf_skein", "kernels", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "hf_skein/model_cards/template.md.jinja" in zipfile.ZipFile(wheel).namelist()
