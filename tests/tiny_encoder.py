"""What the tests of the fine-tuning scripts share: a tiny BERT, documents, options."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


POSITIONS = 64
WORDS = [f"w{i}" for i in range(20)]
SIGNS = {"neg": ["awful", "dull"], "pos": ["great", "fresh"]}


def make_encoder(folder: Path, model_class: type = BertModel, **config_fields) -> str:
    """Saves a random BERT of 64 positions and its WordPiece tokenizer, which cuts `great` into `grea` and `##t`."""
    pieces = [word for words in SIGNS.values() for word in words if word != "great"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *pieces, "grea", "##t"]
    wordpiece = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=wordpiece,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,  # with the usual 0.02 so narrow a model starts slowly
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **config_fields,
    )
    model_class(config).save_pretrained(folder)
    return str(folder)


def make_documents(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 8 to 80 words, a third of them the signs of the label; the labels alternate."""
    draw = random.Random(seed)
    documents = []
    for i in range(count):
        label = sorted(SIGNS)[i % 2]
        words = [draw.choice(SIGNS[label] if draw.random() < 0.3 else WORDS) for _ in range(draw.randint(8, 80))]
        documents.append((" ".join(words), label))
    return documents


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(encoder: str, dataset: Path, output: Path, *more: object) -> list[str]:
    """A short run with exact attention."""
    common = ["--model", encoder, "--dataset", dataset, "--output-dir", output]
    return [str(item) for item in (*common, "--attn", "sdpa", "--epochs", 2, "--learning-rate", "1e-2", *more)]
