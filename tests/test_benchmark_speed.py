import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark_speed


def test_a_short_benchmark_leaves_a_record_and_a_picture(tmp_path):
    (tmp_path / "text.txt").write_text("The river was high, and the old bridge had been closed since spring. " * 50)
    arguments = ["--text", str(tmp_path / "text.txt"), "--lengths", "520", "600", "--repeats", "1"]
    benchmark_speed.main([*arguments, "--output", str(tmp_path / "speed")])
    record = json.loads((tmp_path / "speed.json").read_text())
    assert [row["n"] for row in record["rows"]] == [520] * 4 + [600] * 4
    for row in record["rows"]:
        assert row["forward_backward_seconds"] > row["forward_seconds"] > 0
        assert row["error"] == 0 if row["method"].startswith("exact") else 0 < row["error"] < 1
    assert str(tmp_path) not in (tmp_path / "speed.json").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 10_000
