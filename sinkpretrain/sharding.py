"""Models larger than one device: every process keeps a slice of each weight (FSDP2), checkpoints stay whole.

A block's weights are put together just before the block runs. Where memory is short they are let go right after;
elsewhere they stay until the step's last backward pass, as do the gradients (FSDP's SHARD_GRAD_OP, DeepSpeed's ZeRO
stage 2), so that a step exchanges each once, however many passes it has. What is saved is what one process would have
saved, so a checkpoint moves between strategies and numbers of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from datetime import timedelta
from typing import Any, cast

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sinkpretrain.device import total_memory
from sinkpretrain.model import GPTNeoX

MEMORY_SHARE = 1 / 3
"""Of a device's memory, what whole weights and gradients may take there; activations need most of the rest."""


def gathered_for_a_step(parameters: int, memory: int | None, wanted: str = "auto") -> bool:
    """Whether weights stay whole from a step's first pass to its last.

    Args:
        parameters: of the whole model; weights and gradients of 4 bytes each.
        memory: of one device, bytes; None is a CPU, whose processes share what they exchange.
        wanted: ``training.gather``.
    """
    if wanted != "auto":
        return wanted == "step"
    return memory is None or 8 * parameters <= MEMORY_SHARE * memory


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a sharded one (every process must ask for it); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The module's state with nothing sharded, one tensor at a time put together on every process.

    Args:
        module: sharded or not.
        keep: whether this process wants it; the others take part and get nothing. Kept tensors of a sharded module are
            on the CPU.
    """
    state = {}
    for name, value in module.state_dict().items():
        full = whole(value)
        if keep:
            state[name] = full.cpu() if isinstance(value, DTensor) else full
    return state


def like(full: Tensor, pattern: Tensor) -> Tensor:
    """This process's slice of ``full``, cut as ``pattern`` is; ``full`` itself if that is not sharded."""
    if not isinstance(pattern, DTensor) or full.shape != pattern.shape:
        return full
    return distribute_tensor(full, pattern.device_mesh, pattern.placements, src_data_rank=None)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy, with checkpoints in the format of every other strategy.

    Lightning's own whole checkpoints number the optimizer's states by the order of the module's parameters; an
    optimizer numbers them by its groups, and the two differ as soon as there is more than one group.

    Args:
        world: number of processes.
        timeout: of their exchanges.
        gather: ``training.gather``.
    """

    def __init__(self, world: int, timeout: timedelta, gather: str = "auto") -> None:
        super().__init__(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout
        )
        self._gather = gather
        self._for_a_step: FSDPModule | None = None

    def shard(self, model: GPTNeoX, mesh: DeviceMesh) -> None:
        """Slice the weights over a one-dimensional mesh: each block is a unit, what is outside the blocks another.

        Weights and their gradients stay in the precision they are in; autocast does the rest, as it does unsharded.
        """
        for_a_step = gathered_for_a_step(model.n_parameters(), total_memory(self.root_device), self._gather)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=not for_a_step)
        # What is outside the blocks stays whole from the embedding to the loss, which reads the output matrix itself.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(model, "hidden")
        self._for_a_step = cast(FSDPModule, model) if for_a_step else None

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """In a pass that is not a step's last: gradients are added up on each device, and weights stay as they are."""
        model = self._for_a_step
        if model is None:
            yield
            return
        self._exchange(model, False)
        try:
            yield
        finally:
            self._exchange(model, True)

    @staticmethod
    def _exchange(model: FSDPModule, now: bool) -> None:
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now)
        model.set_is_last_backward(now)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole_state(self.lightning_module, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        packed = plain.state_dict()
        states = {
            number: {name: whole(value).cpu() for name, value in state.items()}
            for number, state in packed["state"].items()
        }
        return {"state": states, "param_groups": packed["param_groups"]} if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, map_location="cpu", weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        patterns = self.lightning_module.state_dict()
        state = {k: like(v, patterns[k]) if k in patterns else v for k, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, packed in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = {
                number: {name: like(value, parameters[number]) for name, value in state.items()}
                for number, state in packed["state"].items()
            }
            optimizer.load_state_dict({"state": states, "param_groups": packed["param_groups"]})
