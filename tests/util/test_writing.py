"""Files are written whole or not at all; JSON of arrays and tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from memokern.util import writing


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_replaces_only_on_success(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), writing.atomic(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    with writing.atomic(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent
        assert temporary.suffix == ".txt"
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert leftovers(tmp_path) == ["a.txt"]


def test_atomic_follows_links_and_respects_the_umask(tmp_path):
    real = tmp_path / "real.txt"
    link = tmp_path / "link.txt"
    link.symlink_to(real)
    previous = os.umask(0o027)
    try:
        writing.write_bytes(link, b"x")
    finally:
        os.umask(previous)
    assert link.is_symlink()
    assert real.read_bytes() == b"x"
    assert real.stat().st_mode & 0o777 == 0o640


def test_atomic_refuses_folders_devices_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="exists and is not a file"):
        writing.write_bytes(tmp_path, b"")
    with pytest.raises(ValueError, match="exists and is not a file"):
        writing.write_bytes(os.devnull, b"")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        writing.write_bytes(tmp_path / "none" / "a", b"")
    assert leftovers(tmp_path) == []


def test_write_json(tmp_path):
    value = {
        "fraction": np.float32(0.5),
        "nan": float("nan"),
        "inside": [np.array([1.0, np.inf]), (True, None)],
        "tensor": torch.tensor([[1, 2]]),
        "path": Path("a"),
        3: "three",
    }
    writing.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "fraction": 0.5,
        "nan": None,
        "inside": [[1.0, None], [True, None]],
        "tensor": [[1, 2]],
        "path": "a",
        "3": "three",
    }
    with pytest.raises(TypeError):
        writing.write_json(tmp_path / "b.json", object())
    assert leftovers(tmp_path) == ["a.json"]
