"""Where rows come from: files, folders of pictures and torch Datasets. `memokern.TrainingSet` is
the way in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from memokern.data import files
from memokern.data.folders import read_folder
from memokern.util.tensor_file import Stream

# TrainingSet.save marks its files with these.
FORMAT = "memokern.TrainingSet"
FORMAT_VERSION = 1
# Starts the names of an index's tensors in such a file. The index has a version of its own, in
# `memokern.index.index`.
INDEX_PREFIX = "index."


def read(rows: Any, key: str | None) -> dict[str, Any]:
    """What a data source holds: at least "rows", a tensor, and of a file or a data set what
    :func:`from_file` or :func:`from_dataset` finds. A source is a tensor, an array, a path of a
    file or folder, a list, or a data set with a length: torch's, or one whose items are mappings,
    as Hugging Face's."""
    if isinstance(rows, (str, os.PathLike)):
        return from_folder(rows, key) if os.path.isdir(rows) else from_file(rows, key)
    named = hasattr(rows, "column_names")
    if key is not None and not named:
        got = type(rows).__name__
        raise ValueError(f"key={key!r} names an array in a file, but rows is a {got}")
    if isinstance(rows, torch.Tensor):
        return {"rows": rows}
    if isinstance(rows, np.ndarray):
        return {"rows": files.as_tensor(rows, "rows")}
    if isinstance(rows, (Dataset, list)) or named:
        tensor, labels = from_dataset(rows, key)
        return {"rows": tensor, "labels": labels}
    hint = ": give the rows alone, and labels=" if isinstance(rows, (tuple, Mapping)) else ""
    raise TypeError(
        "expected rows as a tensor, a numpy array, a path, a list of tensors, or a torch or "
        f"Hugging Face data set, got {type(rows).__name__}{hint}"
    )


def from_file(path: str | os.PathLike[str], key: str | None) -> dict[str, Any]:
    """What a file holds: rows and name, and of labels, log_weights, scale, shift and index those
    that are there. An index comes as its description and its tensors, as they were written, and
    only with the file's own rows."""
    with files.pinned(path) as file:  # one version, also while another is put in its place
        return _from_pinned(file, path, key)


def from_folder(path: str | os.PathLike[str], key: str | None) -> dict[str, Any]:
    """What a folder of pictures holds: rows, name, and labels where it has a folder for each
    class."""
    if key is not None:
        raise ValueError(f"key={key!r} names an array in a file, but {str(path)!r} is a folder")
    rows, labels = read_folder(path)
    name = Path(os.path.abspath(path)).name
    return {"rows": rows, "name": name} | ({} if labels is None else {"labels": labels})


def _from_pinned(
    file: files.Pinned, path: str | os.PathLike[str], key: str | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": files.read_tensor(file, key), "name": Path(path).stem}
    names = files.keys(file)
    metadata = files.read_metadata(file)
    if metadata.get("format") == FORMAT:
        version = metadata.get("version", "")
        if version != str(FORMAT_VERSION):
            raise ValueError(
                f"{str(path)!r} has version {version!r} of the format, "
                f"expected {FORMAT_VERSION}: another memokern wrote it"
            )
        found["name"] = metadata.get("name")
        try:
            found |= {"scale": float(metadata["scale"]), "shift": float(metadata["shift"])}
        except (KeyError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is damaged: no scale and shift ({error})") from None
        if "log_weights" in names:
            found["log_weights"] = files.read_tensor(file, "log_weights")
        if "index" in metadata and key in (None, "rows"):
            parts = [name for name in names if name.startswith(INDEX_PREFIX)]
            tensors = {p.removeprefix(INDEX_PREFIX): files.read_tensor(file, p) for p in parts}
            found["index"] = (metadata["index"], tensors)
    n = len(found["rows"]) if found["rows"].ndim else 0
    if "conditions" in names and key != "conditions":
        conditions = files.read_tensor(file, "conditions")
        if conditions.ndim and len(conditions) == n:
            found["conditions"] = conditions
    if "labels" in names and key != "labels":
        # Nothing is guessed from one-hot labels, strings, or labels of another array: labels= takes
        # what the user makes of those.
        try:
            labels = files.read_tensor(file, "labels")
        except (TypeError, ValueError):
            return found
        if tuple(labels.shape) in ((n,), (n, 1)) and is_integer(labels.dtype):
            found["labels"] = labels.reshape(n)
    return found


def described(data: Any) -> dict[str, str | None]:
    """What a file tells of a training set beside its tensors; the repr of a float reads back as the
    same float."""
    return {"scale": repr(data.scale), "shift": repr(data.shift), "name": data.name}


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | Stream | None],
    metadata: Mapping[str, str | None],
    index: tuple[str, Mapping[str, torch.Tensor]] | None,
) -> None:
    """Write a file that :func:`from_file` reads; None stands for what a training set does not have.

    Errors: as :func:`memokern.data.files.write_safetensors`.
    """
    parts = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    known = {"format": FORMAT, "version": str(FORMAT_VERSION)}
    known |= {name: text for name, text in metadata.items() if text is not None}
    if index is not None:
        known["index"], described = index
        parts |= {INDEX_PREFIX + name: tensor for name, tensor in described.items()}
    files.write_safetensors(path, parts, known)


def from_dataset(
    dataset: Any, column: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All items of a map-style data set or list as one tensor, and their labels [N] if every item
    has one. Items are tensors, arrays or pictures, alone, with a label, or as a column of a
    mapping: the one named, or the only one.

    Raises: TypeError for items that are not tensors, ValueError for items of different shapes or
    types, and for none.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"expected a map-style Dataset with a length, got {type(dataset).__name__}: "
            "collect its items into a tensor first"
        )
    n = len(dataset)
    rows: torch.Tensor | None = None
    labels: list[int] = []
    # The bar appears only when reading takes more than two seconds, and only on a terminal.
    for i in tqdm(range(n), desc="reading the data set", delay=2, leave=False, disable=None):
        item = dataset[i]
        label: Sequence[Any] = ()
        if isinstance(item, Mapping):
            value, label = _of_columns(item, column)
        elif isinstance(item, (tuple, list)) and len(item):
            value, label = item[0], item[1:2]
        else:
            value = item
        if hasattr(value, "__array_interface__") and not isinstance(value, np.ndarray):
            value = np.array(value)  # a picture
        if isinstance(value, np.ndarray):
            value = files.as_tensor(value, f"item {i} of the data set")
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"expected item {i} of the data set to be a tensor or (tensor, label), "
                f"got {type(value).__name__}: give it a transform to a tensor"
            )
        if rows is None:
            rows = torch.empty(n, *value.shape, dtype=value.dtype, device=value.device)
        if value.shape != rows.shape[1:] or value.dtype != rows.dtype:
            raise ValueError(
                f"expected all items to be alike: item 0 is {list(rows.shape[1:])} {rows.dtype}, "
                f"item {i} is {list(value.shape)} {value.dtype}"
            )
        rows[i] = value
        labels += [int(x) for x in label if _is_label(x)]
    if rows is None:
        raise ValueError("the data set has no items")
    return rows, torch.tensor(labels, device="cpu") if len(labels) == n else None


def _of_columns(item: Mapping[str, Any], column: str | None) -> tuple[Any, Sequence[Any]]:
    """The row and the label, if there is one, of an item that is a mapping. ValueError unless one
    column alone can be the row, or is named."""
    if column is None:
        kinds = (torch.Tensor, np.ndarray, list)
        arrays = [
            name
            for name, value in item.items()
            if (isinstance(value, kinds) or hasattr(value, "__array_interface__"))
            and not isinstance(value, np.generic)
            and np.ndim(value) > 0
        ]
        if len(arrays) != 1:
            raise ValueError(
                f"the items of the data set have the columns {list(item)}, of which {arrays} hold "
                "arrays: say which with key="
            )
        column = arrays[0]
    elif column not in item:
        raise ValueError(f"the data set has no column {column!r}; it has {list(item)}")
    value = item[column]
    if isinstance(value, list):
        value = np.asarray(value, dtype=np.float32)
    return value, [item[name] for name in ("label", "labels") if name in item and name != column][
        :1
    ]


def _is_label(value: Any) -> bool:
    """Whether this is one integer."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and is_integer(value.dtype)
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_integer(dtype: torch.dtype) -> bool:
    """Whether it is a type of integers; bool is none."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
