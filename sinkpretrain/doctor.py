"""Is everything there that a job needs, before it burns GPU hours: cluster, connections, disk, data, devices."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sinkpretrain import slurm
from sinkpretrain.checkpoint import newest_checkpoint
from sinkpretrain.config import RunConfig
from sinkpretrain.data import Tokens, manifest_beside, open_data
from sinkpretrain.device import total_memory
from sinkpretrain.errors import UserError
from sinkpretrain.files import exclusive
from sinkpretrain.model import without_weights
from sinkpretrain.ranks import Ranks
from sinkpretrain.selftest import self_test
from sinkpretrain.sharding import ShardedStrategy, gathered_for_a_step
from sinkpretrain.signals import launched_rank
from sinkpretrain.tokens import verify
from sinkpretrain.train import accelerator, facts, resolve, strategy, world_size

HELLO_SECONDS = 60
PROBE_BYTES = 64 << 20
BYTES_PER_PARAMETER = 12
"""Of a checkpoint: fp32 weights and AdamW's two moments."""


@dataclass(frozen=True)
class Finding:
    """What a check found. ok is None where there was nothing to check."""

    name: str
    ok: bool | None
    text: str

    def __str__(self) -> str:
        return f"{ {True: 'ok  ', False: 'FAIL', None: '-   '}[self.ok] } {self.name}: {self.text}"


def doctor(config: RunConfig) -> list[Finding]:
    """Check this process's place in the job, and with the others what only all together can show.

    Start it as the training would be started (``srun sinkpretrain doctor`` with the flags of ``train``).

    Returns:
        The findings of this process; those about all processes are rank 0's.
    """
    found = guarded("configuration", describe, config)
    tokens = settled = None
    try:
        tokens = open_data(config.data)
        # One process per node reads all of it: the copies of other nodes are other files.
        if os.environ.get("SLURM_LOCALID", os.environ.get("LOCAL_RANK", "0")) == "0":
            found += guarded("data", check_data, config, tokens)
        settled = resolve(config, tokens)
    except UserError as error:
        found.append(Finding("settings" if tokens else "data", False, str(error)))
    found += guarded("job", check_job, config)
    found += guarded("connections", check_connections, config, settled, tokens)
    if launched_rank() == 0:
        found += guarded("disk", check_disk, settled or config)
    found += guarded("device", check_device, config)
    if settled is not None:
        found += guarded("memory", check_memory, settled)
    found += guarded("attention", check_attention, config)
    return found


def guarded(name: str, check: Callable[..., list[Finding]], *given: Any) -> list[Finding]:
    """The findings of a check; what it raises is one more finding, not the end."""
    try:
        return check(*given)
    except Exception as error:
        return [Finding(name, False, " ".join(str(error).split()) or type(error).__name__)]


def describe(config: RunConfig) -> list[Finding]:
    t = config.training
    text = f"{world_size(config)} processes on {t.nodes} nodes, {accelerator(config)}, {t.precision}, {config.folder}"
    return [Finding("configuration", True, text)]


# --- the job ------------------------------------------------------------------------------------------------------


def check_job(config: RunConfig) -> list[Finding]:
    """Slurm's variables against the configuration; pure but for two questions to the controller."""
    job = slurm.job_id()
    if job is None:
        return [Finding("job", None, "not inside a Slurm job")]
    if "SLURM_STEP_ID" not in os.environ:
        return [Finding("job", False, "inside a job, but not started by srun: put srun in front of the command")]
    wanted = {"SLURM_NNODES": config.training.nodes, "SLURM_NTASKS": world_size(config)}
    found = []
    for name, value in wanted.items():
        said = os.environ.get(name, "")
        setting = "training.nodes" if name == "SLURM_NNODES" else "training.nodes x training.devices"
        found.append(Finding(name, said == str(value), f"{said or 'not set'}; {setting} is {value}"))
    end = slurm.end_time(job)
    left = "no time limit known" if end is None else f"{(end - time.time()) / 60:.0f} minutes left"
    found.append(Finding("time limit", end is not None, left))
    if launched_rank() == 0:
        found.append(_requeue_allowed(job))
    return found


def _requeue_allowed(job: str) -> Finding:
    answer = slurm.show(job)
    if answer is None:
        return Finding("requeue", False, "scontrol does not answer here: a job cannot go back into the queue by itself")
    allowed = " Requeue=1" in answer
    return Finding("requeue", allowed, "allowed" if allowed else "not allowed: submit with --requeue")


# --- connections --------------------------------------------------------------------------------------------------


def check_connections(config: RunConfig, settled: RunConfig | None, tokens: Tokens | None) -> list[Finding]:
    """Rank 0's port, a hello among all processes over gloo, and over NCCL on GPUs; then whether all are the same."""
    place = _place(config)
    if place is None:
        return [Finding("connections", None, "one process: start it with srun to test what connects several")]
    rank, size, address, port = place
    if rank == 0:
        _require_free(address, port)
    started = time.perf_counter()
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=HELLO_SECONDS))
    try:
        nodes = [None] * size
        dist.all_gather_object(nodes, socket.gethostname())
        text = f"{size} processes on {len(set(nodes))} nodes met at {address}:{port}"
        found = [Finding("hello", True, f"{text} in {time.perf_counter() - started:.1f} s")]
        if settled is not None and tokens is not None:
            Ranks(HELLO_SECONDS).require_same(facts(settled, tokens, newest_checkpoint(Path(settled.out))))
            found.append(Finding("same everywhere", True, "settings, data, code and versions"))
        if accelerator(config) == "cuda":
            found.append(_nccl(rank, size))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return found


def _place(config: RunConfig) -> tuple[int, int, str, int] | None:
    """Rank, number of processes, rank 0's address and port, as the launcher says; None for a single process."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return (rank, size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if size > 1 else None
    if "SLURM_STEP_ID" not in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return None
    slurm_environment = SLURMEnvironment(auto_requeue=False)
    rank, size = slurm_environment.global_rank(), slurm_environment.world_size()
    return rank, size, slurm_environment.main_address, slurm_environment.main_port


def _require_free(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UserError(
                f"port {port} of {address} is taken by another program; export another MASTER_PORT."
            ) from error


def _nccl(rank: int, size: int) -> Finding:
    """Sum one number per process, and 64 MB for the speed."""
    device = torch.device("cuda", int(os.environ.get("SLURM_LOCALID", os.environ.get("LOCAL_RANK", "0"))))
    torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=HELLO_SECONDS))
    ones = torch.full((PROBE_BYTES // 4,), float(rank), device=device)
    dist.all_reduce(ones, group=group)
    torch.cuda.synchronize()
    right = bool((ones == size * (size - 1) / 2).all())
    started = time.perf_counter()
    for _ in range(5):
        dist.all_reduce(ones, group=group)
    torch.cuda.synchronize()
    speed = 5 * PROBE_BYTES * 2 * (size - 1) / size / (time.perf_counter() - started) / 1e9
    return Finding("NCCL", right, f"{'right' if right else 'WRONG'} sums, {speed:.1f} GB/s bus bandwidth")


# --- disk and data ------------------------------------------------------------------------------------------------


def check_disk(config: RunConfig) -> list[Finding]:
    """Space for the checkpoints that will lie there at once, if it is known how large the model is; speed of writing,
    renaming and locks."""
    folder = Path(config.out or "runs").absolute()
    while not folder.is_dir():
        folder = folder.parent
    found = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
        speed = write_speed(Path(scratch) / "probe")
        with exclusive(Path(scratch) / "lock", "the lock is held", patience=0):
            found.append(Finding("locks", True, f"files can be locked and renamed in {folder}"))
    if config.model.tokenizer_size:
        parameters = without_weights(config.model, config.sink).n_parameters()
        need, free = needed_bytes(config, parameters), shutil.disk_usage(folder).free
        text = f"{free / 1e9:,.1f} GB free in {folder}, the run will need up to {need / 1e9:,.1f} GB"
        found.append(Finding("space", free > need, text))
        seconds = BYTES_PER_PARAMETER * parameters / speed
        found.append(Finding("write speed", True, f"{speed / 1e6:,.0f} MB/s: {seconds:,.1f} s for a checkpoint"))
    return found


def needed_bytes(config: RunConfig, parameters: int) -> int:
    """Most bytes that a run has on disk at once: checkpoints, one more while it is written, and weights for good."""
    log, steps = config.log, config.training.steps
    doublings = (steps // log.checkpoint_every).bit_length() if log.keep_doubling and log.checkpoint_every else 0
    weights = 11 + (steps // log.weights_every if log.weights_every else 0)
    return parameters * (BYTES_PER_PARAMETER * (log.keep + doublings + 1) + 4 * weights)


def write_speed(path: Path) -> float:
    """Bytes per second, synced to disk; raises UserError if the folder cannot be written."""
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return PROBE_BYTES / (time.perf_counter() - started)


def check_data(config: RunConfig, tokens: Tokens) -> list[Finding]:
    """Every byte of the data against the manifest's hashes, also of what is validated on from elsewhere."""
    size = f"{tokens.train.n_tokens:,} tokens to train on"
    found = [_as_written("data", size, None if tokens.manifest is None else Path(config.data.path))]
    other = tokens.validation
    if other is not None and config.data.validation_path:
        known = manifest_beside(other) is not None
        size = f"{other.n_tokens:,} tokens to validate on"
        found.append(_as_written("validation", size, other.prefix.parent if known else None, other.prefix.name))
    return found


def _as_written(name: str, size: str, folder: Path | None, split: str = "") -> Finding:
    """Whether a prepared folder, or one split of it, is as it was written; no folder is one without a manifest."""
    if folder is None:
        return Finding(name, True, f"{size}; no manifest to check them against")
    started = time.perf_counter()
    problems = verify(folder, split)
    text = " ".join(problems) or f"{size}, as they were written (checked in {time.perf_counter() - started:.1f} s)"
    return Finding(name, not problems, text)


# --- device -------------------------------------------------------------------------------------------------------


def check_device(config: RunConfig) -> list[Finding]:
    """GPUs that the configuration needs, and whether they compute in its precision."""
    if accelerator(config) == "cpu":
        return [Finding("device", True, f"cpu, {torch.get_num_threads()} threads")]
    seen, wanted = torch.cuda.device_count(), world_size(config) // config.training.nodes
    # Slurm may show every task its own GPU only.
    enough = seen >= wanted or (seen >= 1 and "SLURM_STEP_ID" in os.environ)
    found = [Finding("GPUs", enough, f"{seen} seen, {wanted} per node wanted ({torch.cuda.get_device_name()})")]
    if config.training.precision.startswith("bf16"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        found.append(
            Finding("bf16", native, "supported" if native else "not supported: use training.precision 32-true")
        )
    return found


def check_memory(config: RunConfig) -> list[Finding]:
    """Whether a GPU holds what every run of a resolved configuration keeps there, before a single activation."""
    memory = total_memory(torch.device(accelerator(config)))
    if memory is None:
        return []
    need = held_bytes(config, memory)
    text = f"{need / 2**30:,.2f} of {memory / 2**30:,.1f} GiB for weights, gradients and the optimizer's moments"
    return [Finding("memory", need < memory, f"{text}; activations come on top")]


def held_bytes(config: RunConfig, memory: int) -> float:
    """Bytes that are certainly kept on a device of this memory, however small the passes are.

    A parameter has its weight, gradient and two moments in the weights' precision. Where the model is sharded a device
    has its share of these, and the whole weights besides while they are gathered for a step.
    """
    parameters = without_weights(config.model, config.sink).n_parameters()
    size = {"64-true": 8, "bf16-true": 2}.get(config.training.precision, 4)
    if not isinstance(strategy(config), ShardedStrategy):
        return 4 * size * parameters
    world, whole = world_size(config), gathered_for_a_step(parameters, memory, config.training.gather)
    return size * parameters * (1 + 3 / world if whole else 4 / world)


def check_attention(config: RunConfig) -> list[Finding]:
    """The mechanism on the device's own kernels against the plain definition in fp32, and what the future leaks."""
    r = self_test(config, accelerator(config))
    near = r.output < r.limits[0] and r.gradient < r.limits[1]
    limits = f"limits {r.limits[0]:.0e} and {r.limits[1]:.0e}"
    text = f"output {r.output:.1e} and gradient {r.gradient:.1e} from plain attention in fp32 ({limits})"
    found = [Finding("attention", near, text)]
    if r.without_mechanism is not None:
        text = f"without the mechanism the output would be {r.without_mechanism:.1e} off: if it is dropped, that shows"
        found.append(Finding("sink", r.without_mechanism > 2 * r.limits[0], text))
    text = f"a changed token changes what stands before it by {r.leak:.1e}, itself and what follows by {r.reach:.1e}"
    return [*found, Finding("causality", r.leak == 0 and r.reach > 0, text)]
