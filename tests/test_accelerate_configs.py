"""scripts/accelerate_configs: Accelerate reads them; and skein attention under the sharding that FSDP2 does."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification, BertConfig

import hf_skein


FOLDER = Path(__file__).parents[1] / "scripts" / "accelerate_configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_they_are_there():
    assert {file.stem for file in FILES} == {"cpu", "ddp", "deepspeed_zero3", "fsdp2", "one_gpu"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = load_config_from_file(str(file))  # raises on a key that it does not know
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "script.py", "--option"])
    args, *_ = _validate_launch_command(arguments)
    assert args.num_processes == config.num_processes == (1 if file.stem == "one_gpu" else 2)
    assert args.mixed_precision == ("no" if file.stem == "cpu" else "bf16")
    assert args.use_cpu == (file.stem == "cpu")
    assert args.multi_gpu == (file.stem in ("cpu", "ddp"))
    assert args.use_fsdp == (file.stem == "fsdp2")
    assert args.use_deepspeed == (file.stem == "deepspeed_zero3")
    if args.use_fsdp:
        assert args.fsdp_version == 2 and args.fsdp_state_dict_type == "FULL_STATE_DICT"
    if args.use_deepspeed:
        assert args.zero_stage == 3 and args.zero3_save_16bit_model


# FSDP2: Accelerate calls `fully_shard` on accelerators only, so here the test does it, on two processes with gloo.


def make_model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=80,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    hf_skein.configure(config, num_columns=8, num_strata=2, block_size=16, min_length=0)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="skein")


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (4, 80), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 60:] = mask[2, 70:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


def two_steps(model, batch) -> dict[str, torch.Tensor]:
    """Losses of two steps of SGD, and the gradients of the first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**batch).loss
    loss.backward()
    result = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return result | {"loss": loss.detach(), "next loss": model(**batch).loss.detach()}


def sharded_steps(rank: int, folder: str) -> None:
    """One of two processes, with its half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = make_model()
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    half = {name: x[2 * rank : 2 * rank + 2] for name, x in make_batch().items()}
    result = {}
    for name, x in two_steps(model, half).items():
        if isinstance(x, dist.tensor.DTensor):
            result[name] = x.full_tensor()
        else:
            dist.all_reduce(x)
            result[name] = x / 2
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.destroy_process_group()


def test_two_sharded_processes_equal_one(tmp_path):
    torch.multiprocessing.start_processes(sharded_steps, (str(tmp_path),), 2, start_method="fork")
    found = torch.load(tmp_path / "result.pt")
    expected = two_steps(make_model(), make_batch())
    assert found.keys() == expected.keys()
    assert expected["next loss"] < expected["loss"]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
