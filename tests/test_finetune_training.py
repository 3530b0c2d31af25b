"""What all fine-tuning scripts share: the loop, processes, resuming after a kill, LoRA, streams, refusals."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import _finetuning as finetuning
import _options
import pytest
import torch
from _data import InputError
from _finetuning import finetune
from accelerate import Accelerator
from finetune_classification import Classification
from finetune_embedding import Embedding
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_encoder import make_documents, make_encoder, options, write_jsonl
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from hf_skein import SkeinConfig
from hf_skein.card import make_card


SCRIPTS = Path(finetuning.__file__).parent


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"), BertForSequenceClassification)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """80 documents."""
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    return write_jsonl(path, [{"text": text, "label": label} for text, label in make_documents(80)])


def run(encoder: str, dataset: Path, output: Path, *more: object) -> dict:
    return finetune(Classification, options(encoder, dataset, output, *more))


# Options and model


@pytest.mark.parametrize(
    ("config_class", "model_class", "limit"), [(BertConfig, BertModel, 66), (RobertaConfig, RobertaModel, 64)]
)
def test_position_limit(config_class, model_class, limit):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = config_class(vocab_size=9, max_position_embeddings=66, pad_token_id=1, **sizes)
    model = model_class(config)
    assert finetuning.position_limit(model) == limit
    model(input_ids=torch.full((1, limit), 3))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 3))


def test_every_field_of_skein_is_an_option():
    parser = argparse.ArgumentParser()
    _options.add_model_arguments(parser)
    assert _options.skein_settings(parser.parse_args(["--model", "m"])) == {}
    values = {
        "method": "skeinformer",
        "num_columns": 7,
        "block_size": 8,
        "max_blocks": 9,
        "num_strata": 10,
        "num_pilots": 11,
        "column_sampling": "uniform",
        "row_normalization": "simple",
        "residual": "mean",
        "pilot_reutilization": False,
        "exact_rows": 2,
        "min_length": 0,
        "seed": 12,
        "strict": True,
        "backend": "torch",
        "layers": {"0": {"method": "exact"}},
    }
    words = ["--model", "m"]
    for name, value in values.items():
        option = f"--skein-{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    settings = _options.skein_settings(parser.parse_args(words))
    assert settings == values and settings.keys() == {field.name for field in dataclasses.fields(SkeinConfig)}
    assert SkeinConfig(**settings).layers == {0: {"method": "exact"}}
    assert all(text.endswith(".") for text in _options.skein_help().values())
    assert "Keys each query attends to exactly" in parser.format_help().replace("\n" + " " * 24, " ")


# Resuming. 64 documents are 11 batches, 6 steps an epoch; the last step of an epoch is of one batch.


ACCUMULATE = ("--batch-size", 6, "--gradient-accumulation-steps", 2, "--save-every", 2)
ACCUMULATE += ("--attn", "skein", "--skein-min-length", 0, "--skein-num-columns", 8, "--skein-block-size", 16)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory) -> str:
    """An encoder with dropout, of its columns too: every step draws random numbers."""
    folder = make_encoder(tmp_path_factory.mktemp("dropping"), BertForSequenceClassification)
    config = BertConfig.from_pretrained(folder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, dropping, reviews) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    return output, run(dropping, reviews, output, *ACCUMULATE)


def assert_same_run(output: Path, record: dict, reference: Path, expected: dict) -> None:
    for key in ("losses", "validation", "best_step", "test"):
        for found in (record, expected):
            found.get("test", {}).pop("seconds", None)
        assert record[key] == expected[key]
    weights, wanted = load_file(output / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)


# Two processes that end as in a power failure: in a backward pass, and in the middle of writing a checkpoint.
KILLED = """
import os, signal, sys
from accelerate import Accelerator
from _finetuning import finetune
from finetune_classification import Classification

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_in_a_step():
    backward, passes = Accelerator.backward, []
    def counted(self, loss, **kwargs):
        passes.append(loss)
        if len(passes) > 18:
            die()
        backward(self, loss, **kwargs)
    Accelerator.backward = counted

def die_while_saving():
    save_state, saves = Accelerator.save_state, []
    def half(self, folder):
        saves.append(folder)
        if len(saves) == 4:
            os.makedirs(folder)
            with open(os.path.join(folder, "model.safetensors"), "wb") as file:
                file.write(b"half")
            die()
        return save_state(self, folder)
    Accelerator.save_state = half

folder, *words = sys.argv[1:]
for when in (die_in_a_step, die_while_saving):
    child = os.fork()
    if child == 0:
        when()
        finetune(Classification, [*words, "--output-dir", os.path.join(folder, when.__name__)])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, dropping, reviews) -> dict[str, Path]:
    """Runs that were killed in step 10, and while the checkpoint of step 8 was written."""
    folder = tmp_path_factory.mktemp("killed")
    words = options(dropping, reviews, folder, *ACCUMULATE)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(folder), *words], env=environment, check=True)
    return {"step": folder / "die_in_a_step", "save": folder / "die_while_saving"}


def test_killed_run_goes_on_exactly(capsys, dropping, reviews, uninterrupted, killed):
    reference, expected = uninterrupted
    checkpoints = killed["step"] / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000006", "step-00000008"]
    record = run(dropping, reviews, killed["step"], *ACCUMULATE, "--resume")
    assert "Resuming from step-00000008" in capsys.readouterr().out
    assert_same_run(killed["step"], record, reference, expected)
    last = [folder / "checkpoints" / "step-00000012" / "model.safetensors" for folder in (killed["step"], reference)]
    assert last[0].read_bytes() == last[1].read_bytes()
    assert len(list(checkpoints.glob("step-*"))) <= 3


def test_run_killed_while_it_saved_goes_on_exactly(capsys, dropping, reviews, uninterrupted, killed):
    reference, expected = uninterrupted
    names = sorted(path.name for path in (killed["save"] / "checkpoints").glob("step-*"))
    assert names == ["step-00000004", "step-00000006", "step-00000008.partial"]
    record = run(dropping, reviews, killed["save"], *ACCUMULATE, "--resume")
    assert "Resuming from step-00000006" in capsys.readouterr().out
    assert_same_run(killed["save"], record, reference, expected)


def interrupt_after(monkeypatch, batches: int) -> None:
    """Makes the backward pass of a later batch end the run as Ctrl-C does."""
    backward, calls = Accelerator.backward, []

    def interrupted(self, loss, **kwargs):
        calls.append(loss)
        if len(calls) > batches:
            raise KeyboardInterrupt
        backward(self, loss, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", interrupted)


@pytest.mark.parametrize("damaged", ["model.safetensors", "random_states_0.pkl", "checkpoint.json"])
def test_damaged_checkpoint_is_skipped(tmp_path, monkeypatch, capsys, dropping, reviews, uninterrupted, damaged):
    reference, expected = uninterrupted
    output = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 18)  # in step 10, the fourth of the second epoch
        run(dropping, reviews, output, *ACCUMULATE)
    path = output / "checkpoints" / "step-00000008" / damaged
    path.write_bytes(path.read_bytes()[:-40])
    record = run(dropping, reviews, output, *ACCUMULATE, "--resume")
    out = capsys.readouterr().out
    assert "Skipping the checkpoint step-00000008: it is incomplete or damaged" in out
    assert "Resuming from step-00000006" in out
    assert_same_run(output, record, reference, expected)


def test_without_its_best_checkpoint_a_run_goes_on_from_the_last(tmp_path, monkeypatch, capsys, encoder, reviews):
    output, more = tmp_path / "run", ("--save-every", 2, "--batch-size", 12)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 10)  # in step 11, the last of the second epoch
        run(encoder, reviews, output, *more)
    checkpoints = output / "checkpoints"
    assert {path.name for path in checkpoints.glob("step-*")} == {"step-00000006", "step-00000008", "step-00000010"}
    (checkpoints / "step-00000006" / "model.safetensors").write_bytes(b"damaged")
    record = run(encoder, reviews, output, *more, "--resume")
    out = capsys.readouterr().out
    assert "Resuming from step-00000010" in out and "The best checkpoint, step 6, is lost" in out
    assert record["best_step"] == 12 and [metrics["step"] for metrics in record["validation"]] == [6, 12]


def test_a_checkpoint_that_was_skipped_does_not_stay(tmp_path, monkeypatch, encoder, reviews):
    """With other steps to be saved at it would stand beside the good ones, and push one of them out."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 6)
        run(encoder, reviews, output, "--batch-size", 4, "--save-every", 2)
    checkpoints = output / "checkpoints"
    (checkpoints / "step-00000006" / "checkpoint.json").write_text("{")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 4)
        run(encoder, reviews, output, "--batch-size", 4, "--save-every", 8, "--resume")
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000004", "step-00000008"]


def test_a_run_without_a_good_checkpoint_is_not_begun_anew(tmp_path, monkeypatch, encoder, reviews):
    output = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        run(encoder, reviews, output, "--save-every", 2)
    weights = output / "checkpoints" / "step-00000002" / "model.safetensors"
    weights.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"All checkpoints in .* are damaged .*; start anew with --overwrite"):
        run(encoder, reviews, output, "--save-every", 2, "--resume")
    assert weights.exists()
    (output / "checkpoints" / "settings.json").unlink()
    with pytest.raises(InputError, match=r"has checkpoints, but no settings\.json"):
        run(encoder, reviews, output, "--save-every", 2, "--resume")


@pytest.mark.parametrize("option", ["--model", "--dataset", "--test-file"])
def test_what_a_run_reads_is_not_in_the_folder_that_it_clears(tmp_path, encoder, reviews, option):
    output = tmp_path / "run"
    source = Path(encoder if option == "--model" else reviews)
    (output / "base").mkdir(parents=True)
    moved = output / "base" / source.name
    shutil.copytree(source, moved) if source.is_dir() else shutil.copy(source, moved)
    with pytest.raises(InputError, match=f"{option} .* lies in --output-dir"):
        run(encoder, reviews, output, option, moved, "--overwrite")
    assert moved.exists()


def test_what_is_left_of_a_deletion_is_deleted(tmp_path, encoder, reviews):
    output = tmp_path / "run"
    for name in ("checkpoints", "checkpoints.deleted"):
        (output / name / "step-00000002").mkdir(parents=True)
    run(encoder, reviews, output, "--epochs", 1, "--overwrite")
    assert not (output / "checkpoints.deleted").exists()
    assert not (output / "checkpoints" / "step-00000002").exists()


def test_a_run_is_resumed_under_its_own_settings_only(encoder, reviews, uninterrupted):
    output, _ = uninterrupted
    with pytest.raises(InputError, match=r"learning_rate \(was 0\.01, now 0\.1\)"):
        run(encoder, reviews, output, *ACCUMULATE, "--resume", "--learning-rate", "0.1")
    with pytest.raises(InputError, match="is not empty: add --resume or --overwrite"):
        run(encoder, reviews, output)


def test_a_run_is_resumed_with_its_own_model_and_data_only(tmp_path, encoder, reviews):
    """Others by the same name: what is compared is what they hold."""
    model, data = tmp_path / "model", tmp_path / "reviews.jsonl"
    shutil.copytree(encoder, model)
    shutil.copy(reviews, data)
    stream = ("--streaming", "--max-steps", 2, "--labels", "neg", "pos", "--validation-file", reviews)
    run(str(model), data, tmp_path / "run", *stream)
    run(str(model), data, tmp_path / "run", *stream, "--resume")
    write_jsonl(data, [{"text": text, "label": label} for text, label in make_documents(80, seed=1)])
    with pytest.raises(InputError, match="holds a run with another stream_bytes"):
        run(str(model), data, tmp_path / "run", *stream, "--resume")
    shutil.copy(reviews, data)
    other = BertForSequenceClassification.from_pretrained(model)
    other.bert.pooler.dense.bias.data.add_(1)
    other.save_pretrained(model)
    with pytest.raises(InputError, match="holds a run with another model_sha256"):
        run(str(model), data, tmp_path / "run", *stream, "--resume")


def test_best_checkpoint_and_early_stopping(tmp_path, monkeypatch, capsys, encoder, reviews):
    """The second evaluation is the best one; two more, and the run stops and gives the weights of the second."""
    metrics, values = Classification.metrics, iter([0.2, 0.9, 0.9, 0.1])

    def scripted(self, results, rows, encoded):
        found = metrics(self, results, rows, encoded)
        return {**found, "accuracy": next(values, found["accuracy"])}

    monkeypatch.setattr(Classification, "metrics", scripted)
    output = tmp_path / "run"
    record = run(encoder, reviews, output, "--evaluate-every", 2, "--patience", 2, "--max-steps", 20)
    assert record["best_step"] == 4 and len(record["losses"]) == 8
    assert [metrics["step"] for metrics in record["validation"]] == [2, 4, 6, 8]
    assert "Stopping early: 2 evaluations without a better accuracy" in capsys.readouterr().out
    saved, best = load_file(output / "model.safetensors"), output / "checkpoints" / "step-00000004"
    assert all(torch.equal(weight, saved[name]) for name, weight in load_file(best / "model.safetensors").items())


# Batches


def test_accumulated_batches_are_one(tmp_path, encoder, reviews):
    more = ("--epochs", 1, "--learning-rate", "1e-3", "--attn", "skein", "--skein-min-length", 0)
    more += ("--skein-num-columns", 8, "--max-train-documents", 23)
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    assert BertConfig.from_pretrained(encoder).to_dict().items() >= without_dropout.items()
    one = run(encoder, reviews, tmp_path / "one", *more, "--batch-size", 8)
    several = ("--batch-size", 2, "--gradient-accumulation-steps", 4, "--gradient-checkpointing")
    accumulated = run(encoder, reviews, tmp_path / "accumulated", *more, *several)
    assert len(one["losses"]) == 3 and accumulated["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert accumulated["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-3)


# LoRA


LORA = ("--lora", "--lora-rank", 4, "--max-length", 72, "--learning-rate", "2e-2", "--epochs", 3)


@torch.no_grad()
def logits_of(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    texts = [text for text, _ in make_documents(8, seed=3)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval()(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("attn", ["sdpa", "skein"])
def test_lora_is_saved_loaded_and_merged(tmp_path, encoder, reviews, attn):
    more = ("--attn", attn, "--skein-min-length", 0, "--skein-num-columns", 8) if attn == "skein" else ("--attn", attn)
    record = run(encoder, reviews, tmp_path / "lora", *LORA, *more)
    assert record["parameters"]["trained"] < 0.1 * record["parameters"]["all"]
    assert sum(record["losses"][-4:]) < 0.8 * sum(record["losses"][:4])
    folder = tmp_path / "lora"
    assert not (folder / "model.safetensors").exists()
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", attn_implementation=attn)
    assert base.config.max_position_embeddings == 72  # the table that was extended from 64
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    expected = logits_of(adapted, folder)
    assert str(tmp_path) not in (folder / "adapter" / "adapter_config.json").read_text()

    run(encoder, reviews, folder, *LORA, *more, "--resume", "--lora-merge")
    merged = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attn)
    assert type(merged) is BertForSequenceClassification and merged.config.max_position_embeddings == 72
    torch.testing.assert_close(logits_of(merged, folder), expected, atol=1e-4, rtol=1e-4)
    untouched = load_file(folder / "base" / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"]
    assert torch.equal(merged.bert.encoder.layer[0].output.dense.weight, untouched)
    query = load_file(folder / "base" / "model.safetensors")["bert.encoder.layer.0.attention.self.query.weight"]
    assert not torch.equal(merged.bert.encoder.layer[0].attention.self.query.weight, query)


def test_lora_trains_and_saves_what_the_checkpoint_lacks(tmp_path, reviews):
    """The output of adapt_mlm.py has no pooler; with dropout, a new one would not be drawn the same a second time."""
    bare = make_encoder(tmp_path / "bare", BertForMaskedLM)
    config = BertConfig.from_pretrained(bare)
    config.hidden_dropout_prob = 0.1
    config.save_pretrained(bare)
    record = run(bare, reviews, tmp_path / "lora", *LORA, "--attn", "sdpa")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lora" / "base")
    drawn = base.bert.pooler.dense.weight.clone()
    model = PeftModel.from_pretrained(base, tmp_path / "lora" / "adapter").merge_and_unload()
    assert not torch.equal(model.bert.pooler.dense.weight, drawn)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lora")
    rows = [json.loads(line) for line in (tmp_path / "lora" / "test_predictions.jsonl").read_text().splitlines()]
    documents = make_documents(80)
    texts = [documents[int(row["name"])][0] for row in rows]
    inputs = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    with torch.no_grad():
        loss = model.eval()(**inputs, labels=labels).loss.item()
    assert loss == pytest.approx(record["test"]["loss"], rel=1e-3)


def test_lora_where_peft_knows_no_layer(tmp_path, encoder, reviews):
    with pytest.raises(InputError, match="Give --lora-target-modules"):
        run(encoder, reviews, tmp_path / "run", "--lora", "--lora-target-modules", "colour")
    assert not (tmp_path / "run").exists()


# Streams, trackers


def test_streamed_run_goes_on_exactly(tmp_path, monkeypatch, encoder, reviews):
    """Of which the best checkpoint is not the last, so that at the end steps and what was read go back."""
    metrics = Classification.metrics

    def scripted(self, results, rows, encoded):
        found = metrics(self, results, rows, encoded)
        return {**found, "accuracy": found["loss"]}

    monkeypatch.setattr(Classification, "metrics", scripted)
    stream = ("--streaming", "--stream-buffer", 3, "--labels", "neg", "pos", "--validation-file", reviews)
    more = (*stream, "--max-steps", 12, "--save-every", 2, "--attn", "sdpa", "--batch-size", 7, "--evaluate-every", 4)
    expected = run(encoder, reviews, tmp_path / "whole", *more)
    assert expected["best_step"] < 12
    assert "test" not in expected and expected["lengths"]["train"]["documents"] == 84  # 12 steps, of 3 a buffer
    assert 0 < expected["lengths"]["train"]["truncated"] < 84
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 9)
        run(encoder, reviews, tmp_path / "run", *more)
    record = run(encoder, reviews, tmp_path / "run", *more, "--resume")
    assert_same_run(tmp_path / "run", {**record, "test": {}}, tmp_path / "whole", {**expected, "test": {}})
    assert record["lengths"] == expected["lengths"]

    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "w1", "label": "other"}])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_text("an earlier result")
    with pytest.raises(InputError, match="1 of 1 documents have a label that is not among --labels"):
        run(encoder, bad, tmp_path / "bad", *more, "--overwrite")
    assert (tmp_path / "bad" / "model.safetensors").read_text() == "an earlier result"


def test_tensorboard(tmp_path, encoder, reviews):
    record = run(encoder, reviews, tmp_path / "run", "--tracker", "tensorboard", "--epochs", 1)
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "finetuning")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(record["losses"])
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert events.Scalars("validation/accuracy")[0].value == pytest.approx(record["validation"][0]["accuracy"])
    assert events.Scalars("learning_rate")[-1].value < events.Scalars("learning_rate")[1].value


# Refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "no/such/folder"], "--model no/such/folder cannot be used"),
        (["--skein-num-columns", "8"], "needs --attn skein"),
        (["--attn", "skein", "--skein-num-columns", "0"], "num_columns is 0"),
        (["--too-long", "error"], r"\d+ of 64 train documents have more than 64 tokens, the longest \d+"),
        (["--streaming"], "--streaming needs --max-steps"),
        (["--lora-merge"], "--lora-merge needs --lora"),
        (["--lora-rank", "8"], "--lora-rank needs --lora"),
        (["--lora-target-modules", "query"], "--lora-target-modules needs --lora"),
        (["--private"], "--private needs --push-to-hub"),
        (["--label-separator", ","], "--label-separator needs --problem multi-label"),
        (["--labels", "neg", "pos", "--problem", "regression"], "--labels has no meaning"),
        (["--tracker", "clearml"], "--tracker clearml is not installed; installed are .*tensorboard"),
        (["--push-to-hub", "a/b/c"], "--push-to-hub a/b/c is no owner/name"),
        (["--push-to-hub", "a/b"], "for models with skein attention"),
        (["--push-to-hub", "a/b", "--attn", "skein", "--lora"], "add --lora-merge"),
        (["--push-to-hub", "a/b", "--attn", "skein"], "the offline mode is on"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, encoder, reviews, more, message):
    with pytest.raises(InputError, match=message):
        run(encoder, reviews, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_pushing_needs_a_token(tmp_path, monkeypatch, encoder, reviews):
    monkeypatch.setattr(_options.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_options, "get_token", lambda: None)
    with pytest.raises(InputError, match="there is no token"):
        run(encoder, reviews, tmp_path / "run", "--attn", "skein", "--push-to-hub", "a/b")


def test_result_is_pushed(tmp_path, monkeypatch, encoder, reviews):
    pushed = []
    monkeypatch.setattr(finetuning, "check_options", lambda args: None)  # it is tested above, and would refuse
    monkeypatch.setattr(finetuning, "push", lambda folder, repo, private: pushed.append((folder, repo, private)))
    more = ("--attn", "skein", "--epochs", 1, "--push-to-hub", "a/b", "--private")
    record = run(encoder, reviews, tmp_path / "run", *more)
    assert pushed == [(tmp_path / "run", "a/b", True)]

    card = make_card(tmp_path / "run", "a/b", license="mit", base_model="google/bert")
    assert card.data.base_model == "google/bert"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"accuracy": record["test"]["accuracy"], "f1": record["test"]["macro_f1"]}
    assert {result.task_type for result in card.data.eval_results} == {"text-classification"}
    assert {result.dataset_name for result in card.data.eval_results} == {"reviews.jsonl"}
    assert re.search(r"64 documents, \d\d\.\d+ tokens on average", card.text)
    assert "was trained with skein" in card.text
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()

    stream = ("--streaming", "--max-steps", 2, "--labels", "neg", "pos", "--validation-file", reviews)
    count = run(encoder, reviews, tmp_path / "stream", *more, *stream)["lengths"]["train"]["documents"]
    card = make_card(tmp_path / "stream", "a/b", license="mit", base_model="google/bert")
    assert count > 0 and f"| {count} documents, " in card.text

    def fail(*args, **kwargs):
        raise finetuning.HubError("No connection.")

    monkeypatch.setattr(finetuning, "push", fail)
    with pytest.raises(InputError, match=r"is complete, but was not pushed\. No connection"):
        run(encoder, reviews, tmp_path / "again", *more)


@pytest.mark.parametrize(
    ("task", "smaller"),
    [
        (Classification, r"--batch-size 4 --gradient-accumulation-steps 2 \(the same steps, in smaller batches\)"),
        (Embedding, "--batch-size 4"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Tried to allocate 8 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 GiB."),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_names_the_options_that_help(tmp_path, monkeypatch, encoder, task, smaller, error):
    def fail(self, model, batch):
        raise error

    monkeypatch.setattr(task, "forward", fail)
    rows = [{name: f"w{i}" for name in task.columns} for i in range(2)] * 20
    message = (
        rf"Out of memory\. Less of it take: {smaller}, --gradient-checkpointing, --mixed-precision bf16, --lora, "
        rf"a --max-length below 64\. Start anew with --overwrite\. \({re.escape(str(error))}\)"
    )
    with pytest.raises(InputError, match=message):
        finetune(task, options(encoder, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run"))


def test_what_pytorch_says_when_a_cpu_has_too_little_memory():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_are_not_taken_for_want_of_memory(tmp_path, monkeypatch, encoder, reviews):
    def fail(self, model, batch):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Classification, "forward", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(encoder, reviews, tmp_path / "run")


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch, encoder, reviews):
    forward = Classification.forward

    def diverge(self, model, batch):
        output = forward(self, model, batch)
        output.loss = output.loss * torch.inf
        return output

    monkeypatch.setattr(Classification, "forward", diverge)
    with pytest.raises(InputError, match=r"The loss is inf at step 1: lower --learning-rate, .* with --overwrite"):
        run(encoder, reviews, tmp_path / "run")


def test_a_stream_with_a_document_that_is_too_long(tmp_path, encoder, reviews):
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "great", "label": "pos"}])
    stream = ("--streaming", "--max-steps", 2, "--labels", "neg", "pos", "--validation-file", short)
    message = r"\d+ of \d+ training documents from number \d+ on have more than 64 tokens; raise --max-length"
    with pytest.raises(InputError, match=message):
        run(encoder, reviews, tmp_path / "run", *stream, "--too-long", "error")
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_a_message_and_status_1(monkeypatch, tmp_path):
    words = options("m", tmp_path / "missing.csv", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["finetune_classification.py", *words])
    with pytest.raises(SystemExit, match=r"error: There is no file .*missing\.csv"):
        finetuning.run_script(Classification)


def test_more_tokens_than_the_model_takes(tmp_path, monkeypatch, encoder, reviews):
    def refuse(*args, **kwargs):
        raise ValueError("It has no table.")

    monkeypatch.setattr(finetuning, "extend_positions", refuse)
    with pytest.raises(InputError, match=r"the model takes 64 tokens. It has no table"):
        run(encoder, reviews, tmp_path / "run", "--max-length", 65)
