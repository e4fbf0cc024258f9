"""What the processes of a run tell each other beside gradients: shall we stop, are we the same, are we all done.

All of it goes over gloo on the CPU, a group of its own, so that nothing here ever waits for a GPU or makes one wait.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sinkpretrain.errors import UserError


def is_taken_port(error: BaseException) -> bool:
    """Whether rank 0 could not listen because another program does."""
    return isinstance(error, RuntimeError) and "EADDRINUSE" in str(error)


def says_lost(error: BaseException) -> bool:
    """Whether an error says that another process has gone or does not answer, rather than that something is wrong here.

    NCCL's and the store's errors have types of their own, gloo's have its source file in the text. A port that is taken
    is an error of the store, too, but nobody's loss.
    """
    if is_taken_port(error):
        return False
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


class Ranks:
    """The processes of a run. Made by all of them at the same point, once their process group exists.

    Args:
        timeout: seconds after which a process that does not answer counts as lost.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def agree(self, value: int) -> int:
        """The largest value that any process gave *one call earlier*: the same on all, and nobody waits for it.

        The exchange travels while the next step is computed; alone, a process gets its own value at once.
        """
        if self._group is None:
            return value
        before = self._answer()
        tensor = torch.tensor([value])
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._asked = (tensor, work)
        return before

    def agree_now(self, value: int) -> int:
        """The largest value that any process gives in this call or gave in the one before; waits for all."""
        return max(self.agree(value), self._answer() if self._group is not None else value)

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        tensor, work = self._asked
        work.wait()
        self._asked = None
        return int(tensor)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self._group is not None:
            self._answer()
            dist.barrier(group=self._group)

    def set_patience(self, seconds: float) -> None:
        """How long an exchange that begins from now on may take, those of gradients included."""
        if self._group is not None:
            for group in (dist.group.WORLD, self._group):
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def require_same(self, facts: dict[str, Any]) -> None:
        """Check that every process has these named facts with these values.

        Raises:
            UserError: on all processes, naming the first one that differs from rank 0, its node, and in what.
        """
        if self._group is None:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (socket.gethostname(), facts), group=self._group)
        (_, first) = everyone[0]
        for rank, (node, theirs) in enumerate(everyone):
            names = [n for n in {**first, **theirs} if first.get(n) != theirs.get(n)]
            if names:
                what = ", ".join(f"{n} ({first.get(n)!r} on rank 0, {theirs.get(n)!r} there)" for n in names[:5])
                raise UserError(
                    f"rank {rank} on {node} differs from rank 0 on {everyone[0][0]}: {what}; give all processes the "
                    "same command, code and data."
                )
