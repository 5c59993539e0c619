"""Whether named tensors are still those from which something was computed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from memokern.util.torch_internals import version


class Held:
    """Tensors by name, as they are now: which ones, and how often they were written to.

    Example:
        >>> import torch
        >>> from memokern.util.held import Held
        >>> tensors = {"rows": torch.zeros(3), "labels": None}
        >>> held = Held(tensors)
        >>> held.changed(tensors)
        set()
        >>> _ = tensors["rows"].add_(1)
        >>> held.changed(tensors)
        {'rows'}
    """

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        self.tensors = dict(tensors)
        self._versions = {k: None if v is None else version(v) for k, v in tensors.items()}

    def changed(self, tensors: Mapping[str, Tensor | None]) -> set[str]:
        """The names of those that are other tensors now, or were written to since then."""
        found = set()
        for name, value in self.tensors.items():
            now, then = tensors[name], self._versions[name]
            written = now is not None and then is not None and version(now) not in (then, None)
            if now is not value or written:
                found.add(name)
        return found
