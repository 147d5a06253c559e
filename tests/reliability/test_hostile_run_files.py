"""A run file that means more than it says, or costs more than it holds: refused with its line, in a moment."""

import time
import tracemalloc
from pathlib import Path

import pytest

from accel_distill.cli import main
from accel_distill.config import load_config
from accel_distill.errors import ConfigError

GOOD = "teacher: {model: org/teacher}\ndataset: {name: org/text}\ncache: {path: caches/a}\n"
SECONDS = 3.0  # of processor time
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED: dict[str, tuple[bytes, str]] = {
    "a bomb of aliases": (BOMB.encode(), "line 1: anchors and aliases (a) are not allowed"),
    "a bomb behind a good start": ((GOOD + "training:\n" + BOMB).encode(), "anchors and aliases (a) are not allowed"),
    "a mapping that holds itself": (b"teacher: &t {model: *t}\n", "anchors and aliases (t)"),
    "a merge of a mapping": (b"base: &b {x: 1}\nteacher:\n  <<: *b\n", "anchors and aliases (b)"),
    "a merge key": (b"teacher:\n  <<: {model: x}\n", "<<"),
    "a Python object": (b"teacher: !!python/object:os.system {}\n", "line 1: tags (tag:yaml.org,2002:python/object"),
    "a Python call": (b"teacher: !!python/object/apply:os.system ['touch /tmp/owned']\n", "tags (tag:yaml.org"),
    "a Python name": (b"teacher: {model: !!python/name:os.system }\n", "tags (tag:yaml.org"),
    "a Python module": (b"teacher: {model: !!python/module:os }\n", "tags (tag:yaml.org"),
    "a tag of its own": (b"teacher: !secret {model: x}\n", "tags (!secret)"),
    "a declared tag": (b"%TAG ! tag:example.com,2000:\n---\nteacher: !x {}\n", "tags (tag:example.com,2000:x)"),
    "binary text": (b"teacher: {model: !!binary aGVsbG8=}\n", "tags (tag:yaml.org,2002:binary)"),
    "10 MB of text": (GOOD.encode() + b"# " + b"x" * 10_000_000, "is larger than 100,000 bytes"),
    "10 MB of keys": (b"".join(b"k%d: 1\n" % n for n in range(800_000)), "is larger than 100,000 bytes"),
    "a key twice": ((GOOD + "cache: {path: caches/b}\n").encode(), "line 4: the key 'cache' is there twice"),
    "a key twice below": (b"teacher:\n  model: a\n  model: b\n", "line 3: the key 'model' is there twice"),
    "a key twice in two spellings": (b'teacher: {model: a, "model": b}\n', "the key 'model' is there twice"),
    "nested deep": (b"teacher: " + b"[" * 90_000, "more than 20 levels of nesting"),
    "mappings nested deep": (b"{a: " * 20_000, "more than 20 levels of nesting"),
    "keys that are lists": (b"? [a, b]\n: c\n", "the key (sequence) is not text"),
    "a tag as long as the file": (b"teacher: !" + b"x" * 90_000, "tags (!xxxx"),
    "a key as long as the file": (b"k" * 90_000 + b": 1\n" + b"k" * 150 + b": 1\n", ""),
    "control characters": (b"teacher: \x00\x07\n", "is not YAML"),
    "two documents": ((GOOD + "---\n" + GOOD).encode(), "expected a single document"),
    "no text at all": (bytes(range(128, 256)) * 100, "is not UTF-8"),
    "as many items as fit": (b"a: [" + b"x," * 49_000 + b"]", "a: unknown key"),
    "a web page": (b"<!DOCTYPE html>\n<html><body>Please log in.</body></html>\n", "found '<!DOCTYPE"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_in_one_short_sentence_and_in_a_moment(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = REFUSED[kind]
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    begun = time.process_time()
    assert main(["check", "--config", str(path)]) == 2
    assert time.process_time() - begun < SECONDS
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}") and said.count("\n") == 1 and len(said) < 1000
    assert words in said


def test_the_good_one_is_good(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    assert load_config(path).teacher.model == "org/teacher"


def test_a_bomb_and_a_large_file_cost_no_memory(tmp_path: Path) -> None:
    for name in ("a bomb of aliases", "10 MB of keys", "nested deep"):
        path = tmp_path / "run.yaml"
        path.write_bytes(REFUSED[name][0])
        tracemalloc.start()
        with pytest.raises(ConfigError):
            load_config(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20
