"""What the README says is so: its run file, its table, its files (its commands: test_docs.py)."""

import re
from pathlib import Path

from accel_distill.config import load_config
from accel_distill.sizes import table

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line]


def test_the_run_file_is_valid_with_every_override_that_the_readme_shows(tmp_path):
    (block,) = [block for kind, block in BLOCKS if kind == "yaml"]
    path = tmp_path / "run.yaml"
    path.write_text(block)
    config = load_config(path)
    assert config.student is not None and config.dataset.streaming and config.dataset.max_samples == 100_000
    shown = [word for line in COMMANDS if "run.yaml" in line for word in line.split("#")[0].split() if "=" in word]
    assert shown == ["dataset.max_samples=2000", "training.num_train_epochs=3"]
    other = ["dataset.name=allenai/c4 dataset.config_name=en"]
    other += ["dataset.name=json dataset.config_name=null dataset.data_files=data/*.jsonl dataset.text_column=content"]
    for overrides in [shown, *(words.split() for words in other)]:
        load_config(path, overrides)
        assert all(word.strip("'") in TEXT.replace("\n", " ") for word in overrides)


def test_the_table_of_sizes_is_what_its_command_prints():
    command = re.search(r"accel-distill sizes --bytes-per-position (\S+) --positions-per-second (\d+)`", TEXT)
    assert command is not None
    assert table(float(command[1]), float(command[2])) in TEXT


def test_every_file_that_the_readme_names_is_there():
    named = set(re.findall(r"(?:\./)?((?:launch|configs|bench|docs)/[\w./-]*\w)", TEXT))
    assert {"launch/demo.sh", "launch/test.sh", "configs/accelerate/zero2.yaml", "docs/decisions.md"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
