"""The training step as a LightningModule: loss, accumulation, clipping, schedule, and what happens between steps.

One Lightning batch is one optimizer step, so that every interval in the configuration counts steps and accumulation
cannot fall out of line with a resumed run's number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from sinkpretrain import metrics
from sinkpretrain.checkpoint import checkpoint_path, due, is_log_spaced, prune_checkpoints, weights_path
from sinkpretrain.config import OptimizerConfig, RunConfig, to_dict
from sinkpretrain.data import Batch, shared_targets
from sinkpretrain.load import METADATA_KEY, save_weights
from sinkpretrain.measures import sink_measures
from sinkpretrain.model import MLP, GPTNeoX
from sinkpretrain.ops import IGNORED, can_fuse, linear_cross_entropy
from sinkpretrain.progress import ProgressBar
from sinkpretrain.sharding import shard, whole, whole_state
from sinkpretrain.signals import StopRequest


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of the optimizer step ``step`` (0-based) of ``steps``: linear warm-up, then cosine to ``min_lr``.

    GPT-NeoX's annealing: warm-up over the first ``warmup`` share reaches ``lr``, the cosine spans what is left.
    """
    warmup = int(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def parameter_groups(model: GPTNeoX, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms, one-dimensional sink parameters) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class PretrainModule(L.LightningModule):
    """Trains a GPTNeoX. State beyond the weights: the optimizer's, and how many samples were seen.

    Args:
        config: the resolved configuration.
        stop: set from outside (a signal) to end after the current step.
    """

    def __init__(self, config: RunConfig, stop: StopRequest | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.model = GPTNeoX(config.model, config.sink, seed=config.training.seed)
        self.samples_seen = 0
        self.stopped_early = False
        self._validation: Callable[[], list[Batch]] | None = None
        self._probe: Tensor | None = None
        self._stop = stop or StopRequest()
        self._fused = config.training.fused
        for module in self.model.modules():
            if isinstance(module, MLP):
                module.fused = self._fused
        # Compiling functions instead of wrapping the module keeps the names of the weights.
        # A graph break would cost a third of the speed in silence: fullgraph makes it an error.
        self._maybe_compiled = (
            functools.partial(torch.compile, fullgraph=True) if config.training.compile else (lambda f: f)
        )
        self._hidden: Callable[..., Tensor] = self._maybe_compiled(self.model.hidden)
        self._hidden_in_documents: Callable[..., Tensor] = self._maybe_compiled(self._mask_documents)
        self._plain_loss: Callable[..., Tensor] = self._maybe_compiled(linear_cross_entropy)
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
        self._last_validation = ""

    def set_validation(self, batches: Callable[[], list[Batch]], probe: Tensor) -> None:
        """Give it this process's share of the validation batches, and ids [B, T] for the attention measures."""
        self._validation, self._probe = batches, probe

    def configure_model(self) -> None:
        """Shard the model if the strategy has a mesh for it. Weights then come and go between blocks, which no graph
        can hold: blocks are compiled one by one, inside the exchange."""
        if self.device_mesh is None:
            return
        shard(self.model, self.device_mesh["data_parallel"])
        for block in self.model.blocks:
            block.forward = self._maybe_compiled(block.forward)
        self._hidden, self._hidden_in_documents = self.model.hidden, self._mask_documents

    # --- one step -------------------------------------------------------------------------------------------------

    def loss(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean negative log-likelihood, nats per target, in fp32."""
        if self.config.data.document_mask:
            hidden = self._hidden_in_documents(ids_BT)
        else:
            hidden = self._hidden(ids_BT, self.model.causal(ids_BT.shape[1], ids_BT.device))
        # The fused loss is one kernel and three matrix products: nothing is left to compile. Where it does not apply
        # (a CPU, fp32, validation), the plain one is compiled like the rest.
        fused = self._fused and can_fuse(hidden)
        head_loss = linear_cross_entropy if fused else self._plain_loss
        return head_loss(hidden.flatten(0, 1), self.model.head.weight, labels_BT.flatten(), fused)

    def _mask_documents(self, ids_BT: Tensor) -> Tensor:
        """The hidden states under a mask that depends on the batch, and is therefore made in compiled code."""
        end = self.config.data.end_of_document
        assert end is not None
        return self.model.hidden(ids_BT, self.model.within_documents(ids_BT, end))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step on this process's share of the step's samples, in as many passes as ``micro_batch`` asks.

        Every sample has the same number of targets, so the mean over passes and processes is the mean over targets.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer)
        optimizer.zero_grad()
        step = self.global_step
        lr = learning_rate(step, self.config.training.steps, self.config.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        passes = -(-len(batch.ids) // self.config.training.micro_batch)
        total = torch.zeros((), device=self.device)
        for number, (ids, labels) in enumerate(
            zip(batch.ids.chunk(passes), batch.labels.chunk(passes), strict=True), start=1
        ):
            with self._gradients_stay_here(number < passes):
                # chunk() makes the last pass smaller if the share does not divide evenly: weigh by its samples.
                loss = self.loss(ids, labels) * (len(ids) / len(batch.ids))
                self.manual_backward(loss)
            total += loss.detach()
        norm = self._clip()
        optimizer.step()
        self.samples_seen += self.config.data.batch_size
        self._pending.append((step + 1, lr, total, norm))

    def _gradients_stay_here(self, more_to_come: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients between processes only in the last pass of a step."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if more_to_come and block is not None else contextlib.nullcontext()

    def _clip(self) -> Tensor:
        """Clip the global gradient norm here rather than in Lightning, which refuses to with a fused optimizer."""
        limit = self.config.optimizer.clip or float("inf")
        return whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit, foreach=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        o = self.config.optimizer
        return torch.optim.AdamW(
            parameter_groups(self.model, o.weight_decay),
            lr=o.lr,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            fused=True,
        )

    # --- between steps --------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self._clock, self._clock_step = time.perf_counter(), self.global_step
        steps = self.config.training.steps
        self._bar = ProgressBar(
            self.config.name, steps, "steps", enabled=self.config.log.progress and self.trainer.is_global_zero
        )
        self._bar.__enter__()
        self._bar.update(self.global_step)
        self._stop.install()
        if self.global_step == 0:
            self._between_steps(0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._between_steps(self.global_step)

    def _between_steps(self, step: int) -> None:
        """Flush, validate, measure, save, in this order: what a checkpoint follows is written before it."""
        log, last = self.config.log, step == self.config.training.steps
        flush = due(log.every, step) or last
        stopping = self._agree_to_stop(step, flush)
        validate = (due(log.validate_every, step) or last) and self._validation is not None
        probe = (due(log.probe_every, step) or last) and self._probe is not None
        save = step > 0 and (due(log.checkpoint_every, step) or last or stopping)
        keep_weights = is_log_spaced(step) or due(log.weights_every, step) or last
        if self._pending and (flush or validate or probe or save or keep_weights):
            self._flush()
        if validate:
            self._validate(step)
        if probe:
            self._measure(step)
        if keep_weights:
            self._keep_weights(step)
        if save:
            self.trainer.save_checkpoint(checkpoint_path(self._run, step))
            if self.trainer.is_global_zero:
                prune_checkpoints(self._run, log.keep)
        if stopping and not last:
            self.stopped_early = True
            self.trainer.should_stop = True
        if validate or probe or save or keep_weights:
            # Not training: keep it out of the next tokens/s.
            self._clock, self._clock_step = time.perf_counter(), step

    def _keep_weights(self, step: int) -> None:
        state = whole_state(self.model, keep=self.trainer.is_global_zero)  # all processes take part in this
        if self.trainer.is_global_zero:
            save_weights(self.model, weights_path(self._run, step), step, self.config.name, state=state)

    @property
    def _run(self) -> Path:
        return Path(self.config.out)

    def _agree_to_stop(self, step: int, flush: bool) -> bool:
        """All processes stop at the same step or none does: with several, they agree whenever metrics are flushed."""
        if self.trainer.world_size == 1:
            return self._stop.requested
        if not flush:
            return False
        flag = torch.tensor([float(self._stop.requested)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _flush(self) -> None:
        """Write the steps since the last flush; the only point at which the host waits for the losses."""
        losses = torch.stack([loss for _, _, loss, _ in self._pending])
        if self.trainer.world_size > 1:
            dist.all_reduce(losses)
            losses /= self.trainer.world_size
        norms = torch.stack([norm for *_, norm in self._pending])
        values = torch.stack((losses.float(), norms.float())).cpu()
        seconds = time.perf_counter() - self._clock
        last_step = self._pending[-1][0]
        tokens_per_step = self.config.data.batch_size * self.config.model.context
        tokens_per_second = (last_step - self._clock_step) * tokens_per_step / seconds
        lines = [
            {
                "kind": "train",
                "step": step,
                "loss": round(float(loss), 6),
                "lr": lr,
                "grad_norm": round(float(norm), 6),
                "tokens": step * tokens_per_step,
            }
            for (step, lr, _, _), loss, norm in zip(self._pending, values[0], values[1], strict=True)
        ]
        lines[-1] |= {
            "tokens_per_second": round(tokens_per_second, 1),
            "model_flops_per_second": tokens_per_second * self.model.flops_per_token(),
        }
        self._pending = []
        self._clock, self._clock_step = time.perf_counter(), last_step
        self._write(lines)
        self._bar.update(
            last_step,
            f"loss {lines[-1]['loss']:.3f}  {tokens_per_second:,.0f} tokens/s{self._last_validation}",
        )

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not self.trainer.is_global_zero:
            return
        metrics.append(self._run, lines)
        for logger in self.trainer.loggers:
            numbers = {k: v for k, v in lines[-1].items() if isinstance(v, int | float) and k != "step"}
            kind = lines[-1]["kind"]
            logger.log_metrics({f"{kind}/{k}": v for k, v in numbers.items()}, step=lines[-1]["step"])

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Loss on the targets that every mechanism has, over the whole fixed set."""
        assert self._validation is not None
        summed = torch.zeros(2, dtype=torch.float64, device=self.device)
        with self._evaluating():
            for batch in self._validation():
                ids, labels = (x.to(self.device) for x in shared_targets(batch, len(self.model.prefix_ids)))
                count = (labels != IGNORED).sum()
                summed += torch.stack(((self.loss(ids, labels) * count).double(), count.double()))
        if self.trainer.world_size > 1:
            dist.all_reduce(summed)
        loss = float(summed[0] / summed[1])
        self._last_validation = f"  validation {loss:.3f}"
        self._bar.update(step, self._bar.note.partition("  validation")[0] + self._last_validation)
        self._write([{"kind": "validation", "step": step, "loss": round(loss, 6), "targets": int(summed[1])}])

    def _measure(self, step: int) -> None:
        assert self._probe is not None
        with self._evaluating(), torch.compiler.set_stance("force_eager"):  # it looks inside attention
            measures = sink_measures(self.model, self._probe.to(self.device))
        self._write([{"kind": "probe", "step": step, **measures}])

    @contextlib.contextmanager
    def _evaluating(self) -> Any:
        self.model.eval()
        with self.trainer.precision_plugin.val_step_context():
            yield
        self.model.train()

    def on_train_end(self) -> None:
        self._bar.__exit__(None, None, None)
        self._stop.uninstall()

    def on_exception(self, exception: BaseException) -> None:
        self._bar.__exit__(type(exception), exception, None)
        self._stop.uninstall()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["samples_seen"] = self.samples_seen
        checkpoint[METADATA_KEY] = {
            "model": to_dict(self.model.config),
            "sink": to_dict(self.model.sink_config),
            "step": self.global_step,
            "name": self.config.name,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.samples_seen = checkpoint["samples_seen"]
