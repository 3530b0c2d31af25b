"""Every fine-tuning script under `accelerate launch` with two processes: the losses and metrics of one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import _finetuning
import pytest
from _training import own_batches
from tiny_encoder import WORDS, make_documents, make_encoder, options, write_jsonl
from transformers import BertForMaskedLM


SCRIPTS = Path(_finetuning.__file__).parent
TASKS = {
    "finetune_classification": "Classification",
    "finetune_qa": "QuestionAnswering",
    "finetune_tokens": "TokenClassification",
    "finetune_embedding": "Embedding",
    "adapt_mlm": "MaskedLanguageModeling",
}
COMMON = ("--attn", "skein", "--skein-min-length", 0, "--skein-num-columns", 8, "--learning-rate", "1e-3")
MORE = ("--epochs", 1, "--max-train-documents", 17)  # of the last step one process is left without a document
LAUNCHED = """
import importlib, json, sys
from _finetuning import Accelerator, finetune

end, Accelerator.end_training = Accelerator.end_training, lambda self: None  # it ends the processes' group
for script, (task, words) in json.load(open(sys.argv[1])).items():
    finetune(getattr(importlib.import_module(script), task), words)
end(Accelerator())
"""


def make_rows(script: str) -> list[dict]:
    """40 rows for a script; of some questions all answers are cut off, so that processes have unequal weight."""
    draw = random.Random(0)
    rows = []
    for i in range(40):
        words = draw.choices(WORDS, k=draw.randint(8, 70))
        at = draw.randrange(len(words))
        answers = {"text": [words[at]], "answer_start": [len(" ".join([*words[:at], ""])) if at else 0]}
        tags = ["B-A" if word in WORDS[:5] else "O" for word in words]
        document = " ".join(words)
        rows.append(
            {
                "finetune_qa": {"question": "fresh", "context": document, "answers": answers},
                "finetune_tokens": {"tokens": words, "tags": tags},
                "finetune_embedding": {"query": f"{words[0]} {words[1]}", "document": document},
                "adapt_mlm": {"text": document},
            }.get(script, dict(zip(("text", "label"), make_documents(i + 1)[i], strict=True)))
        )
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, tuple[str, Path]]:
    """The encoder and the data of each script."""
    folder = tmp_path_factory.mktemp("inputs")
    encoder = make_encoder(folder / "encoder", BertForMaskedLM)
    return {script: (encoder, write_jsonl(folder / f"{script}.jsonl", make_rows(script))) for script in TASKS}


@pytest.fixture(scope="module")
def two(tmp_path_factory, inputs) -> dict[str, dict]:
    """The record of each script, all run in one launch with batches of 4."""
    folder = tmp_path_factory.mktemp("two")
    words = {
        script: (task, options(*inputs[script], folder / script, *COMMON, *MORE, "--batch-size", 4))
        for script, task in TASKS.items()
    }
    (folder / "runs.json").write_text(json.dumps(words))
    (folder / "launched.py").write_text(LAUNCHED)
    config = SCRIPTS / "accelerate_configs" / "cpu.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", config]
    launch += ["--main_process_port", random.randrange(20_000, 40_000), folder / "launched.py", folder / "runs.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
    subprocess.run([sys.executable, *map(str, launch)], env=environment, check=True)
    return {script: json.loads((folder / script / "record.json").read_text()) for script in TASKS}


@pytest.mark.parametrize("script", TASKS)
def test_two_processes_are_one_with_their_batches_together(tmp_path, inputs, two, script):
    task = getattr(__import__(script), TASKS[script])
    assert own_batches([{}] * (17 % 8), 4, 2, 1) == [([{}], False)]
    words = options(*inputs[script], tmp_path / "one", *COMMON, *MORE, "--batch-size", 8)
    one, found = _finetuning.finetune(task, words), two[script]
    assert (found["settings"]["processes"], one["settings"]["processes"]) == (2, 1) and len(one["losses"]) >= 3
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for part in ("validation", "test"):
        ours, theirs = one[part], found[part]
        for expected, measured in zip(*((x if isinstance(x, list) else [x]) for x in (ours, theirs)), strict=True):
            assert measured.pop("seconds", 0) >= 0 and expected.pop("seconds", 0) >= 0
            assert measured == pytest.approx(expected, rel=1e-3)
