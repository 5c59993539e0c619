"""The processes that work on one training set: what they tell each other, and what becomes of one
that dies, raises, is late or is asked something else.

Every exchange is a collective of :mod:`torch.distributed`. Before numbers are exchanged the ranks
compare, in a message of fixed size, what each of them was asked: a rank that was asked something
else, or could not answer, makes all of them raise, in the same call.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes of the message with which the ranks compare what they were asked.
MESSAGE = 1536
# Characters of an error that other ranks are told.
TOLD = 300
_ERRORS = (RuntimeError, ValueError)  # what backends of torch.distributed raise


class Asked:
    """What all ranks were asked, on its way: :meth:`result` waits for it."""

    def __init__(self, ranks: Ranks, facts: dict[str, Any], work: Any, sent: list[Tensor]) -> None:
        self._ranks, self._facts, self._work, self._sent = ranks, facts, work, sent

    def result(self) -> list[dict[str, Any]]:
        """What each rank was asked. RuntimeError where one failed, ValueError where they differ."""
        self._ranks.wait(self._work, self._facts["operation"])
        found = [json.loads(bytes(v.cpu().tolist()).rstrip(b" ")) for v in self._sent]
        for rank, facts in enumerate(found):
            if facts.get("error") and rank != self._ranks.rank:
                raise RuntimeError(
                    f"{self._ranks}: rank {rank} could not answer in {facts['operation']!r}:"
                    f" {facts['error']}"
                )
        for rank, facts in enumerate(found):
            differ = [k for k in facts if k[0] != "_" and facts[k] != found[0].get(k)]
            if facts.keys() != found[0].keys() or differ:
                # The operation first: where it differs, nothing else can be alike.
                name = min(differ or ["operation"], key=lambda k: k != "operation")
                raise ValueError(
                    f"{self._ranks}: expected the same call on every rank, and {name} differs: rank"
                    f" 0 has {found[0].get(name)!r}, rank {rank} has {facts.get(name)!r}"
                )
        return found


class Ranks:
    """A process's place among those that share a training set.

    Args:
        group: of torch.distributed, which has to be initialised; None for all its processes.
        timeout: in seconds, how long a rank waits for the others; None for the group's own.

    Attributes: rank, size: of this process in the group, and how many there are. device: where
        tensors are exchanged: the CPU, or with NCCL the current GPU.
    """

    def __init__(self, group: Any = None, timeout: float | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "there are no other processes to share with: start the program with torchrun and"
                " call torch.distributed.init_process_group('gloo') ('nccl' on GPUs) first"
            )
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not in the group that the data are shared in")
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.rank, self.size = members.index(dist.get_rank()), len(members)
        backend = str(dist.get_backend(group))
        self.group = group
        self.timeout = None if timeout is None else timedelta(seconds=timeout)
        gpu = "nccl" in backend
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        )
        self._broken: str | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a group is not copied

    # --- what was asked -----------------------------------------------------------------------

    def ask(self, operation: str, facts: Mapping[str, Any]) -> Asked:
        """Tells the others what this rank was asked, and does not wait. Facts whose names begin
        with an underscore may differ."""
        known = {"operation": operation, **facts}
        text = json.dumps(known).encode()
        if len(text) > MESSAGE:
            raise ValueError(f"a call of more than {MESSAGE} bytes to compare: {known}")
        mine = torch.frombuffer(bytearray(text.ljust(MESSAGE)), dtype=torch.uint8).to(self.device)
        sent = [torch.empty_like(mine) for _ in range(self.size)]
        work = self._begin(operation, dist.all_gather, sent, mine)
        return Asked(self, known, work, sent)

    def agree(self, operation: str, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each rank was asked, once all have come here. Raises as :meth:`Asked.result`."""
        return self.ask(operation, facts).result()

    def refuse(self, operation: str, error: BaseException) -> None:
        """Tells the others that this rank raised; its caller raises the error itself."""
        told = f"{type(error).__name__}: {error}"[:TOLD]
        with contextlib.suppress(*_ERRORS):  # what the others say matters less than this error
            self.ask(operation, {"error": told.encode("ascii", "replace").decode()}).result()

    def settle(self, operation: str, error: BaseException | None) -> None:
        """Raises on every rank where one has an error: its own there, a RuntimeError elsewhere."""
        if error is not None:
            self.refuse(operation, error)
            raise error
        self.agree(operation, {})

    # --- numbers ------------------------------------------------------------------------------

    def gather(self, mine: Tensor, operation: str) -> Tensor:
        r"""[size, \*] of tensors that have the same shape on every rank."""
        return self.begin_gather(mine, operation)()

    def begin_gather(self, mine: Tensor, operation: str) -> Any:
        """The same, on its way: to be called for the result."""
        sent = mine.detach().to(self.device).contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        work = self._begin(operation, dist.all_gather, parts, sent)

        def result() -> Tensor:
            self.wait(work, operation)
            return torch.stack(parts).to(mine.device)

        return result

    def begin_sum(self, tensors: Sequence[Tensor], operation: str) -> Any:
        """The sums over the ranks of tensors of one type, on their way; one collective."""
        flat = torch.cat([v.detach().reshape(-1) for v in tensors]).to(self.device)
        work = self._begin(operation, dist.all_reduce, flat)

        def result() -> list[Tensor]:
            self.wait(work, operation)
            parts = flat.split([v.numel() for v in tensors])
            pairs = zip(parts, tensors, strict=True)
            return [part.to(v.device).reshape(v.shape) for part, v in pairs]

        return result

    def sum(self, tensors: Sequence[Tensor], operation: str) -> list[Tensor]:
        """The sums over the ranks: one collective for each type of number."""
        out: list[Any] = [None] * len(tensors)
        for kind in sorted({v.dtype for v in tensors}, key=str):
            at = [i for i, v in enumerate(tensors) if v.dtype == kind]
            summed = self.begin_sum([tensors[i] for i in at], operation)()
            for i, value in zip(at, summed, strict=True):
                out[i] = value
        return out

    # --- what may go wrong ----------------------------------------------------------------------

    def _begin(self, operation: str, collective: Any, *tensors: Any) -> Any:
        if self._broken is not None:
            raise RuntimeError(f"{self}: the ranks cannot go on: {self._broken}")
        try:
            return collective(*tensors, group=self.group, async_op=True)
        except _ERRORS as error:
            raise self._lost(operation, error) from error

    def wait(self, work: Any, operation: str) -> None:
        """Waits for a collective; RuntimeError where another rank does not take part."""
        try:
            work.wait() if self.timeout is None else work.wait(self.timeout)
        except _ERRORS as error:
            raise self._lost(operation, error) from error

    def _lost(self, operation: str, error: BaseException) -> RuntimeError:
        said = str(error).strip().splitlines()
        self._broken = (
            f"in {operation!r} another rank did not answer: its process ended, raised, or is later"
            f" than the group's timeout ({said[0][:TOLD] if said else type(error).__name__})"
        )
        return RuntimeError(f"{self}: {self._broken}; start all ranks again")


def checksum(tensor: Tensor | None) -> str | None:
    """What tells whether two ranks have the same numbers, to the bit; computed where they are."""
    if tensor is None:
        return None
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex() or flat.numel() == 0:
        return f"{tensor.dtype} {list(tensor.shape)}"
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), 1 << 20):
        bits = flat[start : start + (1 << 20)].view(kind).to(torch.int64)
        place = torch.arange(start, start + len(bits), device=flat.device)
        # An odd multiple that depends on the place, and the high bits mixed into the low ones.
        mixed = (bits ^ (bits >> 29)) * (2 * place + 0x1E3779B97F4A7C15)
        total += (mixed ^ (mixed >> 32)).sum()
    return f"{tensor.dtype} {list(tensor.shape)} {int(total):x}".removeprefix("torch.")
