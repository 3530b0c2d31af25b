"""MiniLM to 4096 tokens by the command line: the example of docs/conversion.md.

    python scripts/convert_minilm.py

Writes benchmarks/results/conversion_minilm.json and .png, and puts what the commands print into docs/conversion.md.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _benchmark import find_minilm
from _record import provenance, write_json

from hf_skein.convert import verify


ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "conversion_minilm.json"
PAGE = ROOT / "docs" / "conversion.md"
EXAMPLE = re.compile(r"(?<=<!-- example -->\n).*?(?=<!-- end of example -->)", re.DOTALL)
COMMANDS = (
    "hf-skein convert all-MiniLM-L6-v2 minilm-skein-4096 --max-length 4096",
    "hf-skein verify all-MiniLM-L6-v2 minilm-skein-4096 --repeats 5",
)


def run(command: str, folder: Path) -> str:
    """What a command prints."""
    name, *arguments = shlex.split(command)
    program = Path(sys.executable).parent / name
    # On one thread, the ratio of two times suffers least from whatever else the machine does.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [program, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def main() -> None:
    """Convert, verify, and keep what was found."""
    made_by = provenance("transformers", "hf-skein")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(find_minilm(), Path(folder) / "all-MiniLM-L6-v2")
        example = "".join(f"$ {command}\n{run(command, Path(folder))}" for command in COMMANDS)
        made = Path(folder) / "minilm-skein-4096"
        found = verify.load(made)
        shutil.copy(made / verify.PLOT, RECORD.with_suffix(".png"))
    record = found.to_dict()
    for name in ("versions", "hardware"):
        record[name] = {**made_by[name], **record[name]}
    write_json(RECORD, {"commit": made_by["commit"], **record})
    PAGE.write_text(EXAMPLE.sub(lambda _: f"```\n{example}```\n", PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(example)


if __name__ == "__main__":
    main()
