"""Every band kernel that runs here against an eager definition of its own."""

from __future__ import annotations

import pytest
import torch

from sinkpretrain.band import FOLD, KERNELS

SHAPES = [(40, 40, 10), (40, 73, 10), (300, 300, 37), (300, 420, 121), (130, 20, 200), (1, 64, 64), (257, 256, 1)]


def eager(q, k, v, reach, slopes):
    T, S, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, G, -1, -1).flatten(1, 2).double() for x in (k, v))
    logits = (q.double() @ k.mT) * q.shape[-1] ** -0.5
    for i in range(T):
        for h in range(q.shape[1]):
            distance = i + S - T - torch.arange(S)
            if slopes is not None:
                logits[:, h, i] -= slopes[h].double() * distance
            logits[:, h, i, (distance < 0) | (distance >= reach)] = float("-inf")
    return torch.softmax(logits, -1).nan_to_num() @ v, torch.logsumexp(logits, -1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["masked", "folded", "flex"])
@pytest.mark.parametrize(("T", "S", "reach"), SHAPES)
@pytest.mark.parametrize("alibi", [False, True])
def test_kernels(name: str, T: int, S: int, reach: int, alibi: bool) -> None:
    B = 2
    q, k, v = (torch.randn(B, h, n, 16) for h, n in ((4, T), (2, S), (2, S)))
    slopes = torch.tensor([0.5, 0.1, 0.03, 0.01]) if alibi else None
    out, lse = KERNELS[name](3 * q, k, v, reach, slopes)
    want, want_lse = eager(3 * q, k, v, reach, slopes)
    assert (out - want).abs().max() < 1e-5
    seen = want_lse > float("-inf")
    assert torch.equal(seen, lse > float("-inf"))
    assert (lse - want_lse)[seen].abs().max() < 1e-5
    other, _ = KERNELS[name](3 * q, k, v, reach + 1, slopes)
    assert (other - want).abs().max() > 1e-2 or reach >= S  # negative control


def test_windows_take_no_copies_of_keys() -> None:
    """A thousand windows over one text would not fit memory otherwise."""
    k = torch.randn(1, 1, FOLD * 4 + 63, 8)
    window = k.unfold(2, FOLD + 63, FOLD).permute(0, 2, 1, 4, 3).flatten(0, 1)
    assert window.data_ptr() == k.data_ptr()
