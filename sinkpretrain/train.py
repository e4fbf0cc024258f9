"""The composition root of training: one configuration becomes data, model, trainer and a run directory.

The same command starts a run, continues an interrupted one, and says so when there is nothing left to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from sinkpretrain import attempts, metrics, outside, sinks, slurm
from sinkpretrain.checkpoint import AtomicCheckpointIO, BackgroundWriter, newest_checkpoint
from sinkpretrain.config import MAX_SINK_TOKENS, RunConfig, require_ranges, to_dict
from sinkpretrain.data import (
    Batch,
    Samples,
    Stream,
    Tokens,
    fingerprint,
    open_data,
    require_one_tokenizer,
    training_order,
)
from sinkpretrain.device import device_memory, total_memory
from sinkpretrain.errors import LostProcessError, SettingHasNoEffect, UserError
from sinkpretrain.files import read_json, sha256_file
from sinkpretrain.hooks import check_hooks
from sinkpretrain.lit import RECORDED_KEY, Ending, PretrainModule
from sinkpretrain.load import read_checkpoint, step_of
from sinkpretrain.measures import LONG_SAMPLES
from sinkpretrain.model import without_weights
from sinkpretrain.ops import IGNORED
from sinkpretrain.output import say
from sinkpretrain.provenance import source_hash, versions
from sinkpretrain.ranks import is_taken_port, says_lost
from sinkpretrain.run_directory import claim, note_attempt
from sinkpretrain.sharding import ShardedStrategy
from sinkpretrain.signals import StopRequest

PROBE_SAMPLES, PROBE_TOKENS = 100, 64
"""Validation samples, and their length at most, on which attention is measured while training: those of Sink_k in Gu
et al. (2024, arXiv 2410.10781, section 3)."""


@dataclass(frozen=True)
class TrainResult:
    """How a call of ``train`` ended.

    step: optimizer steps behind the run's weights.
    finished: whether that is all of them.
    signal: the signal that asked to stop, if one did.
    processes: how many trained it together; 1 if there was nothing to train.
    """

    run: Path
    step: int
    finished: bool
    signal: int | None = None
    processes: int = 1


def train(config: RunConfig, allow_changes: bool = False, stop: StopRequest | None = None) -> TrainResult:
    """Train, or go on training, the run that a configuration describes.

    Args:
        config: the configuration.
        allow_changes: go on although settings of the optimizer, the training or the data differ from the run's.
        stop: takes the signals; by default one that has them until this returns.

    Raises:
        UserError: the configuration, the data and the run directory do not go together, or the disk or the device's
            memory is full.
        LostProcessError: another process of the run has gone; what the last checkpoint holds is not lost.
    """
    stop = stop or StopRequest()
    mine = not stop.installed
    if mine:
        stop.install()
    try:
        return _train(config, allow_changes, stop)
    except RuntimeError as error:
        if is_taken_port(error):
            port = os.environ.get("MASTER_PORT")
            raise UserError(
                f"port {port} of rank 0's node is taken by another program; export another MASTER_PORT."
            ) from error
        if not says_lost(error):
            raise
        raise LostProcessError(
            f"rank {_rank()} has lost the connection to another process ({' '.join(str(error).split())[:200]}); the "
            "same command goes on from the last checkpoint."
        ) from error
    finally:
        stop.over = True
        if mine:
            stop.uninstall()


def short_of_memory(config: RunConfig) -> str:
    """What a device's memory does not hold, and what to do about it; of a resolved configuration."""
    device = accelerator(config)
    share = -(-config.data.batch_size // world_size(config))
    samples = -(-share // -(-share // config.training.micro_batch))
    memory = total_memory(torch.device(device))
    size = f" ({memory / 2**30:.0f} GiB)" if memory else ""
    smaller = f"use --training.micro_batch {samples // 2}, which makes the same steps of more passes"
    several = "use several devices and --training.strategy fsdp"
    if world_size(config) > 1:
        sharded = isinstance(strategy(config), ShardedStrategy)
        several = "use more devices" if sharded else "use --training.strategy fsdp"
    return (
        f"the memory of {device}{size} does not hold the model and a pass of {samples} x {config.model.context:,} "
        f"tokens; {smaller if samples > 1 else several}. What the run has saved is kept."
    )


def _train(config: RunConfig, allow_changes: bool, stop: StopRequest) -> TrainResult:
    tokens = open_data(config.data)
    config = resolve(config, tokens)
    run = Path(config.out)
    with contextlib.ExitStack() as held:
        if _rank() == 0:
            held.enter_context(claim(run, config, tokens, allow_changes))
        checkpoint = newest_checkpoint(run)
        done = step_of(checkpoint) if checkpoint else 0
        if done >= config.training.steps:
            print(f"{run} is finished: {done:,} steps. Raise training.steps to go on.")
            return TrainResult(run, done, finished=True)
        if _rank() == 0:
            if checkpoint and not allow_changes:
                metrics.require_whole(run, done, read_checkpoint(checkpoint).get(RECORDED_KEY, 0))
            attempts.end(run)  # one that was lost
            note_attempt(run, accelerator(config), done)
            metrics.truncate(run, done if checkpoint else -1)
            start = f"resuming at step {done:,}" if checkpoint else "training"
            print(f"{config.name}: {start} of {config.training.steps:,} steps, in {run}", flush=True)
        with warnings.catch_warnings():
            for text in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=text)
            module, trainer = build(config, tokens, stop, facts(config, tokens, checkpoint))
            data = TokenData(config, tokens, module)
            path = str(checkpoint) if checkpoint else None
            with device_memory(lambda: short_of_memory(config)), _left_at_once(run):
                trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        return _leave(run, config, module, trainer)


def train_whole(config: RunConfig) -> TrainResult:
    """As ``train``, for a caller to whom half a run is none.

    Raises:
        KeyboardInterrupt: a signal ended the run before its last step.
    """
    result = train(config)
    if not result.finished:
        raise KeyboardInterrupt
    return result


@contextlib.contextmanager
def _left_at_once(run: Path) -> Iterator[None]:
    """A second Ctrl-C, which Lightning turns into an exit without a word, says what a restart will go on from."""
    try:
        yield
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, KeyboardInterrupt):
            raise
        step = attempts.saved_step(run)
        text = f"stopped without saving; the same command goes on from step {step:,}."
        raise KeyboardInterrupt(text) from leaving


def _leave(run: Path, config: RunConfig, module: PretrainModule, trainer: L.Trainer) -> TrainResult:
    """Say how it ended, put the job back into the queue if it has more to do, and let all processes leave together."""
    step = module.global_step
    finished = step >= config.training.steps
    if trainer.is_global_zero:
        if not finished:
            say(f"stopped after step {step:,} of {config.training.steps:,}; the same command goes on from there.")
        if config.log.wandb == "offline":
            identity = _wandb_id(run)
            say(f"to upload: wandb sync --id {identity} {run}/wandb/offline-run-*-{identity}")
        if module.stopped_by != signal.SIGUSR1 or _requeue(run, step):
            attempts.end(run)
    # srun ends a step when one of its processes fails: nobody may leave while rank 0 is still writing.
    module.ranks.barrier()
    if module.ranks.size > 1:
        dist.destroy_process_group()  # while Python is whole: threads of gloo that outlive it abort the process
    # The first process launched the others by itself, and would be killed if one of them ended with a code.
    helper = _started_by_hand(trainer) and not trainer.is_global_zero
    return TrainResult(run, step, finished, None if helper else module.stopped_by or None, module.ranks.size)


def _requeue(run: Path, step: int) -> bool:
    """Returns whether it is settled what becomes of the job; if not, ``supervise`` tries where the job script runs."""
    job = slurm.job_id()
    if job is None:
        return True
    stuck = attempts.is_stuck(run, step)
    problem = "its last attempts made no step" if stuck else slurm.requeue(job)
    say(f"job {job} does not go back into the queue: {problem}." if problem else f"job {job} is back in the queue.")
    return stuck or problem is None


def facts(config: RunConfig, tokens: Tokens, checkpoint: Path | None) -> dict[str, Any]:
    """What must be the same in all processes of a run, by name."""
    return {
        **{f"setting {name}": value for name, value in flat(to_dict(config)).items()},
        **{f"data {name}": value for name, value in tokens.identity().items()},
        "data spot check": fingerprint(tokens.train, 1 << 10)[:12],  # are the copies on two nodes the same?
        "newest checkpoint": checkpoint.name if checkpoint else None,
        "code": source_hash(),
        **{f"code of {module}": sha256 for module, sha256 in outside.hashes(config.sink).items()},
        **{f"version of {name}": value for name, value in versions().items()},
    }


_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # batches come from a thread of our own
    ".*`training_step` returned `None`.*",
    ".*There is a wandb run already in progress.*",
    ".*GPU available but not used.*",
    ".*`srun` command is available on your system but is not used.*",  # training by hand where Slurm is, on purpose
    ".*isinstance\\(treespec, LeafSpec\\).*",  # torch speaking to Lightning
)


# --- configuration ------------------------------------------------------------------------------------------------


def resolve(config: RunConfig, tokens: Tokens) -> RunConfig:
    """Fill in what the data decide and check that the parts fit; raises UserError."""
    require_ranges(config)
    known = None
    if tokens.manifest is not None:
        known = tokens.manifest.tokenizer_size
        if config.model.tokenizer_size not in (0, known):
            raise UserError(
                f"model.tokenizer_size is {config.model.tokenizer_size}, but {config.data.path} was prepared with a "
                f"tokenizer of {known} ids; to take both sizes from the data, give --model.tokenizer-size 0 "
                "--model.vocab-size 0."
            )
        if tokens.tokenizer and sha256_file(tokens.tokenizer) != tokens.manifest.tokenizer_sha256:
            raise UserError(
                f"{tokens.tokenizer} is not the tokenizer that the manifest names; restore it, or prepare the data "
                "again."
            )
    require_one_tokenizer(tokens)
    model = config.model.resolved(known)
    check_hooks(config.sink, model)
    prefix = without_weights(model, config.sink).prefix_ids
    if len(prefix) > MAX_SINK_TOKENS:
        raise UserError(
            f"{len(prefix)} sink tokens displace more than the last {MAX_SINK_TOKENS} targets of a sample, which "
            f"validation leaves out so that losses compare; set sink.options.n to {MAX_SINK_TOKENS} at most."
        )
    name = config.name or (Path(config.out).name if config.out else sinks.label(config.sink))
    world = world_size(config)
    if config.data.batch_size % world:
        raise UserError(
            f"data.batch_size {config.data.batch_size} does not divide over {world} processes; use a multiple."
        )
    o = config.optimizer
    if o.schedule == "cosine" and o.min_lr > o.lr:
        raise UserError(f"optimizer.min_lr {o.min_lr:g} is above optimizer.lr {o.lr:g}; lower it, a tenth is usual.")
    Samples(tokens.train, model, ())  # large enough?
    if model.window and model.window + model.window_sinks >= model.context - 1:
        message = f"model.window hides nothing from a token of a sample of {model.context}; it only matters in streams."
        warnings.warn(message, SettingHasNoEffect, stacklevel=2)
    data = dataclasses.replace(config.data, end_of_document=_end_of_document(config, tokens))
    named = dataclasses.replace(config, model=model, data=data, name=name)
    return dataclasses.replace(named, out=named.folder)


def _end_of_document(config: RunConfig, tokens: Tokens) -> int | None:
    """The id between documents, where the run needs one; raises UserError if nothing names it."""
    given = config.data.end_of_document
    if not config.data.document_mask:
        if given is not None:
            message = "data.end_of_document has no effect without data.document_mask."
            warnings.warn(message, SettingHasNoEffect, stacklevel=2)
        return given
    known = tokens.manifest.eod_id if tokens.manifest else None
    if given is None and known is None:
        raise UserError(
            f"data.document_mask needs to know which token ends a document, and {config.data.path} has no manifest "
            "that says so; give data.end_of_document (0 for Pythia's files)."
        )
    if given is not None and known not in (None, given):
        raise UserError(
            f"data.end_of_document is {given}, but {config.data.path} was prepared with {known} between its documents; "
            "leave the setting out."
        )
    return known if given is None else given


def accelerator(config: RunConfig) -> str:
    """``cpu`` or ``cuda``; raises UserError if a GPU is asked for and there is none."""
    wanted = config.training.accelerator
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("training.accelerator is cuda, but torch sees no GPU; use cpu or check the driver.")
    return wanted if wanted != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def _rank() -> int:
    """Rank of this process as its launcher's environment says, known before any process group exists."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def world_size(config: RunConfig) -> int:
    per_node = config.training.devices or (torch.cuda.device_count() if accelerator(config) == "cuda" else 1)
    return per_node * config.training.nodes


SHARD_FROM = 1_000_000_000
"""Parameters from which several devices share one model: weights, gradients and AdamW's moments take 16 bytes each."""


def strategy(config: RunConfig) -> Strategy | str:
    """How several processes train one model; raises UserError for a precision that sharding does not know."""
    # Longer than the patience of our own checks, which say what is wrong.
    patience = timedelta(seconds=(config.training.stall_seconds or 1e6) + 120)
    world, wanted = world_size(config), config.training.strategy
    if wanted == "auto":
        large = without_weights(config.model, config.sink).n_parameters() >= SHARD_FROM
        wanted = "fsdp" if large and world > 1 else "ddp"
    if wanted == "fsdp":
        if config.training.precision == "64-true":
            raise UserError("training.strategy fsdp does not know training.precision 64-true; use 32-true or ddp.")
        return ShardedStrategy(world, patience, config.training.gather)
    return OneStreamDDP(gradient_as_bucket_view=True, timeout=patience) if world > 1 else "auto"


class OneStreamDDP(DDPStrategy):
    """Lightning's, without the stream of its own on which Lightning 2.6 wraps a model: it stays that of the gradients'
    accumulators, which then wait for the passes' stream parameter by parameter, and torch (from 2.10 on) warns of it.
    Mended in Lightning since: https://github.com/Lightning-AI/pytorch-lightning/pull/21746."""

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)


def flat(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{where}{name}.") if isinstance(value, dict) else {f"{where}{name}": value}
    return found


# --- parts --------------------------------------------------------------------------------------------------------


class TokenData(L.LightningDataModule):
    """Batches of this process from the sample that the restored run has reached."""

    def __init__(self, config: RunConfig, tokens: Tokens, module: PretrainModule) -> None:
        super().__init__()
        self.config, self.module = config, module
        self.samples = Samples(tokens.train, config.model, module.model.prefix_ids)
        self.order = training_order(config.data, self.samples)
        tokens.train.expect_scattered_reads(self.order.shuffle)

    def train_dataloader(self) -> Stream:
        assert self.trainer is not None
        return Stream(
            samples=self.samples,
            order=self.order,
            batch_size=self.config.data.batch_size,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            first_sample=self.module.samples_seen,
            pin=self.trainer.strategy.root_device.type == "cuda",
        )


def build(
    config: RunConfig, tokens: Tokens, stop: StopRequest, same: dict[str, Any]
) -> tuple[PretrainModule, L.Trainer]:
    """The module and the Lightning trainer that a resolved configuration describes.

    Args:
        same: facts that all processes must agree in.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("highest" if config.training.precision == "32-true" else "high")
    kind = accelerator(config)
    world = world_size(config)
    if config.training.compile and world > 1:
        # Fused, a model is compiled from block to block, so that gradients are exchanged while others are still
        # computed; a model compiled as one has to be cut for that.
        torch._dynamo.config.optimize_ddp = not config.training.fused or config.data.document_mask
    writer = BackgroundWriter()
    cluster = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    trainer = L.Trainer(
        accelerator=kind,
        devices=world // config.training.nodes,
        num_nodes=config.training.nodes,
        strategy=strategy(config),
        precision=config.training.precision,
        max_steps=config.training.steps,
        max_epochs=-1,
        logger=_wandb(config) if config.log.wandb != "off" else False,
        callbacks=[Ending()],
        plugins=[AtomicCheckpointIO(writer, copies=kind == "cuda"), *cluster],
        deterministic=config.training.deterministic,
        default_root_dir=config.out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    one_node = _started_by_hand(trainer) and not {"NODE_RANK", "GROUP_RANK"} & os.environ.keys()
    if config.training.nodes > 1 and one_node:  # it would wait for the others
        raise UserError(
            f"training.nodes is {config.training.nodes}, but nothing started this command on several nodes; put srun "
            "in front of it, or set training.nodes to 1."
        )
    # Lightning's own handlers talk to other processes from inside a signal, which can deadlock, and requeue too early.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    clock = slurm.time_left(config.training.stop_margin) if _rank() == 0 else None
    module = PretrainModule(config, stop, clock, writer, same)
    if tokens.validation is not None:
        held_out = Samples(tokens.validation, config.model, module.model.prefix_ids)
        count = min(config.data.validation_samples, held_out.n_samples)
        if count:
            shares = functools.partial(validation_share, held_out, count, config, trainer)
            module.set_validation(shares, probe_ids(held_out), probe_ids(held_out, LONG_SAMPLES, config.model.context))
    return module, trainer


def _started_by_hand(trainer: L.Trainer) -> bool:
    """Whether no launcher started the processes: the first one starts the others of its node."""
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def validation_share(samples: Samples, count: int, config: RunConfig, trainer: L.Trainer) -> list[Batch]:
    """This process's part of the fixed validation set (its first ``count`` samples), in micro-batches.

    Every process gets as many, because the weights of a sharded model are put together by all for each: what is too few
    is filled up with a sample whose labels do not count.
    """
    share = -(-count // trainer.world_size)
    mine = trainer.global_rank + np.arange(share) * trainer.world_size
    samples.require_unchanged()  # a file cut short would end the process where it is read
    batch = samples.batch(np.minimum(mine, count - 1))
    samples.require_unchanged()
    batch.labels[torch.from_numpy(mine >= count)] = IGNORED
    size = config.training.micro_batch
    return [Batch(batch.ids[i : i + size], batch.labels[i : i + size]) for i in range(0, share, size)]


def probe_ids(samples: Samples, count: int = PROBE_SAMPLES, length: int = PROBE_TOKENS) -> torch.Tensor:
    """Ids [B, T] of the first validation samples, by default cut to a length at which eager attention is cheap."""
    return samples.batch(np.arange(min(count, samples.n_samples))).ids[:, :length]


def _wandb_id(run: Path) -> str:
    return str(read_json(run / "run.json")["wandb_id"])


def _wandb(config: RunConfig) -> WandbLogger:
    """One wandb run across restarts: the same id; offline each attempt is a folder to sync with --append."""
    identity = _wandb_id(Path(config.out)) if _rank() == 0 else None
    if config.log.wandb == "offline":
        os.environ.setdefault("WANDB_SILENT", "true")
    return WandbLogger(
        name=config.name,
        project=config.log.wandb_project,
        id=identity,
        save_dir=config.out,
        offline=config.log.wandb == "offline",
        config=to_dict(config),
        resume="allow" if config.log.wandb == "online" else None,
    )
