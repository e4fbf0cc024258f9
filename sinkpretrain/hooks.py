"""Whether a mechanism keeps to what its hooks promise, looked at on random numbers before a run begins.

Whoever runs a model calls the hooks with what is at hand: training with whole samples, a stream with a block or a
single token of them, and with keys in the order of a ring. A hook that counts on anything else trains, and then streams
to other numbers; one whose result has a wrong shape may be broadcast to something that nobody meant.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.errors import UserError, first_line
from sinkpretrain.mechanism import Column, Mechanism, Vocabulary

TOLERANCE = 1e-4
"""Relative; products of other sizes are summed in other orders."""
SPREAD = 0.1
"""Of the noise on parameters: a scale that starts at 1, or a gate that starts closed, hides what it does."""
KINDS = (
    (torch.float32, torch.float32, False),
    (torch.float32, torch.bfloat16, True),  # training under autocast
    (torch.float32, torch.bfloat16, False),  # its measures
    (torch.bfloat16, torch.bfloat16, False),
    (torch.bfloat16, torch.float32, False),  # the kernels for one token
)
"""Dtypes of parameters and queries, and whether autocast is on, as ``column`` meets them."""


def check_hooks(sink: SinkConfig, model: ModelConfig) -> None:
    """Call every hook of a mechanism with parts of a sample and in the dtypes that it will meet; takes milliseconds.

    Args:
        sink: the mechanism and its options.
        model: a resolved configuration.

    Raises:
        UserError: a hook does not do what ``sinkpretrain.mechanism`` says of it.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        mechanism = sinks.build(sink, model).eval()
        given = _Given.of(model)
        _check_prefix(mechanism, model)
        _check_state(mechanism, sink, model)
        for parameter in mechanism.parameters():
            parameter.add_(SPREAD * torch.randn(parameter.shape))
        for hook, check in CHECKS.items():
            if mechanism.uses(hook):
                check(mechanism, given)


class _Given(NamedTuple):
    """Inputs of the hooks: normed inputs [B, T, C], values, queries or outputs [B, H, T, D], keys seen [T]; and these
    sizes, B, H, T and D. They differ, so that no axis is taken for another."""

    x: Tensor
    heads: Tensor
    seen: Tensor
    shape: tuple[int, int, int, int]

    @classmethod
    def of(cls, model: ModelConfig) -> _Given:
        H, D = model.n_head, model.head_dim
        B, T = [n for n in (3, 5, 7, 11) if n not in (H, D)][:2]
        heads = torch.randn(B, H, T, D)
        return cls(torch.randn(B, T, model.d_model), heads, torch.arange(1, T + 1), (B, H, T, D))


def _refuse(mechanism: Mechanism, hook: str, what: str) -> UserError:
    return UserError(f"the hook {hook} of {mechanism.name} {what}; sinkpretrain/mechanism.py says what it must do.")


@contextmanager
def _errors_named(mechanism: Mechanism, hook: str, when: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = first_line(error).rstrip(".")
        if not isinstance(error, RuntimeError | TypeError):  # such as KeyError, whose text alone says nothing
            why = f"{type(error).__name__}: {why}"
        raise _refuse(mechanism, hook, f"fails {when} ({why})") from error


def _same(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _check_prefix(mechanism: Mechanism, model: ModelConfig) -> None:
    with _errors_named(mechanism, "prefix_ids", "when asked"):
        ids = mechanism.prefix_ids(Vocabulary(model.tokenizer_size, model.vocab_size))
    if not isinstance(ids, tuple) or any(not 0 <= i < model.vocab_size for i in ids):
        raise _refuse(mechanism, "prefix_ids", f"gives {ids!r}, no tuple of ids from 0 to {model.vocab_size - 1}")


def _check_state(mechanism: Mechanism, sink: SinkConfig, model: ModelConfig) -> None:
    """What a mechanism computes with is in its state, and that starts from the seed alone."""
    kept = mechanism.state_dict().keys()
    for prefix, module in mechanism.named_modules():
        tensors = {k for k, v in vars(module).items() if isinstance(v, Tensor)} | dict(module.named_buffers()).keys()
        for name in (f"{prefix}.{name}".lstrip(".") for name in tensors):
            if name not in kept:
                raise UserError(
                    f"the tensor {name} of {mechanism.name} is in no file of weights; make it a parameter or a buffer "
                    "that is kept (register_buffer), or where it is used."
                )
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = sinks.build(sink, model)
        with _errors_named(mechanism, "init_weights", "when a model is made"):
            other.init_weights(torch.Generator().manual_seed(0), 1.0)
        drawn.append(other.state_dict())
    for name, tensor in drawn[0].items():
        if not torch.equal(tensor, drawn[1][name]):
            raise _refuse(
                mechanism, "init_weights", f"leaves {name} as torch draws it, so that no seed would repeat a run"
            )


def _check_heads(hook: str) -> Callable[[Mechanism, _Given], None]:
    """``values`` and ``output``: heads in, heads out, each token by itself."""

    def check(mechanism: Mechanism, given: _Given) -> None:
        x, heads, cut = given.x, given.heads, given.shape[2] // 2

        def call(mechanism: Mechanism, x: Tensor, heads: Tensor, autocast: bool = False) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got: Any = getattr(mechanism, hook)(x, heads)
            if not isinstance(got, Tensor) or got.shape != heads.shape:
                raise _refuse(mechanism, hook, f"makes {_about(got)} of heads {list(heads.shape)}")
            # Autocast rounds what goes into the projection, but attention wants values like its queries and keys.
            if got.dtype != heads.dtype and not (autocast and hook == "output"):
                raise _refuse(mechanism, hook, f"makes {got.dtype} of {heads.dtype}")
            return got

        with _errors_named(mechanism, hook, "on a part of a sample"):
            whole = call(mechanism, x, heads)
            parts = [call(mechanism, x[:, p], heads[:, :, p]) for p in (slice(cut), slice(cut, None))]
        if not _same(torch.cat(parts, dim=2), whole):
            raise _refuse(
                mechanism, hook, "makes something else of a token when other tokens stand around it, as in a stream"
            )
        with _errors_named(mechanism, hook, "in 16 bits"):
            call(mechanism, x, heads.bfloat16(), autocast=True)
            call(copy.deepcopy(mechanism).bfloat16(), x.bfloat16(), heads.bfloat16())

    return check


def _check_column(mechanism: Mechanism, given: _Given) -> None:
    B, H, T, D = given.shape
    q, seen, cut = given.heads, given.seen, given.shape[2] // 2

    def call(mechanism: Mechanism, q: Tensor, seen: Tensor) -> Tensor:
        got: Any = mechanism.column(q, seen)
        if got is None:
            return torch.full(q.shape[:3], float("-inf"))  # which is no column
        if not isinstance(got, Column) or not isinstance(got.logit, Tensor):
            raise _refuse(mechanism, "column", "gives neither None nor a Column whose logit is a tensor")
        if got.logit.dtype not in (torch.float32, torch.float64):
            raise _refuse(mechanism, "column", f"gives a logit of {got.logit.dtype}; it must be float32")
        wanted = list(q.shape[:3])
        sizes = [1] * (3 - got.logit.dim()) + list(got.logit.shape)
        if len(sizes) > 3 or any(n not in (1, m) for n, m in zip(sizes, wanted, strict=True)):
            raise _refuse(
                mechanism, "column", f"gives a logit {list(got.logit.shape)}, which does not broadcast to {wanted}"
            )
        if got.value is not None and got.value.shape != (H, D):
            raise _refuse(mechanism, "column", f"gives a value {list(got.value.shape)}; it must be [{H}, {D}]")
        return got.logit.expand(q.shape[:3])

    logits = {}
    for parameters, queries, autocast in KINDS:
        when = f"on {queries} queries where parameters are {parameters}"
        with _errors_named(mechanism, "column", when), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits[parameters, queries, autocast] = call(copy.deepcopy(mechanism).to(parameters), q.to(queries), seen)
    if not _same(logits[KINDS[1]], logits[KINDS[2]]):
        raise _refuse(mechanism, "column", "rounds its logit where autocast is on, as it does matrix products")
    with _errors_named(mechanism, "column", "on a part of a sample"):
        whole = call(mechanism, q, seen)
        in_documents = call(mechanism, q, seen.expand(B, 1, T))
        parts = [call(mechanism, q[:, :, p], seen[p]) for p in (slice(cut), slice(cut, None))]
    if not (_same(torch.cat(parts, dim=-1), whole) and _same(in_documents, whole)):
        raise _refuse(
            mechanism, "column", "gives a query another logit when other queries stand around it, as in a stream"
        )


def _check_weigh(mechanism: Mechanism, given: _Given) -> None:
    B, H, T, _ = given.shape
    logits, visible = 2 * torch.randn(B, H, T, T), torch.ones(T, T, dtype=torch.bool).tril()

    def call(logits: Tensor, visible: Tensor) -> Tensor:
        with _errors_named(mechanism, "weigh", "on a part of a sample"):
            got: Any = mechanism.weigh(logits, visible)
        if not isinstance(got, Tensor) or got.shape != logits.shape:
            raise _refuse(mechanism, "weigh", f"makes {_about(got)} of logits {list(logits.shape)}")
        return got

    whole, cut = call(logits, visible), T // 2
    hidden = torch.where(visible, logits, -logits + 1)
    if whole.masked_select(~visible).any() or not _same(call(hidden, visible), whole):
        raise _refuse(mechanism, "weigh", "attends to keys that are not visible, or counts them")
    order = torch.randperm(T)
    others = (
        _same(call(logits[:, :, cut:], visible[cut:]), whole[:, :, cut:]),
        _same(call(logits[:, :, :cut, :cut], visible[:cut, :cut]), whole[:, :, :cut, :cut]),
        _same(call(logits[..., order], visible[:, order]), whole[..., order]),
        _same(call(logits, visible.expand(B, 1, T, T)), whole),
    )
    if not all(others):
        raise _refuse(
            mechanism, "weigh", "weighs keys by their order, or with other queries or hidden keys beside them"
        )


def _about(got: Any) -> str:
    return f"a tensor {list(got.shape)}" if isinstance(got, Tensor) else f"a {type(got).__name__}"


CHECKS: dict[str, Callable[[Mechanism, _Given], None]] = {
    "values": _check_heads("values"),
    "column": _check_column,
    "weigh": _check_weigh,
    "output": _check_heads("output"),
}
