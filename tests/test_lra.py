"""scripts/lra.py: training, resuming, and what it refuses."""

import gc
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import _training
import lra
from _data import InputError
from _lra_data import TASKS, collate, read_prepared
from _lra_model import METHODS, Classifier
from _lra_training import Classification, largest_that_fits


REVIEWS = {"neg": "a dull and awful film ", "pos": "a fresh and moving film "}


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """Every run collects garbage, for which it need not look at all that has been imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Prepared reviews, long enough to be sketched; 32 to train on, 4 for validation, 4 for the test."""
    folder = tmp_path_factory.mktemp("data")
    with zipfile.ZipFile(folder / "reviews.zip", "w") as archive:
        for label, sentence in REVIEWS.items():
            for i in range(20):
                archive.writestr(f"reviews/{label}/{i}.txt", sentence * (13 + i % 3))
    lra.main(["prepare", "text", "--source", str(folder / "reviews.zip"), "--output", str(folder / "text")])
    return folder / "text"


def train(data: Path, output: Path, *options: str) -> list[dict]:
    budget = ["--batch-size", "4", "--steps", "12", "--eval-every", "12", "--warmup", "2", "--learning-rate", "3e-3"]
    return lra.main(["train", "--data", str(data), "--output-dir", str(output), *budget, *options])


def test_every_method_trains(data, tmp_path):
    records = train(data, tmp_path, "--seeds", "3", "--steps", "2", "--eval-every", "2")
    assert [record["settings"]["method"] for record in records] == list(METHODS)
    for record in records:
        assert len(record["losses"]) == 2 and all(0 < loss < 2 for loss in record["losses"])
        assert 0 <= record["test"]["accuracy"] <= 1
        assert record["training_seconds"] > 0 and record["peak_memory_mib"] >= 0
        assert record["largest_batch"] is None
        folder = tmp_path / f"text-{record['settings']['method']}-3"
        assert json.loads((folder / "record.json").read_text()) == record
        assert str(tmp_path) not in (folder / "record.json").read_text()


def test_it_learns(data, tmp_path):
    (record,) = train(data, tmp_path, "--methods", "adaptive", "--seeds", "0", "--steps", "20")
    assert record["test"]["accuracy"] == 1


@pytest.mark.parametrize("method", ["standard", "skeinformer"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(data, tmp_path, monkeypatch, method):
    options = ("--methods", method, "--seeds", "1", "--micro-batch", "2", "--steps", "9", "--eval-every", "4")
    (whole,) = train(data, tmp_path / "whole", *options)
    assert [row["step"] for row in whole["evaluations"]] == [4, 8, 9]

    save, calls = _training.save_checkpoint, []

    def killed(accelerator, folder, step, best):
        calls.append(step)
        if calls == [4, 8]:
            raise KeyboardInterrupt
        save(accelerator, folder, step, best)

    monkeypatch.setattr(_training, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "cut", *options)
    (resumed,) = train(data, tmp_path / "cut", *options)
    assert calls == [4, 8, 8, 9]
    for name in ("losses", "evaluations", "best_step", "test", "settings"):
        assert resumed[name] == whole[name]

    assert train(data, tmp_path / "cut", *options) == [resumed]  # complete: nothing is run again
    assert calls == [4, 8, 8, 9]
    with pytest.raises(InputError, match=r"another learning_rate \(was 0.003, now 0.1\)"):
        train(data, tmp_path / "cut", *options, "--learning-rate", "0.1")


def test_it_stops_when_the_loss_no_longer_falls_and_tests_the_best_weights(data, tmp_path, monkeypatch):
    losses, weights = iter([0.6, 0.5, 0.7, 0.8, 0.4]), []
    predict, metrics = Classification.forward, Classification.metrics

    def watched(self, model, batch):
        if not model.training:
            weights.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return predict(self, model, batch)

    def scripted(self, results, dataset):
        return metrics(self, results, dataset) | {"loss": next(losses)}

    monkeypatch.setattr(Classification, "forward", watched)
    monkeypatch.setattr(Classification, "metrics", scripted)
    options = ("--methods", "vmean", "--seeds", "0", "--eval-every", "2", "--patience", "2")
    (record,) = train(data, tmp_path, *options)
    assert len(record["losses"]) == 8 and record["best_step"] == 4
    *evaluated, tested = weights  # at steps 2, 4, 6, 8; with 4 examples each is one batch
    assert len(evaluated) == 4
    assert [all(torch.equal(tested[k], then[k]) for k in tested) for then in evaluated] == [False, True, False, False]


def test_any_micro_batch_makes_the_same_steps(data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, *args, **kwargs: x)
    options = ("--methods", "skeinformer", "--seeds", "0", "--steps", "2")
    (whole,), (parts,) = (train(data, tmp_path / size, *options, "--micro-batch", size) for size in "43")
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert parts["test"] == pytest.approx(whole["test"], rel=1e-4)


def test_a_folder_with_other_things_is_refused(data, tmp_path):
    (tmp_path / "text-vmean-0").mkdir()
    (tmp_path / "text-vmean-0" / "record.json").write_text("{}")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train(data, tmp_path, "--methods", "vmean", "--seeds", "0")


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"informer-unmasked"}))  # that one looks at padding
def test_padding_and_neighbours_change_nothing(method):
    torch.manual_seed(0)
    model = Classifier(TASKS["listops"], METHODS[method]).double().eval()
    short, long = torch.randint(1, 16, (300,)), torch.randint(1, 16, (400,))
    batch = collate([{"input_ids": short.numpy()}, {"input_ids": long.numpy()}])
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(input_ids=ids[None]).logits for ids in (short, long)])
    torch.testing.assert_close(together, alone)


def test_the_mean_is_over_valid_tokens():
    torch.manual_seed(0)
    model = Classifier(TASKS["listops"], METHODS["standard"]).eval()
    ids = torch.randint(1, 16, (1, 20))
    with torch.no_grad():
        hidden = model.encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model.encode(torch.nn.functional.pad(ids, (0, 7))), hidden.mean(1))


@pytest.mark.parametrize("method", ["skeinformer", "informer", "informer-unmasked"])
def test_other_random_numbers_in_every_step_and_the_same_again(method):
    torch.manual_seed(0)
    model = Classifier(TASKS["listops"], METHODS[method]).eval()
    ids = torch.randint(1, 16, (1, 600))
    outputs = []
    with torch.no_grad():
        for seed in (1, 2, 1):
            model.reseed(seed)
            outputs.append(model(ids).logits)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("method", ["linformer", "performer", "bigbird"])
def test_the_random_numbers_of_some_baselines_are_those_of_the_run(method):
    ids = torch.randint(1, 16, (1, 700))
    outputs = []
    with torch.no_grad():
        for seed in (0, 1):
            torch.manual_seed(0)
            model = Classifier(TASKS["listops"], METHODS[method], seed).eval()
            outputs.append(model(ids).logits)
            model.reseed(2)
            assert torch.equal(model(ids).logits, outputs[-1])
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 100, 127, 128, 129, 4095, 4096, 5000])
def test_the_largest_batch_is_found(most):
    asked = []

    def fits(count):
        asked.append(count)
        return count <= most

    assert largest_that_fits(fits) == min(most, 4096)
    assert max(asked) <= 4096 and len(asked) <= 26


def test_data_that_is_there_is_kept(data):
    with pytest.raises(InputError, match="exists"):
        lra.main(["prepare", "text", "--source", "nowhere.zip", "--output", str(data)])
    with pytest.raises(InputError, match=r"nowhere.zip"):
        lra.main(["prepare", "text", "--source", "nowhere.zip", "--output", str(data.parent / "other")])
    assert not (data.parent / "other").exists()
    with pytest.raises(InputError, match="holds no prepared data"):
        read_prepared(data.parent)


def test_reviews_are_their_bytes(data):
    task, parts, prepared = read_prepared(data)
    assert task is TASKS["text"]
    sizes = {part: len(parts[part]) for part in parts}
    assert sizes == {"train": 32, "validation": 4, "test": 4}
    for part in parts:
        assert prepared["parts"][part]["label_shares"] == [0.5, 0.5]
        for row in parts[part]:
            sentence = REVIEWS["pos" if row["labels"] else "neg"]
            text = bytes(int(i) - 1 for i in row["input_ids"]).decode()
            assert text in [sentence * k for k in (13, 14, 15)]
    Accelerator().free_memory()
