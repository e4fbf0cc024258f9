"""What ``stream`` evaluates: strategies with their cache or window, and what is changed about model and text."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from sinkpretrain.cache import Cache, Positions
from sinkpretrain.errors import SettingHasNoEffect, UserError
from sinkpretrain.language import LanguageModel
from sinkpretrain.scoring import BlockSize, Losses
from sinkpretrain.streaming import Ids, dense_nll, recompute_nll, stream_nll, text_of_window, token_loop_nll

STRATEGIES: tuple[str, ...] = ("streaming", "window", "dense", "recompute", "token-loop")


@dataclass(frozen=True)
class Setting:
    """One row of a results file: a strategy with its cache or window, and what was changed about model and text.

    column: whether a softmax column was left out.
    initial: the id that stands in place of the text's tokens among the first x.
    positions: of a cache.
    stride, sample: of recompute; see ``recompute_nll``.
    resets: whether every document begins with an empty cache.
    """

    strategy: str
    cache: Cache | None = None
    window: int | None = None
    column: Literal["kept", "dropped"] | None = None
    initial: int | None = None
    positions: Positions = "in-cache"
    stride: int = 1
    sample: int = 0
    resets: bool = False

    @property
    def name(self) -> str:
        """Key in the results and name of the folder with the losses."""
        parts = [str(self.cache) if self.cache else self.strategy]
        if self.window:
            parts.append(str(self.window))
        if self.stride > 1:
            parts.append(f"stride-{self.stride}")
        if self.sample:
            parts.append(f"sample-{self.sample}")
        if self.column == "dropped":
            parts.append("nocolumn")
        if self.initial is not None:
            parts.append(f"initial-{self.initial}")
        if self.positions == "absolute":
            parts.append("absolute")
        if self.resets:
            parts.append("documents")
        if self.strategy == "token-loop":
            parts.append(self.strategy)
        return "-".join(parts)

    @property
    def beyond(self) -> int:
        """Tokens after which nothing can be held any more: the losses from there on are "beyond the cache"."""
        return self.window or (self.cache.size if self.cache else 0)

    def highest_position(self, longest: int) -> int:
        """Where the last token of a sequence of ``longest`` tokens stands, sink tokens included."""
        if self.cache is not None and self.positions == "in-cache":
            return min(longest - 1, self.cache.size)
        return min(longest, self.window or longest) - 1

    def run(
        self,
        model: LanguageModel,
        ids: Ids,
        parts: Sequence[slice] | None,
        block: BlockSize,
        advance: Callable[[int], None],
    ) -> Losses:
        """The per-token losses, float32 [tokens - 1]; NaN for a token that is not scored.

        Args:
            parts: of the text, each read with an empty cache.
        """
        how: dict[str, Any] = {"parts": parts, "advance": advance}
        if self.strategy == "dense":
            return dense_nll(model, ids, block=block, **how)
        if self.strategy == "recompute":
            assert self.window is not None
            return recompute_nll(model, ids, self.window, stride=self.stride, sample=self.sample, block=block, **how)
        assert self.cache is not None
        if self.initial is not None:
            ids = with_initial(ids, self.cache.start - len(model.prefix_ids), self.initial)
        how |= {"drop_column": self.column == "dropped", "positions": self.positions}
        if self.strategy == "token-loop":
            return token_loop_nll(model, ids, self.cache, **how)
        return stream_nll(model, ids, self.cache, block=block, **how)


def with_initial(ids: Ids, count: int, by: int) -> Ids:
    """The text with another token in place of each of its first ``count``."""
    replaced = np.array(ids)
    replaced[:count] = by
    return replaced


@dataclass(frozen=True)
class Wanted:
    """What the flags of ``stream`` ask for; see there."""

    cache: str = ""
    strategy: str = "streaming"
    window: int = 0
    stride: int = 1
    sample: int = 0
    positions: Positions = "in-cache"
    resets: bool = False
    initial: int | None = None

    def check(self) -> None:
        """Refuse numbers that mean nothing; raises UserError."""
        if self.window < 0:
            raise UserError(f"--window {self.window} is negative; give a number of tokens, or 0 for the largest cache.")
        if self.stride < 1:
            raise UserError(f"--stride {self.stride} is too small; 1 scores one token per window.")
        if self.sample < 0 or self.sample == 1:
            raise UserError(
                f"--sample {self.sample} is too few for an error bar; give 2 windows or more, or 0 for all."
            )
        if self.initial is not None and self.resets:
            raise UserError("--replace-initial is about the text's beginning; leave --documents reset out.")


def settings_for(model: LanguageModel, wanted: Wanted) -> list[Setting]:
    """The settings that the command line asks for, in order; raises UserError.

    With ``initial``, each cache that keeps tokens of the text's beginning is evaluated a second time, with that id in
    their place (table 1 of StreamingLLM, arXiv 2309.17453: is it their meaning or their position that matters?).
    Without an initial position in the cache, a mechanism with a softmax column can be read in two ways: with its
    column, as trained, or without ("drop the +1 at test time"). Both are evaluated and labelled.
    """
    wanted.check()
    strategies = [s.strip() for s in wanted.strategy.split(",") if s.strip()]
    unknown = [s for s in strategies if s not in STRATEGIES]
    if unknown or not strategies:
        raise UserError(
            f"unknown strategy {unknown[0]!r}; known: {', '.join(STRATEGIES)}." if unknown else "no strategy."
        )
    caches = list(dict.fromkeys(Cache.parse(c) for c in wanted.cache.split(",") if c.strip()))
    size = wanted.window or (max(c.size for c in caches) if caches else model.config.context)
    found: list[Setting] = []
    for strategy in strategies:
        if strategy == "dense":
            found.append(Setting("dense", resets=wanted.resets))
        elif strategy == "recompute":
            found.append(
                Setting(strategy, window=size, stride=wanted.stride, sample=wanted.sample, resets=wanted.resets)
            )
        elif strategy != "window" and not caches:
            raise UserError("no cache given; say for example --cache 0+1024,4+1020.")
        else:
            for cache in [Cache(0, size)] if strategy == "window" else caches:
                found += _readings(model, Setting(strategy, cache, positions=wanted.positions, resets=wanted.resets))
                if wanted.initial is not None and cache.start > len(model.prefix_ids):
                    found.append(replace(found[-1], initial=wanted.initial))
    if wanted.initial is not None and not any(s.initial is not None for s in found):
        raise UserError("--replace-initial needs a cache x+y that keeps tokens of the text: x above the sink tokens.")
    _warn_of_no_effect(found, wanted)
    return list({s.name: s for s in found}.values())


def _readings(model: LanguageModel, setting: Setting) -> list[Setting]:
    """With the mechanism's column, and where no initial position is kept without it."""
    if not model.adds_column:
        return [setting]
    assert setting.cache is not None
    columns: tuple[Literal["kept", "dropped"], ...] = ("kept",) if setting.cache.start else ("kept", "dropped")
    return [replace(setting, column=column) for column in columns]


def _warn_of_no_effect(found: Sequence[Setting], wanted: Wanted) -> None:
    recompute = any(s.strategy == "recompute" for s in found)
    unused = [
        ("--stride", wanted.stride != 1 and not recompute, "recompute"),
        ("--sample", wanted.sample != 0 and not recompute, "recompute"),
        ("--positions", wanted.positions == "absolute" and not any(s.cache for s in found), "those with a cache"),
    ]
    for flag, has_no_effect, strategies in unused:
        if has_no_effect:
            warnings.warn(f"{flag} changes nothing but {strategies}.", SettingHasNoEffect, stacklevel=2)


def check_length(settings: Sequence[Setting], model: LanguageModel, tokens: int, longest: int) -> None:
    """Refuse texts that no cache would have to evict from, and positions that the model does not have.

    Args:
        tokens: of the whole text.
        longest: tokens that are read in one go, sink tokens left out.

    Raises:
        UserError: see above.
    """
    shape = model.config
    for setting in settings:
        if setting.strategy == "recompute" and setting.window:
            text_of_window(model, setting.window, setting.stride)
        if tokens <= max(1, setting.beyond):
            raise UserError(
                f"the text has {tokens:,} tokens, too few for {setting.name}; give a longer text or a smaller cache."
            )
        if setting.beyond >= longest:
            warnings.warn(
                f"no document has more than {longest:,} tokens, so nothing is ever evicted at {setting.name}.",
                SettingHasNoEffect,
                stacklevel=2,
            )
        highest = setting.highest_position(longest + len(model.prefix_ids))
        if model.learned_positions is not None and highest >= model.learned_positions:
            raise UserError(
                f"{setting.name} needs the position {highest:,}, but this model has learned "
                f"{model.learned_positions:,} of them, from 0; give a smaller cache, or positions in the cache."
            )
    far = [s.name for s in settings if s.highest_position(longest + len(model.prefix_ids)) > shape.context]
    if far:
        warnings.warn(
            f"{', '.join(far)}: positions beyond the {shape.context:,} that the model was trained with.", stacklevel=2
        )
