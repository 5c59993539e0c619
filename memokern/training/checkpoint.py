"""The files of a training run: groups of tensors, and plain values beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memokern.data import files

FORMAT = "memokern.training"


def write(
    path: str | os.PathLike[str], parts: Mapping[str, Mapping[str, Tensor]], numbers: Any
) -> None:
    """Write tensors by group and name, and values that JSON has, whole or not at all.

    Python's floats come back as the same floats, NaN and infinities too.
    """
    tensors = {f"{part}/{name}": v for part, group in parts.items() for name, v in group.items()}
    # safetensors refuses tensors that share memory.
    own = {name: value.detach().clone() for name, value in tensors.items()}
    files.write_safetensors(path, own, {"format": FORMAT, "numbers": json.dumps(numbers)})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """What `write` wrote, in memory. ValueError for other files."""
    metadata = files.read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is no checkpoint of a training run")
    parts: dict[str, dict[str, Tensor]] = {}
    for key in files.keys(path):
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = files.read_tensor(path, key).clone()
    return parts, json.loads(metadata["numbers"])


def flat(state: Mapping[int, Mapping[str, Any]]) -> dict[str, Tensor]:
    """An optimizer's state {parameter: {name: tensor or number}} under names "parameter/name".

    Raises: TypeError for an optimizer that keeps anything else.
    """
    found = {}
    for index, values in state.items():
        for name, value in values.items():
            if value is None:
                continue
            if not isinstance(value, Tensor | int | float):
                raise TypeError(f"cannot store the optimizer's {name!r}: {type(value).__name__}")
            found[f"{index}/{name}"] = torch.as_tensor(value)
    return found


def nested(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The other way."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        found.setdefault(int(index), {})[name] = value
    return found
