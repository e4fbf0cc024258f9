"""The model against transformers' GPT-NeoX, forward and gradient, and a list of mutations that must show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, peaked
from torch import Tensor

from sinkpretrain import attention, hf, model
from sinkpretrain.config import MAX_SINK_TOKENS, ModelConfig, RunConfig, SinkConfig, load_yaml, recipe_path
from sinkpretrain.errors import UserError
from sinkpretrain.model import KEPT_LENGTHS, GPTNeoX

TOLERANCE = 1e-5


def head_name(theirs: torch.nn.Module) -> str:
    return next(name for name in hf.HEADS if name in theirs.state_dict())


def reference(ours: GPTNeoX) -> torch.nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**hf.hf_config(ours.config), attn_implementation="eager"))
    theirs.load_state_dict(hf.to_hf(ours.state_dict(), ours.config, head_name(theirs)))
    return theirs.eval()


def loss_and_gradients(net: torch.nn.Module, ids: Tensor, names: Callable[[dict], dict]) -> tuple[Tensor, dict]:
    out = net(ids)
    logits = out if isinstance(out, Tensor) else out.logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), names({n: p.grad for n, p in net.named_parameters()})


def worst_difference(ours: GPTNeoX, theirs: torch.nn.Module, ids: Tensor) -> float:
    """Largest difference of logits, and of gradients relative to the largest entry of each tensor."""
    for net in (ours, theirs):
        net.zero_grad()
    logits, grads = loss_and_gradients(ours, ids, lambda g: hf.to_hf(g, ours.config, head_name(theirs)))
    want_logits, want = loss_and_gradients(theirs, ids, dict)
    differences = [((logits - want_logits).abs().max() / want_logits.abs().max()).item()]
    assert grads.keys() == want.keys()
    differences += [((grads[k] - want[k]).abs().max() / want[k].abs().max().clamp_min(1e-4)).item() for k in want]
    return max(differences)


@pytest.fixture
def pair() -> tuple[GPTNeoX, torch.nn.Module, Tensor]:
    ours = peaked(GPTNeoX(TINY, seed=1))
    return ours, reference(ours), torch.randint(0, 96, (2, 48))


def test_parity_with_transformers(pair) -> None:
    assert worst_difference(*pair) < TOLERANCE


def test_peaked_attention_is_peaked(pair) -> None:
    ours, _, ids = pair
    seen = []

    def probe(layer, q, k, v, sink):
        cos, sin = ours.rope(torch.arange(ids.shape[1]))
        q, k = attention.rotate(q, cos, sin), attention.rotate(k, cos, sin)
        weights, _ = attention.attention_weights(q, k, None, torch.ones(48, 48).tril().bool())
        seen.append(weights.amax(-1)[..., 8:].mean())
        return weights @ v

    ours.hidden(ids, probe)
    assert torch.stack(seen).mean() > 0.3  # evenly spread attention would give less than 0.1


def _swap_qk(net: GPTNeoX) -> None:
    with torch.no_grad():
        for block in net.blocks:
            d = TINY.d_model
            for p in (block.attn.qkv.weight, block.attn.qkv.bias):
                p.copy_(torch.cat((p[d : 2 * d], p[:d], p[2 * d :])))


MUTATIONS: dict[str, Callable[[GPTNeoX, pytest.MonkeyPatch], object]] = {
    "rotary off": lambda net, mp: mp.setattr(model, "rotate", lambda x, cos, sin: x),
    "rotary on all dimensions": lambda net, mp: mp.setattr(
        GPTNeoX, "rope", lambda self, p: attention.rope_tables(p, 16, 10000.0)
    ),
    "rotary base": lambda net, mp: mp.setattr(GPTNeoX, "rope", lambda self, p: attention.rope_tables(p, 4, 500.0)),
    "q and k swapped": lambda net, mp: _swap_qk(net),
    "scale doubled": lambda net, mp: mp.setattr(
        model, "causal_attention", lambda q, k, v, c, *_: attention.causal_attention(2 * q, k, v, c)
    ),
    "mask off": lambda net, mp: mp.setattr(
        model, "causal_attention", lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v)
    ),
    "residual flipped": lambda net, mp: [setattr(b, "parallel", False) for b in net.blocks],
    "tanh gelu": lambda net, mp: mp.setattr(
        model, "linear_gelu", lambda x, linear, fused: F.gelu(linear(x), approximate="tanh")
    ),
    "layer norm epsilon": lambda net, mp: [setattr(b.ln1, "eps", 1e-3) for b in net.blocks],
    "zero sink on": lambda net, mp: mp.setattr(
        model,
        "causal_attention",
        lambda q, k, v, c, *_: attention.causal_attention(q, k, v, attention.Column(torch.zeros(()))),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_seen(mutation: str, pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, ids = pair
    MUTATIONS[mutation](ours, monkeypatch)
    assert worst_difference(ours, theirs, ids) > 10 * TOLERANCE


def test_sequential_residual_parity() -> None:
    import dataclasses

    ours = peaked(GPTNeoX(dataclasses.replace(TINY, parallel_residual=False), seed=1))
    assert worst_difference(ours, reference(ours), torch.randint(0, 96, (2, 48))) < TOLERANCE


def test_hf_round_trip() -> None:
    ours = GPTNeoX(TINY, seed=2)
    back = hf.from_hf(hf.to_hf(ours.state_dict(), ours.config), ours.config)
    assert all(torch.equal(back[k], v) for k, v in ours.state_dict().items())


def test_unknown_hf_weight_is_refused() -> None:
    state = hf.to_hf(GPTNeoX(TINY).state_dict(), TINY)
    with pytest.raises(UserError, match=r"extra\.weight"):
        hf.from_hf({**state, "extra.weight": torch.zeros(1)}, TINY)


# Published counts: Biderman et al. 2023 (arXiv 2304.01373), table 1, and the model cards of 14m and 31m.
SIZES = {
    "14m": (14_067_712, 1_189_888),
    "31m": (30_494_720, 4_739_072),
    "70m": (70_426_624, 18_915_328),
    "160m": (162_322_944, 85_056_000),
    "410m": (405_334_016, 302_311_424),
    "1b": (1_011_781_632, 805_736_448),
    "1.4b": (1_414_647_808, 1_208_602_624),
    "2.8b": (2_775_208_960, 2_517_652_480),
    "6.9b": (6_857_302_016, 6_444_163_072),
    "12b": (11_846_072_320, 11_327_027_200),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_parameter_counts(size: str) -> None:
    config = load_yaml(RunConfig, recipe_path(f"pythia-{size}")).model
    with torch.device("meta"):
        net = GPTNeoX(config, seed=None)
    assert (net.n_parameters(), net.n_parameters(embeddings=False)) == SIZES[size]
    assert net.config.vocab_size - net.config.tokenizer_size >= MAX_SINK_TOKENS


def test_initial_weights_follow_the_published_recipe() -> None:
    net = GPTNeoX(ModelConfig(n_layer=4, d_model=256, n_head=4, tokenizer_size=1000), seed=3)
    block = net.blocks[1]
    small, wang = (2 / (5 * 256)) ** 0.5, 2 / (4 * 256**0.5)
    for module, std in (
        (net.embed, small),
        (net.head, small),
        (block.attn.qkv, small),
        (block.mlp.up, small),
        (block.attn.out, wang),
        (block.mlp.down, wang),
    ):
        assert module.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not block.attn.qkv.bias.any()


def test_mechanisms_start_from_the_same_weights() -> None:
    vanilla, sink = GPTNeoX(TINY, seed=5), GPTNeoX(TINY, SinkConfig("sink_tokens", {"n": 2}), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(vanilla.parameters(), sink.parameters(), strict=True))


def test_masks_of_many_lengths_take_no_memory(tiny: ModelConfig) -> None:
    net = GPTNeoX(replace(tiny, window=5))
    made = [net.causal(length, torch.device("cpu")) for length in range(10, 40)]
    assert net.causal(39, torch.device("cpu")) is made[-1]  # or compiled code would be made anew
    assert len(net._causal) == KEPT_LENGTHS


def test_flops_of_the_160m_model() -> None:
    assert GPTNeoX(ModelConfig(tokenizer_size=50277)).flops_per_token() == pytest.approx(0.855e9, rel=1e-3)


def test_rotary_tables_survive_a_cast_to_bf16() -> None:
    net = GPTNeoX(TINY).bfloat16()
    cos, _ = net.rope(torch.tensor([2047]))
    assert cos.dtype == torch.float32
    assert cos[0, 0].item() == pytest.approx(float(torch.cos(torch.tensor(2047.0, dtype=torch.float64))), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"d_model": 65}, "n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"rotary_pct": 0.2}, "rotary_pct"),
        ({"vocab_size": 50}, "vocab_size"),
        ({"tokenizer_size": 0, "vocab_size": 0}, "tokenizer_size"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, names: str) -> None:
    import dataclasses

    with pytest.raises(UserError, match=names):
        GPTNeoX(dataclasses.replace(TINY, **change))


def test_import_is_light() -> None:
    import subprocess
    import sys

    heavy = ["lightning", "wandb", "datasets", "transformers"]
    if not torch.backends.cuda.is_built():
        heavy.append("torch._dynamo")
    code = f"import sys, sinkpretrain.model, sinkpretrain.evaluate; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert out.stdout.strip() == "[]"
