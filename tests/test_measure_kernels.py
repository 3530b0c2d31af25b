"""scripts/measure_kernels.py: what can be tested without a GPU."""

import json

import kernel_costs
import measure_kernels
import pytest
import torch

from hf_skein import SkeinConfig, skein_attention


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_launches_are_those_of_the_model(method):
    config = SkeinConfig(
        method=method, min_length=0, num_columns=16, num_strata=8, block_size=16, max_blocks=4, backend="triton"
    )
    tensors = [torch.randn(1, 64, 1, 16, device=DEVICE).transpose(1, 2) for _ in range(3)]
    marks = iter(range(1000))
    with measure_kernels.recorded(lambda: next(marks)) as launches:
        skein_attention(*tensors, config=config)
    assert [mark for _, *both in launches for mark in both] == list(range(2 * len(launches)))
    found = list(dict.fromkeys(measure_kernels.stages([name for name, *_ in launches])))
    modelled = [stage.name for stage in kernel_costs.METHODS[method](4096, 64, SkeinConfig())]
    assert set(found) == {"layout", *modelled}
    assert found[0] == "layout" and found[-1] == "attention"


def test_a_table_has_shares():
    rows = [
        {"stage": measure_kernels.WHOLE, "seconds": 3e-6},
        {"stage": "columns", "seconds": 1e-6, "part": "choice", "floor_seconds": 5e-7},
        {"stage": "residual of the blocks", "seconds": 2e-6, "part": "residual", "floor_seconds": None},
        {"stage": "attention", "seconds": 1e-6, "part": "attention", "floor_seconds": 1e-6},
    ]
    text = measure_kernels.table([{"method": "adaptive", "p": 64, "n": 4096, "heads": 96, **row} for row in rows])
    assert "| columns | 1 | 0 | 25% |" in text and "| share of choosing |  |  | 25% |" in text
    assert "| with the residual |  |  | 75% |" in text and "| sum of the stages | 4 |" in text
    with pytest.raises(KeyError, match=r"new\.kernel"):
        measure_kernels.stages(["layout.layout", "new.kernel"])


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        measure_kernels.main(["--output", str(tmp_path / "x")])
    assert "needs a CUDA or ROCm GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_stage_takes_time(tmp_path):
    record = measure_kernels.main(["--output", str(tmp_path / "x"), "--lengths", "4096", "--repeats", "3"])
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == record["rows"]
    assert all(row["seconds"] > 0 for row in record["rows"])
