"""Mechanisms that do not keep to their hooks are refused before a run begins, in a sentence that names the hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, refusal
from data_factory import make_data
from torch import Tensor, nn

from sinkpretrain import sinks
from sinkpretrain.config import SinkConfig, recipe_path
from sinkpretrain.errors import UserError
from sinkpretrain.hooks import check_hooks
from sinkpretrain.mechanism import REGISTRY, Column, Mechanism, register
from sinkpretrain.model import GPTNeoX

CONFIG = TINY.resolved()  # 4 heads of 16


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """What a test registers goes with it."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


class Scaled(Mechanism):
    """A parameter for the hooks to use, with a start that hides what it does."""

    name = summary = source = "mine"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.scale = nn.Parameter(torch.ones(model.n_head))
        self.key = nn.Parameter(torch.zeros(model.n_head, model.head_dim))


def with_hooks(**hooks: Callable[..., Any]) -> SinkConfig:
    register(type("Mine", (Scaled,), hooks))
    return SinkConfig("mine")


def softmax(logits: Tensor, visible: Tensor) -> Tensor:
    return logits.masked_fill(~visible, float("-inf")).softmax(-1)


def first_scaled(self: Scaled, x: Tensor, heads: Tensor) -> Tensor:
    return torch.cat((heads[:, :, :1] * self.scale.to(heads.dtype)[:, None, None], heads[:, :, 1:]), dim=2)


def logit(self: Scaled) -> Tensor:
    return self.scale.float()[:, None]


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "scales the first of what it is given": ("values", first_scaled, "other tokens stand around it"),
    "scales the first output": ("output", first_scaled, "other tokens stand around it"),
    "scales by the length": ("values", lambda s, x, v: v * x.shape[1], "other tokens stand around it"),
    "turns the axes": ("output", lambda s, x, o: o.transpose(1, 2), r"makes a tensor \[3, 5, 4, 16\] of heads"),
    "returns nothing": ("output", lambda s, x, o: None, "makes a NoneType of heads"),
    "widens": ("values", lambda s, x, v: v.double(), "makes torch.float64 of torch.float32"),
    "values in fp32 under autocast": (
        "values",
        lambda s, x, v: v * s.scale[:, None, None],
        "makes torch.float32 of torch.bfloat16",
    ),
    "a logit without a place for queries": (
        "column",
        lambda s, q, seen: Column(s.scale.float()),
        r"a logit \[4\], which does not broadcast to \[3, 4, 5\]",
    ),
    "a logit per dimension": ("column", lambda s, q, seen: Column(q.float()), "does not broadcast"),
    "a logit in 16 bits": ("column", lambda s, q, seen: Column(logit(s).half()), "a logit of torch.float16"),
    "no logit": ("column", lambda s, q, seen: Column(0.0), "neither None nor a Column"),
    "no column": ("column", lambda s, q, seen: logit(s), "neither None nor a Column"),
    "a value for all heads": (
        "column",
        lambda s, q, seen: Column(logit(s), q.new_ones(q.shape[-1])),
        r"a value \[16\]; it must be \[4, 16\]",
    ),
    "a product in the dtype of its inputs": (
        "column",
        lambda s, q, seen: Column((q @ s.key[0]).float()),
        "fails on torch.bfloat16 queries where parameters are torch.float32",
    ),
    "a product that autocast rounds": (
        "column",
        lambda s, q, seen: Column((q.float() @ s.key.float().mT).mean(-1).float()),
        "rounds its logit where autocast is on",
    ),
    "a logit of the first query": (
        "column",
        lambda s, q, seen: Column(logit(s) + torch.arange(q.shape[2]).eq(0).float()),
        "other queries stand around it",
    ),
    "a column now and then": (
        "column",
        lambda s, q, seen: Column(logit(s)) if q.shape[2] > 3 else None,
        "other queries stand around it",
    ),
    "attends to the future": ("weigh", lambda s, a, visible: a.sigmoid(), "keys that are not visible"),
    "counts the future": (
        "weigh",
        lambda s, a, visible: softmax(a, visible) / a.exp().sum(-1, keepdim=True),
        "keys that are not visible",
    ),
    "one head for all": ("weigh", lambda s, a, visible: softmax(a, visible)[:, :1], "of logits"),
    "drops the first key": (
        "weigh",
        lambda s, a, visible: softmax(a, visible) * torch.arange(a.shape[-1]).ne(0),
        "by their order",
    ),
    "divides by all keys": ("weigh", lambda s, a, visible: softmax(a, visible) / a.shape[-1], "hidden keys"),
    "a misspelt method": (
        "column",
        lambda s, q, seen: Column(seen.logg()),
        r"fails .*\(AttributeError: 'Tensor' object has no attribute 'logg'\)",
    ),
    "ids of nothing": ("prefix_ids", lambda s, vocabulary: {}[0], r"fails when asked \(KeyError: 0\)"),
    "weights of nothing": (
        "init_weights",
        lambda s, generator, std: s.nothing.zero_(),
        r"fails when a model is made \(AttributeError: ",
    ),
    "a list of ids": ("prefix_ids", lambda s, vocabulary: [3], "no tuple of ids"),
    "ids beyond the embedding": ("prefix_ids", lambda s, vocabulary: (vocabulary.padded_size,), r"gives \(128,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_hooks_that_do_something_else_are_refused(case: str) -> None:
    hook, function, sentence = WRONG[case]
    with pytest.raises(UserError, match=rf"the hook {hook} of mine .*({sentence})"):
        check_hooks(with_hooks(**{hook: function}), CONFIG)


RIGHT: dict[str, dict[str, Callable[..., Any]]] = {
    "values": {"values": lambda s, x, v: v * s.scale.to(v.dtype)[:, None, None]},
    # Autocast rounds it on its way into the projection.
    "an output in fp32 under autocast": {"output": lambda s, x, o: o * s.scale[:, None, None]},
    "column": {"column": lambda s, q, seen: Column((q.float() * s.key.float()[:, None]).sum(-1) + seen.float().log())},
    "no column": {"column": lambda s, q, seen: None},
    "weigh": {"weigh": lambda s, a, visible: s.scale[:, None, None] * softmax(a, visible)},
    "prefix_ids": {"prefix_ids": lambda s, vocabulary: (3, vocabulary.text_size)},
}


@pytest.mark.parametrize("case", RIGHT)
def test_hooks_that_keep_to_it_are_taken(case: str) -> None:
    check_hooks(with_hooks(**RIGHT[case]), CONFIG)


def test_the_mechanisms_keep_to_their_hooks(mechanism: SinkConfig) -> None:
    before = torch.get_rng_state()
    check_hooks(mechanism, CONFIG)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", ["attribute", "forgotten buffer"])
def test_what_no_file_of_weights_would_hold_is_refused(how: str) -> None:
    """A model that is loaded has no values for it."""

    def init(self: Scaled, model: Any) -> None:
        Scaled.__init__(self, model)
        if how == "attribute":
            self.fixed = torch.ones(model.n_head)
        else:
            self.register_buffer("fixed", torch.ones(model.n_head), persistent=False)

    with pytest.raises(UserError, match=r"the tensor fixed of mine is in no file of weights"):
        check_hooks(with_hooks(__init__=init), CONFIG)


def test_a_start_that_no_seed_repeats_is_refused() -> None:
    def init(self: Scaled, model: Any) -> None:
        Scaled.__init__(self, model)
        self.linear = nn.Linear(model.head_dim, 1)

    def init_weights(self: Any, generator: torch.Generator, std: float) -> None:
        self.linear.weight.normal_(0.0, std, generator=generator)
        self.linear.bias.zero_()

    with pytest.raises(
        UserError, match=r"the hook init_weights of mine leaves linear\.(weight|bias) as torch draws it"
    ):
        check_hooks(with_hooks(__init__=init), CONFIG)
    del REGISTRY["mine"]
    check_hooks(with_hooks(__init__=init, init_weights=init_weights), CONFIG)


def test_train_refuses_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_hooks(values=first_scaled)
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    words = ["train", "--config", str(recipe_path("demo")), "--data.path", str(data), "--out", str(run)]
    error = refusal([*words, "--sink.mechanism", "mine"], capsys)
    assert "the hook values of mine" in error
    assert not run.exists()


# --- what a class declares ------------------------------------------------------------------------------------------


def test_two_mechanisms_of_one_name_are_told_apart() -> None:
    with pytest.raises(TypeError, match=r"two sink mechanisms are called 'zero_sink': ZeroSink and Mine; rename one"):
        register(type("Mine", (Mechanism,), {"name": "zero_sink"}))
    assert REGISTRY["zero_sink"] is sinks.ZeroSink


def test_a_column_without_a_softmax_is_no_column() -> None:
    with pytest.raises(TypeError, match="fills both column and weigh"):
        with_hooks(column=lambda s, q, seen: Column(logit(s)), weigh=lambda s, a, visible: softmax(a, visible))


def test_options_need_a_default_of_a_type_that_recipes_have() -> None:
    """Otherwise every value is refused for its type, and ``list`` cannot make the mechanism."""

    def required(self: Mechanism, model: Any, n: int) -> None: ...
    def unknown(self: Mechanism, model: Any, n: int | None = None) -> None: ...
    def many(self: Mechanism, model: Any, n: tuple[int, ...] = (1,)) -> None: ...
    def open_ended(self: Mechanism, model: Any, **n: int) -> None: ...

    for init in (required, unknown, many, open_ended):
        with pytest.raises(TypeError, match="the option n of Mine needs a default"):
            register(type("Mine", (Mechanism,), {"name": "mine", "__init__": init}))


@pytest.mark.parametrize(
    "sink",
    [("off_by_c", "c", float("inf")), ("clipped_softmax", "zeta", float("nan")), ("sink_logit", "init_std", 1e999)],
)
def test_options_that_are_no_numbers_are_refused(sink: tuple[str, str, float]) -> None:
    name, option, value = sink
    with pytest.raises(UserError, match=rf"sink.options.{option} must be a finite number, not {value}"):
        GPTNeoX(TINY, SinkConfig(name, {option: value}))
