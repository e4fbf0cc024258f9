"""Sharded training: the same losses, the same checkpoints, whatever the strategy and the number of processes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from data_factory import make_data
from forked import Forks
from test_train import checkpoint, config, record, run_command, run_two, same, stop_after
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from sinkpretrain.config import ModelConfig, RunConfig, SinkConfig, load_yaml, recipe_path
from sinkpretrain.errors import UserError
from sinkpretrain.load import load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.sharding import ShardedStrategy, gathered_for_a_step
from sinkpretrain.train import OneStreamDDP, strategy, train

STEPS = 6


def small(data: Path, out: Path, gather: str) -> RunConfig:
    """Three heads over two processes: sink parameters of [3, 16] are sliced unevenly. Clipping is in effect, and each
    process's four samples take two passes. Of 13 validation samples in passes of three, one process has two passes to
    score and the other three."""
    base = config(data, out, steps=STEPS, gather=gather)
    return dataclasses.replace(
        base,
        model=ModelConfig(n_layer=2, d_model=48, n_head=3, context=32),
        sink=SinkConfig("key_value_bias"),
        data=dataclasses.replace(base.data, validation_samples=13),
        optimizer=dataclasses.replace(base.optimizer, clip=0.1),
        log=dataclasses.replace(base.log, every=2, validate_every=3, probe_every=3, checkpoint_every=3),
    )


FSDP = ("--training.strategy", "fsdp")


def agree(run: Path, reference: Path) -> None:
    """Losses, norms and measures as recorded; moments of every parameter, so that none can have changed places."""
    for ours, theirs in zip(record(run), record(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if key != "uniform_floor" and not isinstance(value, str):
                assert value == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (key, ours["step"])
    left, right = (checkpoint(r, STEPS)["optimizer_states"][0] for r in (run, reference))
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for number, state in right["state"].items():
        for name, want in state.items():
            got = left["state"][number][name]
            assert got.shape == want.shape
            assert ((got - want).norm() / want.norm().clamp_min(1e-12)).item() < 1e-3, (number, name)


@pytest.mark.parametrize("gather", ["step", "block"])
def test_sharded_equals_plain_and_checkpoints_move(gather: str, forks: Forks, tmp_path: Path, monkeypatch) -> None:
    """Two gloo processes with a slice each against one process with everything; stopped under one, resumed under the
    other, both ways; and resumed sharded to the last bit."""
    data = make_data(tmp_path / "data")

    def run(name: str) -> RunConfig:
        return small(data, tmp_path / name, gather)

    train(run("plain"))
    if gather == "step":  # one process that starts the other, as a user has it
        done = run_command(run("sharded"), tmp_path / "a", "--training.devices", "2", *FSDP)
        assert done.returncode == 0, done.stderr
    else:
        run_two(forks, run("sharded"), tmp_path / "a", *FSDP)
    agree(tmp_path / "sharded", tmp_path / "plain")
    kept = [load_model(p) for p in sorted((tmp_path / "sharded" / "weights").iterdir())]
    assert [m.step for m in kept] == [0, 1, 2, 4, 6]
    if gather == "block":
        return  # what is on disk is the same

    run_two(forks, run("half"), tmp_path / "b", *FSDP, stop=3)
    shutil.copytree(tmp_path / "half", tmp_path / "moved")
    run_two(forks, run("half"), tmp_path / "b", *FSDP)
    assert same(tmp_path / "half", tmp_path / "sharded", STEPS)
    assert train(run("moved")).finished
    agree(tmp_path / "moved", tmp_path / "plain")

    with monkeypatch.context() as m:
        stop_after(3, m)
        train(run("back"))
    run_two(forks, run("back"), tmp_path / "c", *FSDP)
    agree(tmp_path / "back", tmp_path / "plain")


class Collectives(TorchDispatchMode):
    """Counts the exchanges between processes by their names in torch's c10d."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_processes_pretended() -> Iterator[None]:
    """A process group of two whose collectives send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("gather", "of_a_block", "of_the_rest"), [("step", (1, 1), (1, 1)), ("block", (6, 3), (3, 3))])
def test_exchanges_of_a_step(
    gather: str,
    of_a_block: tuple[int, int],
    of_the_rest: tuple[int, int],
    tiny: ModelConfig,
    two_processes_pretended: None,
) -> None:
    """Gathered for a step: one exchange of weights and one of gradients per unit, however many passes. By the block:
    a gathering in each forward and each backward pass, except for what is outside the blocks."""
    model = GPTNeoX(tiny, SinkConfig("vanilla"))
    plan = ShardedStrategy(2, timedelta(seconds=9), gather)
    plan.parallel_devices = [torch.device("cpu")]
    plan.shard(model, init_device_mesh("cpu", (2,)))
    ids = torch.randint(0, tiny.tokenizer_size, (2, 16))
    with Collectives() as seen:
        for last in (False, False, True):
            with contextlib.nullcontext() if last else plan.block_backward_sync():
                hidden = model.hidden(ids, model.causal(16, ids.device))  # as in training
                (hidden @ model.head.weight.T).sum().backward()
    assert all(isinstance(p.grad, DTensor) for p in model.parameters() if p.requires_grad)
    gathered, reduced = (tiny.n_layer * block + rest for block, rest in zip(of_a_block, of_the_rest, strict=True))
    assert seen.counts == {"_allgather_base_": gathered, "_reduce_scatter_base_": reduced}


def test_gathered_for_a_step_where_memory_allows() -> None:
    def auto(parameters: float, gib: int | None) -> bool:
        return gathered_for_a_step(int(parameters), gib and gib * 2**30)

    assert auto(1.0e9, 80)
    assert auto(2.8e9, 80)
    assert not auto(6.9e9, 80)
    assert not auto(1.4e9, 24)
    assert auto(6.9e9, None)
    assert gathered_for_a_step(10**12, 1, "step")
    assert not gathered_for_a_step(1, 10**12, "block")


def test_which_strategy(tmp_path: Path) -> None:
    def chosen(model: str, **training: object) -> str:
        base = load_yaml(RunConfig, recipe_path(model))
        training = {"accelerator": "cpu", "devices": 2} | training
        base = dataclasses.replace(base, training=dataclasses.replace(base.training, **training))
        return type(strategy(base)).__name__

    assert chosen("pythia-410m") == OneStreamDDP.__name__
    assert chosen("pythia-1b") == "ShardedStrategy"
    assert chosen("pythia-1b", devices=1) == "str"
    assert chosen("pythia-1b", strategy="ddp") == OneStreamDDP.__name__
    assert chosen("pythia-160m", strategy="fsdp") == ShardedStrategy.__name__
    with pytest.raises(UserError, match="64-true"):
        chosen("pythia-1b", precision="64-true")


@pytest.mark.parametrize("sink", ["vanilla", "key_value_bias"])
def test_blocks_compile_once(sink: str, tiny: ModelConfig) -> None:
    """Under sharding each block is compiled by itself; one graph must serve all of them, or large models would take
    minutes to start and more than eight blocks would be refused."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net = GPTNeoX(dataclasses.replace(tiny, n_layer=10), SinkConfig(sink))
    for block in net.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    net(torch.randint(0, 96, (2, 48)))
    assert len(graphs) == 1
