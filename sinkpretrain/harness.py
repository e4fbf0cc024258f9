"""A model of this project as lm-evaluation-harness wants one: sinks in front of every window, exactly once.

The harness puts a prefix into the first window of a rolling text only, and knows nothing of sink tokens. Here every
sequence that goes through the model is the model's prefix and then text, and the two together never exceed its context.
Without a prefix the numbers are those of the harness's own ``HFLM``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from torch import Tensor

from sinkpretrain.cache import Cache
from sinkpretrain.decode import Engine
from sinkpretrain.errors import UserError
from sinkpretrain.language import LanguageModel
from sinkpretrain.progress import without_bars_of_transformers
from sinkpretrain.texts import TextCodec

NO_TOKEN = -1


class Row(NamedTuple):
    """A sequence with its prefix, and how many of its last tokens are scored."""

    ids: tuple[int, ...]
    scored: int


class SinkLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods and greedy generation of a model.

    Args:
        model: in evaluation mode, on the device and in the dtype to compute in.
        codec: its tokenizer.
        batch_size: sequences per forward; changes speed and memory, not the numbers.
        advance: told how many of how many sequences are done.
        opening: ids that belong in front of every sequence behind the model's own (Llama's ``<s>``).
    """

    def __init__(
        self,
        model: LanguageModel,
        codec: TextCodec,
        batch_size: int = 16,
        advance: Callable[[int, int], None] | None = None,
        opening: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model, self.codec, self.advance, self.opening = model, codec, advance, tuple(opening)
        self.batch_size, self._device = batch_size, model.embed.weight.device
        self.prefix = (*model.prefix_ids, *self.opening)
        self.room = model.config.context - len(self.prefix)  # tokens of text that a sequence can hold

    @property
    def eot_token_id(self) -> int:
        if not self.codec.end_ids:
            raise UserError(
                "the tokenizer has no end-of-document token, which the harness puts in front of text without a "
                "context; give a model with sink tokens or another tokenizer."
            )
        return self.codec.end_ids[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of bare text: what belongs in front of it is put there with the sequence, not with the text."""
        return self.codec.more(string)

    # --- likelihood -----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each (context, continuation).

        Without a context the sinks are one, and without sinks the end-of-document token is, as in ``HFLM``.
        """
        pairs = [r.args for r in requests]
        if not self.prefix:
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return answers
        encoded = [self._encode_pair(a, b) if a else ([], self.tok_encode(b)) for a, b in pairs]
        return self._loglikelihood_tokens([(p, *e) for p, e in zip(pairs, encoded, strict=True)])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that share one token of context, each behind its own sinks."""
        windows = [list(self._windows(self.tok_encode(r.args[0]))) for r in requests]
        flat = [(("", ""), *window) for text in windows for window in text]
        scores = iter(self._loglikelihood_tokens(flat))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(context, continuation) of each window."""
        first = NO_TOKEN if self.prefix else self.eot_token_id
        for window in utils.get_rolling_token_windows(
            token_list=ids, prefix_token=first, max_seq_len=self.room, context_len=1
        ):
            context, continuation = utils.make_disjoint_window(window)
            yield [i for i in context if i != NO_TOKEN], continuation

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        _require_room_for_answers(requests, self.room)
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        # Long ones first: what does not fit shows at once, and rows of a batch are of like length.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found |= zip(chosen, self._score([rows[i] for i in chosen]), strict=True)
            if self.advance:
                self.advance(len(found), len(rows))
        return [found[i] for i in range(len(rows))]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """The text's last tokens that fit behind the sinks; its very last one is only predicted."""
        text = (*context, *continuation)[-(self.room + 1) :]
        return Row((*self.prefix, *text), len(continuation))

    @torch.inference_mode()
    def _score(self, rows: list[Row]) -> Iterator[tuple[float, bool]]:
        ids = torch.zeros(len(rows), max(len(r.ids) for r in rows) - 1, dtype=torch.int64)
        for i, row in enumerate(rows):
            # Padding stands behind the text, where causal attention does not see it.
            ids[i, : len(row.ids) - 1] = torch.tensor(row.ids[:-1])
        hidden_BTC = self.model.hidden(ids.to(self._device))
        for i, (tokens, scored) in enumerate(rows):
            if not scored:
                yield 0.0, True
                continue
            last = len(tokens) - 1
            logits = self.model.head(hidden_BTC[i, last - scored : last]).float()
            yield _answer(logits, torch.tensor(tokens[-scored:], device=self._device))

    # --- generation -----------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string; contexts lose their first tokens where both do not fit."""
        return [self._generate(*r.args) for r in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature"):
            raise UserError("this task draws its answers at random; only greedy generation is supported.")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = _require_room_to_generate(options, self.room)
        text_ids = self.tok_encode(context)[-(self.room - most) :]
        ids = [*self.opening, *text_ids] or [self.eot_token_id]
        # Room for everything: nothing is evicted. The engine reads the sinks itself.
        engine = Engine(self.model, Cache(len(self.prefix), self.room))
        logits, made = engine.read(ids), list[int]()
        while len(made) < most:
            made.append(int(logits[: self.model.config.tokenizer_size].argmax()))
            text: str = self.codec.tokenizer.decode(made)
            if made[-1] in self.codec.end_ids or any(s in text for s in stops):
                break
            logits = engine.step(made[-1])
        text = self.codec.tokenizer.decode([i for i in made if i not in self.codec.end_ids])
        return min((text.partition(s)[0] for s in stops), key=len, default=text)


def hugging_face(progress: bool = True, **how: Any) -> Any:
    """The harness's own class, which asserts that answers fit the model; here that is a sentence, as above.

    Without ``progress`` it shows none of its bars, of which it is told call by call and forgets some.
    """
    from lm_eval.models.huggingface import HFLM  # imports transformers' models

    class Fitting(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm or not progress)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm or not progress)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            _require_room_for_answers(requests, self.max_length)
            return super()._loglikelihood_tokens(requests, disable_tqdm or not progress, **options)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            for request in requests:
                _require_room_to_generate(request.args[1], self.max_length)
            return super().generate_until(requests, disable_tqdm or not progress)

    with contextlib.nullcontext() if progress else without_bars_of_transformers():
        return Fitting(**how)


def _require_room_for_answers(requests: Sequence[tuple[Any, list[int], list[int]]], room: int) -> None:
    for texts, _, continuation in requests:
        if len(continuation) > room:
            shown = f" ({texts[1][:30]!r}...)" if texts else ""  # a window of a rolling text goes without its text
            raise UserError(
                f"a continuation of {len(continuation)} tokens{shown} does not fit the {room} "
                "that the model's context has room for; leave its task out."
            )


def _require_room_to_generate(options: dict[str, Any], room: int) -> int:
    """How many tokens a task generates at most."""
    most = int(options.get("max_gen_toks", 256))
    if most >= room:
        raise UserError(f"the task generates {most} tokens, for which a context of {room} has no room.")
    return most


def _answer(logits_NV: Tensor, targets_N: Tensor) -> tuple[float, bool]:
    likely = torch.log_softmax(logits_NV, dim=-1).gather(-1, targets_N[:, None]).sum()
    return float(likely), bool((logits_NV.argmax(-1) == targets_N).all())
