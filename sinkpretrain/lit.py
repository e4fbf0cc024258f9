"""The training step as a LightningModule: loss, accumulation, clipping, schedule, and what happens between steps.

One Lightning batch is one optimizer step, so that every interval in the configuration counts steps and accumulation
cannot fall out of line with a resumed run's number of processes.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from sinkpretrain import attempts, flash4, metrics, watchdog
from sinkpretrain.checkpoint import (
    BackgroundWriter,
    checkpoint_path,
    due,
    is_log_spaced,
    on_cpu,
    prune_checkpoints,
    weights_path,
)
from sinkpretrain.config import OptimizerConfig, RunConfig
from sinkpretrain.data import Batch, shared_targets
from sinkpretrain.device import peak_memory
from sinkpretrain.guards import Guard, finite
from sinkpretrain.load import METADATA_KEY, describe, step_of, write_weights
from sinkpretrain.measures import sink_measures
from sinkpretrain.model import MLP, GPTNeoX
from sinkpretrain.ops import IGNORED, can_fuse, linear_cross_entropy
from sinkpretrain.progress import ProgressBar
from sinkpretrain.ranks import Ranks, says_lost
from sinkpretrain.sharding import ShardedStrategy, whole, whole_state
from sinkpretrain.signals import StopRequest, agreed
from sinkpretrain.slurm import TimeLeft
from sinkpretrain.trunk import FusedTrunk, maybe_compiled


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


def _poisoned_unless_finite(loss: Tensor) -> Tensor:
    """The same loss, whose gradients are all NaN if it is NaN or infinite: every process then sees it in the norm."""
    return loss * (loss.detach() * 0 + 1)


RECORDED_KEY = "recorded"
"""In a checkpoint: how many lines about steps the record of the run had."""


class Step(NamedTuple):
    """What is known of a step before the host has seen its loss; tensors are on the device."""

    step: int
    lr: float
    loss: Tensor
    norm: Tensor


class PretrainModule(L.LightningModule):
    """Trains a GPTNeoX. State beyond the weights: the optimizer's, and how many samples were seen.

    Args:
        config: the resolved configuration.
        stop: set from outside (a signal) to end after the current step.
        time_left: on rank 0 of a job with a time limit, says when to stop.
        writer: writes checkpoints and weights beside the training.
        facts: named values that must be the same in all processes.
    """

    def __init__(
        self,
        config: RunConfig,
        stop: StopRequest | None = None,
        time_left: TimeLeft | None = None,
        writer: BackgroundWriter | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.model = GPTNeoX(config.model, config.sink, seed=config.training.seed)
        self.samples_seen = 0
        self.stopped_by = 0
        """Number of the signal that ended the run before its last step; SIGUSR1 also stands for the time limit."""
        self._validation: Callable[[], list[Batch]] | None = None
        self._probes: tuple[Tensor, Tensor] | None = None
        self._stop, self._time_left = stop or StopRequest(), time_left
        self.writer = writer or BackgroundWriter()
        self._facts = facts or {}
        self._blocked = 0.0
        self._recorded = 0
        self.watchdog: watchdog.Watchdog | None = None
        self._fused = config.training.fused
        for module in self.model.modules():
            if isinstance(module, MLP):
                module.fused = self._fused
        # Compiling functions instead of wrapping the module keeps the names of the weights.
        self._maybe_compiled = partial(maybe_compiled, compiled=config.training.compile)
        self._hidden: Callable[..., Tensor] = (
            FusedTrunk(self.model, config.training.compile) if self._fused else self._maybe_compiled(self.model.hidden)
        )
        self._hidden_in_documents: Callable[..., Tensor] = self._maybe_compiled(self._mask_documents)
        self._plain_loss: Callable[..., Tensor] = self._maybe_compiled(linear_cross_entropy)
        self._pending: list[Step] = []
        self._last_validation = ""

    def set_validation(self, batches: Callable[[], list[Batch]], probe: Tensor, long_probe: Tensor) -> None:
        """Give it this process's share of the validation batches, and ids [B, T] for the attention measures, short ones
        for all and long ones for those of the last query."""
        self._validation, self._probes = batches, (probe, long_probe)

    def configure_model(self) -> None:
        """Shard the model if the strategy has a mesh for it. Weights then come and go between blocks, which no graph
        can hold: blocks are compiled one by one, inside the exchange."""
        if self.device_mesh is None:
            return
        assert isinstance(self.trainer.strategy, ShardedStrategy)
        self.trainer.strategy.shard(self.model, self.device_mesh["data_parallel"])
        for block in self.model.blocks:
            block.forward = self._maybe_compiled(block.forward)
        self._hidden, self._hidden_in_documents = self.model.hidden, self._mask_documents

    def prepare_kernels(self, device: torch.device) -> None:
        """Let optional kernels show that they are right, before a graph is made of what they are used in."""
        flash4.distrust()
        if self._fused and self.config.training.precision.startswith("bf16"):
            flash4.prepare(device, torch.bfloat16, self.config.model.head_dim)

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
        self._at("computing")
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
                self.manual_backward(_poisoned_unless_finite(loss))
            total += loss.detach()
        norm = self._clip()
        # The fused optimizer leaves weights and moments alone where this is 1, without the host asking the device.
        optimizer.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
        self._pending.append(Step(step + 1, lr, total, norm))
        self.samples_seen += self.config.data.batch_size

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

    def setup(self, stage: str) -> None:
        patience = self.config.training.stall_seconds
        self.ranks = Ranks((patience or 1e6) + 60)  # the watchdog is first, because it can name who is late
        self.ranks.require_same(self._facts)
        self.watchdog = watchdog.connect(self.ranks.rank, self.ranks.size, patience)
        if self.watchdog is not None:
            # It stands still with a job that is suspended; exchanges go by the time of day, and would have been lost.
            self.ranks.set_patience(1e6)

    def _end_watch(self) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()
            self.ranks.set_patience(self.config.training.stall_seconds + 60)

    def _at(self, doing: str) -> None:
        if self.watchdog is not None:
            self.watchdog.at(self.global_step, doing)

    def on_train_start(self) -> None:
        self.prepare_kernels(self.device)
        self._clock, self._clock_step = time.perf_counter(), self.global_step
        self._started = time.perf_counter()
        self._guard = Guard(self.config.training.max_skipped, self._samples_of)
        record = list(metrics.read(self._run))
        self._recorded = metrics.count(record)
        for line in record:
            self._guard.replay(line)
        steps = self.config.training.steps
        self._bar = ProgressBar(
            self.config.name, steps, "steps", enabled=self.config.log.progress and self.trainer.is_global_zero
        )
        self._bar.__enter__()
        self._bar.update(self.global_step)
        self.stopped_by = agreed(self.ranks.agree_now, self._stop.signal or 0)
        if self.trainer.is_global_zero:
            attempts.begin(self._run)
        self.ranks.barrier()  # whoever fails from here on finds that it began
        if self.stopped_by:
            self.trainer.should_stop = True  # asked to while it started: everything is on disk already
        elif self.global_step == 0:
            self._between_steps(0)
        else:
            self._make_up(record)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._at("between two steps")
        self._between_steps(self.global_step)
        self._at("reading data")

    def _between_steps(self, step: int) -> None:
        """Flush, validate, measure, save, in this order: what a checkpoint follows is written before it.

        A run that is asked to stop may have seconds left: it saves, and the next attempt does what else was due.
        """
        if self.writer.failed:
            self.writer.finish()
        log, last = self.config.log, step == self.config.training.steps
        flush = due(log.every, step) or last
        stopping = step > 0 and self._agree_to_stop(step) and not last
        validate, probe = (False, False) if stopping else self._evaluations_due(step)
        save = step > 0 and (due(log.checkpoint_every, step) or last or stopping)
        keep_weights = is_log_spaced(step) or due(log.weights_every, step) or last
        if self._pending and (flush or validate or probe or save or keep_weights):
            self._flush()
        if validate:
            self._validate(step)
        if probe:
            self._measure(step)
        if save or keep_weights:
            self._save(step, whole=save, weights=keep_weights)
        if stopping:
            self.trainer.should_stop = True
        elif last:
            self.stopped_by = 0
        if validate or probe or save or keep_weights:
            # Not training: keep it out of the next tokens/s.
            self._clock, self._clock_step = time.perf_counter(), step

    def _evaluations_due(self, step: int) -> tuple[bool, bool]:
        """Whether to validate, and whether to measure, after a step."""
        log, last = self.config.log, step == self.config.training.steps
        return (
            (due(log.validate_every, step) or last) and self._validation is not None,
            (due(log.probe_every, step) or last) and self._probes is not None,
        )

    def _make_up(self, record: list[dict[str, Any]]) -> None:
        """What the attempt before left to do after its last step; the record then is as if it had not been stopped."""
        step = self.global_step
        there = {line["kind"] for line in record if line["step"] == step}
        validate, probe = self._evaluations_due(step)
        owed = (validate and "validation" not in there) + 2 * (probe and "probe" not in there)
        # Rank 0 writes the record, and alone knows what it holds.
        owed = self.ranks.agree_now(owed if self.trainer.is_global_zero else 0)
        if owed & 1:
            self._validate(step)
        if owed & 2:
            self._measure(step)
        if owed:
            self._clock, self._clock_step = time.perf_counter(), step

    @property
    def _run(self) -> Path:
        return Path(self.config.out)

    def _agree_to_stop(self, step: int) -> bool:
        """All processes stop at the same step or none does; with several, one step after the first was asked."""
        asked = int(self._stop.signal or 0)
        if not asked and self._time_left is not None and self._time_left.over():
            asked = int(signal.SIGUSR1)
        self.stopped_by = agreed(self.ranks.agree, asked)
        return self.stopped_by > 0

    def _samples_of(self, step: int) -> list[int]:
        """File indices of the samples that were in a step."""
        batch_size = self.config.data.batch_size
        first = self.samples_seen - (self.global_step - step + 1) * batch_size
        order = getattr(self.trainer, "datamodule").order  # noqa: B009 - Lightning adds it at run time
        return [int(i) for i in order(max(0, first), batch_size)]

    def _flush(self) -> None:
        """Write the steps since the last flush; the only point at which the host waits for the losses."""
        losses = torch.stack([s.loss for s in self._pending])
        if self.trainer.world_size > 1:
            dist.all_reduce(losses)
            losses /= self.trainer.world_size
        norms = torch.stack([s.norm for s in self._pending])
        values = torch.stack((losses.float(), norms.float())).cpu()
        seconds = time.perf_counter() - self._clock
        last_step = self._pending[-1].step
        tokens_per_step = self.config.data.batch_size * self.config.model.context
        tokens_per_second = (last_step - self._clock_step) * tokens_per_step / seconds
        lines: list[dict[str, Any]] = [
            {
                "kind": "train",
                "step": s.step,
                "loss": finite(float(loss)),
                "lr": s.lr,
                "grad_norm": finite(float(norm)),
                # Not the step times the batch: a run may have gone on with another batch size.
                "tokens": self.samples_seen * self.config.model.context - (last_step - s.step) * tokens_per_step,
            }
            for s, loss, norm in zip(self._pending, values[0], values[1], strict=True)
        ]
        lines[-1] |= {
            "tokens_per_second": round(tokens_per_second, 1),
            "model_flops_per_second": tokens_per_second * self.model.flops_per_token(),
            "peak_memory_bytes": peak_memory(self.device),
        }
        self._pending = []
        self._clock, self._clock_step = time.perf_counter(), last_step
        # An event stands in front of its step, wherever flushes fall: a resumed run's record is the same.
        self._write(sorted(self._guard.events(lines) + lines, key=lambda line: int(line["step"])))
        self._guard.check()
        loss = "not finite" if lines[-1]["loss"] is None else f"{lines[-1]['loss']:.3f}"
        self._bar.update(last_step, f"loss {loss}  {tokens_per_second:,.0f} tokens/s{self._last_validation}")

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not self.trainer.is_global_zero:
            return
        metrics.append(self._run, lines)
        self._recorded += metrics.count(lines)
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
                total = torch.where(count > 0, self.loss(ids, labels) * count, 0.0)  # the mean of nothing is NaN
                summed += torch.stack((total.double(), count.double()))
        if self.trainer.world_size > 1:
            dist.all_reduce(summed)
        loss = float(summed[0] / summed[1])
        self._last_validation = f"  validation {loss:.3f}"
        self._bar.update(step, self._bar.note.partition("  validation")[0] + self._last_validation)
        self._write([{"kind": "validation", "step": step, "loss": round(loss, 6), "targets": int(summed[1])}])

    def _measure(self, step: int) -> None:
        assert self._probes is not None
        with self._evaluating(), torch.compiler.set_stance("force_eager"):  # it looks inside attention
            measures = sink_measures(self.model, *(ids.to(self.device) for ids in self._probes))
        self._write([{"kind": "probe", "step": step, **measures}])

    @contextlib.contextmanager
    def _evaluating(self) -> Any:
        self.model.eval()
        with self.trainer.precision_plugin.val_step_context():
            yield
        self.model.train()

    def on_train_end(self) -> None:
        self._bar.__exit__(None)
        self._end_watch()
        self.writer.finish()
        self._note_written()

    def on_exception(self, exception: BaseException) -> None:
        """Called by Ending before anything is taken apart, so before the other processes can notice."""
        if not says_lost(exception):
            with contextlib.suppress(OSError):  # the folder can no longer be written to: what happened is to be said
                attempts.end(self._run)
        self._end_watch()
        if hasattr(self, "_bar"):
            self._bar.__exit__(type(exception))

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, step: int, whole: bool, weights: bool) -> None:
        """Copy what is to be kept; writing it is not the training's business. The file before it is waited for."""
        started = time.perf_counter()
        self.writer.finish()
        self._note_written()
        if weights:
            self._keep_weights(step)
        if whole:
            if self.trainer.is_global_zero:
                metrics.sync(self._run)  # no checkpoint may outlive the record of the steps before it
            path = checkpoint_path(self._run, step)
            self.trainer.save_checkpoint(path)
            log = self.config.log
            if self.trainer.is_global_zero:
                doubling = log.checkpoint_every if log.keep_doubling else 0
                self.writer.submit(None, partial(prune_checkpoints, self._run, log.keep, doubling))
        self._blocked += time.perf_counter() - started

    def _keep_weights(self, step: int) -> None:
        state = whole_state(self.model, keep=self.trainer.is_global_zero)  # all processes take part in this
        if self.trainer.is_global_zero:
            path = weights_path(self._run, step)
            about = describe(self.model, step, self.config.name)
            copy = on_cpu(state, self.device.type == "cuda")
            self.writer.submit(path, partial(write_weights, copy, about, path))

    def _note_written(self) -> None:
        """Record how long files took, and the share of the time so far for which the training stood still."""
        for written in self.writer.take_written():
            line = {
                "kind": "checkpoint",
                "step": step_of(written.path),
                "file": written.path.name,
                "bytes": written.bytes,
                "write_seconds": round(written.seconds, 4),
                "blocked_share": round(self._blocked / (time.perf_counter() - self._started), 6),
            }
            self._write([line])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["samples_seen"] = self.samples_seen
        checkpoint[RECORDED_KEY] = self._recorded
        checkpoint[METADATA_KEY] = describe(self.model, self.global_step, self.config.name)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.samples_seen = checkpoint["samples_seen"]


class Ending(L.Callback):
    """Tells the module of an exception; Lightning tells callbacks only."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, PretrainModule)
        pl_module.on_exception(exception)
