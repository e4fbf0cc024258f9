"""Small models with peaked attention: a model at its initial weights attends almost evenly and hides mistakes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # decides at import whether kernels run on a CPU

from forked import Forks

from sinkpretrain.cli import main
from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.model import GPTNeoX

TINY = ModelConfig(n_layer=3, d_model=64, n_head=4, vocab_size=128, tokenizer_size=96, context=64)

# Models this small gain nothing from a second thread, and lose much where cores are shared.
torch.set_num_threads(1)

MECHANISMS = {
    "vanilla": SinkConfig("vanilla"),
    "sink_tokens_1": SinkConfig("sink_tokens", {"n": 1}),
    "sink_tokens_2": SinkConfig("sink_tokens", {"n": 2}),
    "sink_tokens_4": SinkConfig("sink_tokens", {"n": 4}),
    "fixed_first_token": SinkConfig("fixed_first_token", {"id": 3}),
    "zero_sink": SinkConfig("zero_sink"),
    "off_by_c": SinkConfig("off_by_c", {"c": 3.0}),
    "sink_logit": SinkConfig("sink_logit"),
    "key_bias": SinkConfig("key_bias"),
    "sink_logit_normal": SinkConfig("sink_logit", {"per_head": False, "init_std": 1.0}),
    "key_value_bias": SinkConfig("key_value_bias"),
    "value_bias": SinkConfig("value_bias"),
    "stable_mask": SinkConfig("stable_mask", {"decay": 0.9}),
    "output_gate": SinkConfig("output_gate"),
    "output_gate_elementwise": SinkConfig("output_gate", {"elementwise": True}),
    "value_gate": SinkConfig("value_gate"),
    "sigmoid_attention": SinkConfig("sigmoid_attention"),
    "softpick": SinkConfig("softpick"),
    "clipped_softmax": SinkConfig("clipped_softmax", {"zeta": 1.05}),
}


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says to a mistake: one line on stderr, and code 2."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    return error


def peaked(model: GPTNeoX, factor: float = 10.0, seed: int = 7) -> GPTNeoX:
    """Scale query and key weights up so that attention is far from uniform, and give biases and norms values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("attn.qkv.weight"):
                p[: 2 * p.shape[1]] *= factor**0.5
            if p.dim() == 1 and ".sink." not in name:
                p += 0.1 * torch.randn(p.shape, generator=generator)
        # Behind the others, whose values then do not depend on the mechanism.
        for name, p in model.named_parameters():
            if ".sink." in name:
                p += torch.randn(p.shape, generator=generator)
    return model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that mostly wait come first, so that others run beside them instead of after them."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure on a GPU is shown at once: a machine that is lent for minutes may be gone before the summary."""
    if report.failed and "gpu" in report.keywords:
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from run_factory import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(params=list(MECHANISMS))
def mechanism(request: pytest.FixtureRequest) -> SinkConfig:
    return MECHANISMS[request.param]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
