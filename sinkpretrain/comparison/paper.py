"""Numbers of StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) that ours stand beside."""

from __future__ import annotations

from typing import Any

CITATION = "Xiao et al. 2023, arXiv 2309.17453, table 3"

TABLE_3 = {
    "vanilla": {"0+1024": 27.87, "1+1023": 18.49, "2+1022": 18.05, "4+1020": 18.05},
    "zero_sink": {"0+1024": 29214.0, "1+1023": 19.90, "2+1022": 18.27, "4+1020": 18.01},
    "sink_tokens(n=1)": {"0+1024": 1235.0, "1+1023": 18.01, "2+1022": 18.01, "4+1020": 18.02},
    "sink_tokens(n=2)": {"0+1024": 1262.0, "1+1023": 25.73, "2+1022": 18.05, "4+1020": 18.05},
}
"""Perplexity on the first PG-19 test book, by mechanism and cache, of 160M models trained from scratch."""


def value(mechanism: str, setting: str, shape: dict[str, Any]) -> float | None:
    """The paper's perplexity for a setting of ours, or None where the paper has no such setting.

    The paper does not say which of two readings it takes for the zero sink at 0+1024 (with its column, or without at
    test time), so that number stands beside both.
    """
    if not is_papers(shape):
        return None
    return TABLE_3.get(mechanism, {}).get(setting.removesuffix("-nocolumn"))


ZERO_SHOT_CITATION = "Xiao et al. 2023, arXiv 2309.17453, tables 4 and 9"

ZERO_SHOT = {
    "vanilla": (18.6, 45.2, 29.4, 39.6, 16.0, 62.2, 50.1),
    "sink_tokens(n=1)": (19.6, 45.6, 29.8, 39.9, 16.6, 62.6, 50.8),
    "sink_tokens(n=2)": (18.7, 45.6, 29.6, 37.5, 15.8, 64.3, 50.4),
}
"""Zero-shot accuracy in per cent of the same models, by mechanism, in the order of ``TASKS``."""

TASKS = ("arc_challenge", "arc_easy", "hellaswag", "lambada", "openbookqa", "piqa", "winogrande")


def zero_shot(mechanism: str, task: str, shape: dict[str, Any]) -> float | None:
    """The paper's accuracy, per cent; lambada_openai and the like are its lambada."""
    name = "lambada" if task.startswith("lambada") else task
    if not is_papers(shape) or name not in TASKS or mechanism not in ZERO_SHOT:
        return None
    return ZERO_SHOT[mechanism][TASKS.index(name)]


def is_papers(shape: dict[str, Any]) -> bool:
    """Whether a model has the shape of the paper's, Pythia-160M."""
    return (shape.get("n_layer"), shape.get("d_model"), shape.get("context")) == (12, 768, 2048)


FIGURE_10_CITATION = "Xiao et al. 2023, arXiv 2309.17453, figure 10 (one A6000)"

FIGURE_10 = {
    "llama-2-7b": {256: (63, 31), 512: (103, 31), 1024: (223, 35), 2048: (523, 45), 4096: (1411, 65)},
    "llama-2-13b": {256: (99, 48), 512: (169, 52), 1024: (361, 60), 2048: (860, 75), 4096: (2355, 106)},
}
"""Milliseconds per token, sliding window with re-computation and streaming, by model and size of the cache."""
