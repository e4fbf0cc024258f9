"""What a sink mechanism is: the hooks through which it takes part in attention.

A mechanism has five hooks, each of which may stay as it is:

* ``prefix_ids``: tokens in front of every training sample.
* ``values``: what happens to the values before they are mixed; ``output``: to a head's output, before the projection.
  Both read the layer's normed input. ``model.Attention`` applies them, so whoever runs a model has them.
* ``column``: one more column in the softmax of every head. With a the scaled logits, l_i = logsumexp_j a_ij and o_i the
  ordinary output, a column with logit s_i and value v' gives

      out_i = g_i * o_i + (1 - g_i) * v',     g_i = sigmoid(l_i - s_i)

* ``weigh``: another normalisation than a softmax, from logits to weights.

``sinkpretrain.attention`` applies the last two in training, streaming and decoding alike. The package's
mechanisms are in ``sinkpretrain.sinks``; one of your own may be in any module (``sinkpretrain.outside``).

What is called is not always a whole sample: a stream hands over a block or a single token, with the keys that its cache
holds in any order. A hook therefore treats every token by what is given of it, not by its place among the others, and
computes nothing from a tensor that is not in its mechanism's state. ``sinkpretrain.hooks`` looks after that before a
run begins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sinkpretrain.config import ModelConfig

Weigh = Callable[[Tensor, Tensor], Tensor]
"""(scaled logits [B, H, T, S], visible, bool [..., T, S]) -> weights [B, H, T, S], 0 where a key is not visible."""

NOTHING = "nothing"


class Column(NamedTuple):
    """One extra softmax column.

    logit: s_i, fp32, broadcastable to [B, H, T].
    value: v', [H, D], or None for zeros.
    """

    logit: Tensor
    value: Tensor | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The ids a prefix can be made of: text uses 0 .. text_size - 1, the rows up to padded_size are spare."""

    text_size: int
    padded_size: int


class Mechanism(nn.Module):
    """Base class and vanilla behaviour: every hook does nothing. One instance sits in every attention layer.

    Subclasses take their options as keyword arguments after the model's configuration, each with a default that is a
    bool, int, float or string, and a recipe's value must be of that type. ``kept`` says what a stream has to keep for
    the mechanism, beside the cache.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    kept: ClassVar[str] = NOTHING

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()

    @classmethod
    def uses(cls, hook: str) -> bool:
        """Whether this mechanism does anything in the hook of this name."""
        return getattr(cls, hook) is not getattr(Mechanism, hook)

    @property
    def adds_column(self) -> bool:
        """Whether this mechanism's softmax has a column more than there are keys."""
        return self.uses("column")

    @property
    def weigher(self) -> Weigh | None:
        """``weigh`` of a mechanism that normalises in its own way, None for a softmax."""
        return self.weigh if self.uses("weigh") else None

    def init_weights(self, generator: torch.Generator, std: float) -> None:
        """Draw what does not start as a constant, all of it from the generator; ``std`` is that of the model's other
        matrices (small_init)."""

    def prefix_ids(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Ids in front of every training sample, and once in front of a stream."""
        return ()

    def values(self, x_BTC: Tensor, v_BHTD: Tensor) -> Tensor:
        """The values that attention mixes and a cache keeps."""
        return v_BHTD

    def column(self, q_BHTD: Tensor, seen: Tensor) -> Column | None:
        """The extra column, or None.

        Args:
            q_BHTD: queries, rotated to their positions (slots in the cache, when streaming); in 16 bits or fp32,
                whatever the parameters are: the logit is computed in fp32, with no product that autocast would round.
            seen: how many keys each query sees, its own included; integer, broadcastable to [B, H, T].
        """
        return None

    def slot(self) -> tuple[Tensor, Tensor] | None:
        """The column as a key and a value [H, D] in front of the sequence, where it is equal to such; else None."""
        return None

    def weigh(self, logits_BHTS: Tensor, visible: Tensor) -> Tensor:
        """Weights of the keys instead of a softmax's; see ``Weigh``. What is not visible may hold any finite logit, or
        be left out."""
        raise NotImplementedError

    def output(self, x_BTC: Tensor, o_BHTD: Tensor) -> Tensor:
        """The heads' outputs as they go into the output projection."""
        return o_BHTD


REGISTRY: dict[str, type[Mechanism]] = {}


def register(cls: type[Mechanism]) -> type[Mechanism]:
    """Make a mechanism of the package known by its name.

    Raises:
        TypeError: what it declares cannot be used.
    """
    if cls.name in REGISTRY:
        raise TypeError(
            f"two sink mechanisms are called {cls.name!r}: {REGISTRY[cls.name].__qualname__} and {cls.__qualname__}; "
            "rename one of them."
        )
    require_usable(cls)
    REGISTRY[cls.name] = cls
    return cls


def require_usable(cls: type[Mechanism]) -> None:
    """Check what a mechanism declares; raises TypeError."""
    if cls.uses("column") and cls.uses("weigh"):
        raise TypeError(f"{cls.__qualname__} fills both column and weigh; a column belongs to a softmax, so fill one.")
    if len(inspect.signature(cls.__init__).parameters) < 2:
        raise TypeError(f"the constructor of {cls.__qualname__} must take the model's configuration first.")
    for option, default in options(cls).items():
        if type(default) not in (bool, int, float, str):
            raise TypeError(
                f"the option {option} of {cls.__qualname__} needs a default that is a bool, int, float or string."
            )
    for said in ("name", "summary", "source"):
        if not isinstance(getattr(cls, said, None), str):
            raise TypeError(f"{cls.__qualname__} has no {said}; give the class one, a string.")


def options(cls: type[Mechanism]) -> dict[str, Any]:
    """Names and defaults of a mechanism's options, which its constructor takes after the model's configuration."""
    return {p.name: p.default for p in list(inspect.signature(cls.__init__).parameters.values())[2:]}
