"""Transformers' own `Trainer`, unchanged, with `attn_implementation="skein"`."""

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments, set_seed

import hf_skein


LENGTH = 72
SKETCH = {"num_columns": 8, "num_strata": 2, "block_size": 16, "min_length": 0}
CASES = {
    "plain": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True, "use_cpu": True},
    # The inductor would need a C++ compiler. Each length, and each number of documents, would be compiled for itself.
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    | {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


def make_documents(count: int, padded: bool = True) -> list[dict]:
    """Random tokens; the label tells whether token 5 or token 6 is strewn among them."""
    documents = []
    for i in range(count):
        ids = torch.randint(7, 40, (LENGTH,))
        ids[torch.rand(LENGTH) < 0.3] = 5 + i % 2
        documents.append({"input_ids": ids, "labels": i % 2})
        if padded:
            mask = torch.ones(LENGTH, dtype=torch.long)
            mask[LENGTH - torch.randint(20, ()) :] = 0
            documents[-1]["attention_mask"] = mask
    return documents


def make_model(layers: int = 2):
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
    )
    hf_skein.configure(config, **SKETCH)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="skein")


def make_trainer(folder, model, documents, **arguments) -> Trainer:
    common = {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_steps": 24, "logging_steps": 1}
    common |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0}
    return Trainer(model, TrainingArguments(str(folder), **(common | arguments)), train_dataset=documents)


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_trains_saves_and_loads(tmp_path, arguments):
    torch.compiler.reset()
    is_compiled = "torch_compile" in arguments  # which takes its time
    documents = make_documents(32, padded=not is_compiled)
    trainer = make_trainer(tmp_path, make_model(1 if is_compiled else 2), documents, **arguments)
    trainer.train()
    assert sum(losses(trainer)[-4:]) < 0.5 * sum(losses(trainer)[:4])
    trainer.model.zero_grad()
    batch = trainer.data_collator([documents[0]])
    trainer.model(**{name: values.to(trainer.model.device) for name, values in batch.items()}).loss.backward()
    # DistributedDataParallel does not take parameters that get no gradient.
    assert [name for name, parameter in trainer.model.named_parameters() if parameter.grad is None] == []

    trainer.save_model(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", attn_implementation="skein")
    assert hf_skein.SkeinConfig.from_dict(model.config.skein).num_columns == SKETCH["num_columns"]
    trained = {name.removeprefix("_orig_mod."): weight for name, weight in trainer.model.state_dict().items()}
    saved = model.state_dict()
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)


def test_checkpointing_changes_no_loss(tmp_path):
    curves = []
    for is_checkpointed in (False, True):
        set_seed(0)
        trainer = make_trainer(
            tmp_path, make_model(), make_documents(16), max_steps=6, gradient_checkpointing=is_checkpointed
        )
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == curves[1]


def test_resumes_from_its_checkpoint(tmp_path):
    def run(folder, **more):
        set_seed(0)
        return make_trainer(
            folder, make_model(), make_documents(16), max_steps=8, save_strategy="steps", save_steps=4, **more
        )

    whole = run(tmp_path)
    whole.train()
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(whole)


def test_lora_trains_the_adapters_alone_and_merges(tmp_path):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = peft.get_peft_model(base, settings)
    trainer = make_trainer(tmp_path, model, make_documents(32), learning_rate=1e-2, max_steps=32)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert sum(losses(trainer)[-4:]) < 0.5 * sum(losses(trainer)[:4])
    assert before and all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)

    trainer.save_model(tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", attn_implementation="skein")
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().eval()
    row = make_documents(1)[0]
    inputs = {name: row[name][None] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)
