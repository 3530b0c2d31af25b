"""scripts/finetune_embedding.py: its loss, its metrics, over processes, and that it learns."""

import random

import _data
import _finetuning
import finetune_embedding as script
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from tiny_encoder import WORDS, make_encoder, options, read_jsonl, write_jsonl
from transformers import AutoModel, AutoTokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """96 pairs: a query of two words, and a document full of them."""
    draw = random.Random(0)
    rows = []
    for first in range(12):
        for second in range(8):
            words = [WORDS[first], WORDS[12 + second]]
            document = draw.choices(words, k=draw.randint(20, 60)) + draw.choices(WORDS, k=5)
            draw.shuffle(document)
            rows.append({"question": " ".join(words), "article": " ".join(document)})
    draw.shuffle(rows)
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def arguments(encoder, pairs, output, *more):
    columns = ("--query-column", "question", "--document-column", "article", "--epochs", 6, "--batch-size", 12)
    return options(encoder, pairs, output, *columns, "--learning-rate", "3e-3", *more)


def test_loss_is_that_of_the_formula():
    q, d = (torch.nn.functional.normalize(torch.randn(5, 7, dtype=torch.float64), dim=-1) for _ in range(2))
    numbers = torch.arange(5)
    found = script.contrastive_loss(q, numbers, d, numbers, temperature=0.1)
    expected = [
        -torch.log(torch.exp(q[i] @ d[i] / 0.1) / sum(torch.exp(q[i] @ d[j] / 0.1) for j in range(5))) for i in range(5)
    ]
    torch.testing.assert_close(found, torch.stack(expected).mean().float(), rtol=1e-5, atol=1e-6)


def test_a_document_that_occurs_twice_is_no_wrong_answer_to_itself():
    q, d = torch.randn(4, 7), torch.randn(3, 7)
    numbers = torch.tensor([5, 2, 9])
    once = script.contrastive_loss(q, torch.tensor([5, 2, 9, 2]), d, numbers, 1.0)
    doubled = torch.tensor([0, 1, 1, 2, 0])
    twice = script.contrastive_loss(q, torch.tensor([5, 2, 9, 2]), d[doubled], numbers[doubled], 1.0)
    torch.testing.assert_close(twice, once)


def test_ranks_and_metrics():
    scores = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.2, 0.1, 0.5], [0.5, 0.1, 0.5]])
    results = [(scores[i], np.eye(3)[j], j) for i, j in enumerate((0, 1, 2, 0))]
    assert script.find_ranks(results) == [1, 3, 1, 2]  # of equal scores the worse counts
    found = script.Retrieval().compute(predictions=[1, 3, 11, 2], references=[1] * 4)
    assert found["mrr_at_10"] == pytest.approx((1 + 1 / 3 + 0 + 1 / 2) / 4)
    assert (found["recall_at_1"], found["recall_at_5"], found["recall_at_10"]) == (0.25, 0.75, 0.75)


def process_gradients(rank: int, folder: str) -> None:
    """Two of five pairs on one process, three on the other: gradients of the mean loss, as DDP would average them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    PartialState._shared_state.update(_cpu=True, backend="gloo", device=torch.device("cpu"), debug=False)
    PartialState._shared_state.update(num_processes=2, process_index=rank, local_process_index=rank)
    q, d, numbers = torch.load(f"{folder}/inputs.pt")
    q, d, numbers = (x[rank::2] for x in (q, d, numbers))
    q, d = q.requires_grad_(), d.requires_grad_()
    loss = script.contrastive_loss(q, numbers, *script.gather(d, numbers, 3), 0.5)
    (loss * len(q) / 5).backward()
    torch.save((q.grad, d.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_their_documents(tmp_path):
    q, d, numbers = torch.randn(5, 7), torch.randn(5, 7), torch.tensor([3, 1, 4, 1, 5])
    d[3] = d[1]
    torch.save((q, d, numbers), tmp_path / "inputs.pt")
    torch.multiprocessing.start_processes(process_gradients, (str(tmp_path),), 2, start_method="fork")
    q, d = q.requires_grad_(), d.requires_grad_()
    script.contrastive_loss(q, numbers, d, numbers, 0.5).backward()
    found = [torch.empty(5, 7), torch.empty(5, 7)]
    for rank in range(2):
        for whole, part in zip(found, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            whole[rank::2] = part
    for gradient in (found[1], d.grad):  # which of two equal documents counts differs
        gradient[1] += gradient[3]
        gradient[3] = 0
    torch.testing.assert_close(found, [q.grad, d.grad])


@pytest.mark.parametrize("attn", ["sdpa", "skein"])
def test_it_learns_and_the_encoder_reloads(tmp_path, encoder, pairs, attn):
    more = ["--attn", attn, "--max-length", "72"]
    if attn == "skein":
        more += ["--skein-min-length", "0", "--skein-num-columns", "8", "--skein-block-size", "16"]
    output = tmp_path / "run"
    record = _finetuning.finetune(script.Embedding, arguments(encoder, pairs, output, *more))
    assert sum(record["losses"][-6:]) < 0.7 * sum(record["losses"][:6])
    assert record["test"]["mrr_at_10"] > 0.6 and record["test"]["recall_at_10"] >= record["test"]["recall_at_1"]
    assert record["parameters"]["all"] - record["parameters"]["trained"] > 0  # the pooler

    model = AutoModel.from_pretrained(output, attn_implementation=attn).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    table = read_jsonl(output / "test_predictions.jsonl")
    rows = [read_jsonl(pairs)[int(row["name"])] for row in table]
    with torch.no_grad():
        embedded = {
            column: torch.cat(
                [script.embed(model, tokenizer(row[column], return_tensors="pt", truncation=True)) for row in rows]
            )
            for column in ("question", "article")
        }
    scores = embedded["question"] @ embedded["article"].T
    ranks = [int((scores[i] > scores[i, i] + 1e-5).sum()) + 1 for i in range(len(rows))]
    assert [row["rank"] for row in table] == ranks


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "article": " "}], "have no document"),
        ([{"question": None, "article": "a"}, {"question": "b", "article": "a"}], "1 of 2 documents have no query"),
        ([{"question": "a", "text": "b"}], "no column article"),
    ],
)
def test_bad_pairs(tmp_path, encoder, rows, message):
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(_data.InputError, match=message):
        _finetuning.finetune(script.Embedding, arguments(encoder, path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_sentence_transformers_loads_it(tmp_path, encoder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    AutoModel.from_pretrained(encoder).save_pretrained(tmp_path)
    transformer = Transformer(str(tmp_path), model_args={"attn_implementation": "skein"})
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    found = sentence_transformers.SentenceTransformer(modules=[transformer, pooling]).encode(
        ["w1 w2 w3"], normalize_embeddings=True
    )
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = script.embed(model, tokenizer("w1 w2 w3", return_tensors="pt"))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
