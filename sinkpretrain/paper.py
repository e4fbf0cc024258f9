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
    if (shape.get("n_layer"), shape.get("d_model"), shape.get("context")) != (12, 768, 2048):
        return None
    return TABLE_3.get(mechanism, {}).get(setting.removesuffix("-nocolumn"))
