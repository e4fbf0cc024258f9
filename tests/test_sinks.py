"""The mechanisms in a model: exact gradients for every one of them, and the identities between them."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MECHANISMS, TINY, peaked
from torch import Tensor, nn

from sinkpretrain import attention, sinks
from sinkpretrain.attention import rotate
from sinkpretrain.config import ModelConfig, SinkConfig, sink_recipe
from sinkpretrain.data import to_batch
from sinkpretrain.errors import UserError
from sinkpretrain.model import Attend, GPTNeoX

SOURCES = Path(sinks.__file__).parent.parent / "configs" / "sinks"


def test_every_mechanism_is_tested_and_has_a_recipe() -> None:
    assert {c.mechanism for c in MECHANISMS.values()} == set(sinks.REGISTRY)
    named = {
        line.split()[-1] for f in SOURCES.glob("*.yaml") for line in f.read_text().splitlines() if "mechanism" in line
    }
    assert named == set(sinks.REGISTRY)


def test_no_two_recipes_are_the_same() -> None:
    recipes = {f.stem: sink_recipe(f.stem) for f in SOURCES.glob("*.yaml")}
    assert len({str(r) for r in recipes.values()}) == len(recipes)
    assert recipes["off-by-c"].options["c"] != 1  # that is the zero sink


@pytest.mark.parametrize("cls", sinks.REGISTRY.values(), ids=lambda c: c.name)
def test_every_mechanism_says_what_it_is(cls: type[sinks.Mechanism]) -> None:
    """Its source and what a stream must keep, in the docstring as in the catalogue."""
    told = inspect.getdoc(cls)
    assert "Source:" in told
    assert "streaming" in told
    assert cls.summary
    assert cls.source
    assert cls.kept


def eager(q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism, visible: Tensor) -> Tensor:
    """The definition: one matrix of logits, a column beside it, and autograd."""
    column = sink.column(q, visible.sum(-1))
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    if sink.weigher is not None:
        return sink.weigh(logits, visible) @ v
    logits = logits.masked_fill(~visible, float("-inf"))
    if column is None:
        return logits.softmax(-1) @ v
    extra = column.logit.double().expand(logits.shape[:3]).unsqueeze(-1)
    p = torch.cat((extra, logits), dim=-1).softmax(-1)
    out = p[..., 1:] @ v
    return out if column.value is None else out + p[..., :1] * column.value.double().unsqueeze(-2)


def loss_and_gradients(net: GPTNeoX, rows: Tensor, attend: Attend | None) -> list[Tensor]:
    ids, labels = to_batch(rows.numpy(), net.prefix_ids)
    net.zero_grad()
    logits = net.head(net.hidden(ids, attend))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


def eager_attend(net: GPTNeoX, visible: Tensor) -> Attend:
    cos, sin = (table.double() for table in net.rope(torch.arange(visible.shape[-1])))
    return lambda layer, q, k, v, sink: eager(rotate(q, cos, sin), rotate(k, cos, sin), v, sink, visible)


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference, relative to the largest entry of its tensor."""
    pairs = zip(got, want, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in pairs)


PLAIN = torch.ones(TINY.context, TINY.context).tril().bool()
TOLERANCE = 2e-6  # the column's logit is fp32


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the explicit path in several parts, the last one smaller."""
    monkeypatch.setattr(attention, "WEIGHED_ROWS", 24)


@pytest.mark.usefixtures("small_parts")
def test_gradients_equal_an_eager_softmax(mechanism: SinkConfig) -> None:
    """Training's attention against the definition, both in fp64."""
    net = peaked(GPTNeoX(TINY, mechanism, seed=4)).double()
    rows = torch.randint(0, 96, (2, TINY.context + 1))
    want = loss_and_gradients(net, rows, eager_attend(net, PLAIN))
    assert worst(loss_and_gradients(net, rows, None), want) <= TOLERANCE


def test_every_parameter_of_a_mechanism_learns(mechanism: SinkConfig) -> None:
    net = peaked(GPTNeoX(TINY, mechanism, seed=4))
    loss_and_gradients(net, torch.randint(0, 96, (2, TINY.context + 1)), None)
    assert all(p.grad.abs().max() > 1e-6 for name, p in net.named_parameters() if ".sink." in name)


@pytest.mark.usefixtures("small_parts")
def test_gradients_within_a_window(mechanism: SinkConfig) -> None:
    net = peaked(GPTNeoX(replace(TINY, window=9, window_sinks=3), mechanism, seed=4)).double()
    rows = torch.randint(0, 96, (2, TINY.context + 1))
    i, j = torch.arange(TINY.context)[:, None], torch.arange(TINY.context)
    band = PLAIN & ((i - j <= 9) | (j < 3))
    got = loss_and_gradients(net, rows, None)
    assert worst(got, loss_and_gradients(net, rows, eager_attend(net, band))) <= TOLERANCE
    # Negative controls: without the pinned sinks, and with a window one token wider.
    for other in (PLAIN & (i - j <= 9), PLAIN & ((i - j <= 10) | (j < 3))):
        assert worst(got, loss_and_gradients(net, rows, eager_attend(net, other))) > 1e-3


@pytest.mark.usefixtures("small_parts")
def test_gradients_within_documents(mechanism: SinkConfig) -> None:
    net = peaked(GPTNeoX(TINY, mechanism, seed=4)).double()
    rows = torch.randint(1, 96, (2, TINY.context + 1))
    rows[0, [7, 8, 40]] = rows[1, 60] = 0
    ids, _ = to_batch(rows.numpy(), net.prefix_ids)
    visible = PLAIN[None, None].repeat(2, 1, 1, 1)
    for b, row in enumerate(ids.tolist()):
        for i in range(TINY.context):
            last_end = max((t for t in range(i) if row[t] == 0), default=-1)
            visible[b, 0, i, len(net.prefix_ids) : last_end + 1] = False
    got = loss_and_gradients(net, rows, net.within_documents(ids, 0))
    assert worst(got, loss_and_gradients(net, rows, eager_attend(net, visible))) <= TOLERANCE
    assert worst(got, loss_and_gradients(net, rows, None)) > 1e-3  # the documents of this sample do matter


def test_a_window_as_long_as_the_context_is_none() -> None:
    rows = torch.randint(0, 96, (2, TINY.context + 1))
    plain = loss_and_gradients(GPTNeoX(TINY, seed=4), rows, None)
    wide = loss_and_gradients(GPTNeoX(replace(TINY, window=TINY.context - 1), seed=4), rows, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, wide, strict=True))


@pytest.mark.parametrize("size", [(-1, 0), (0, 2), (4, -1)])
def test_windows_that_make_no_sense_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"model.window"):
        replace(TINY, window=size[0], window_sinks=size[1]).resolved()


# --- the normalisations that are no softmax, as their papers write them ---------------------------------------------

FORMULAS = {
    "sigmoid_attention": lambda a: 1 / (1 + torch.exp(-(a - math.log(TINY.context)))),
    "softpick": lambda a: torch.relu(torch.exp(a) - 1) / torch.abs(torch.exp(a) - 1).sum(-1, keepdim=True),
    "clipped_softmax": lambda a: torch.clip((1.05 + 4 / TINY.context) * a.softmax(-1) - 4 / TINY.context, 0, 1),
}
WEIGHING = [name for name, c in MECHANISMS.items() if sinks.build(c, TINY).weigher]


@pytest.mark.parametrize("name", WEIGHING)
def test_weights_are_the_papers(name: str) -> None:
    weigh = sinks.build(MECHANISMS[name], TINY).weigh
    a = 4 * torch.randn(2, 3, 5, 9, dtype=torch.float64)
    visible = torch.rand(5, 9) < 0.7
    visible[:, 0] = True
    got = weigh(a, visible)
    assert (got == 0).logical_or(visible).all()
    for i in range(5):
        want = FORMULAS[name](a[:, :, i, visible[i]])
        assert (got[:, :, i, visible[i]] - want).abs().max() < 1e-7
    # What is hidden has no say, not even by its logit.
    assert torch.equal(weigh(a.masked_fill(~visible, 77.0), visible), got)


@pytest.mark.parametrize("name", WEIGHING)
def test_weights_stay_finite(name: str) -> None:
    a = torch.tensor([[[[-500.0, -400.0], [500.0, 400.0], [0.0, 0.0]]]], requires_grad=True)
    weights = sinks.build(MECHANISMS[name], TINY).weigh(a, torch.ones(3, 2).bool())
    weights.sum().backward()
    assert weights.isfinite().all()
    assert a.grad.isfinite().all()
    assert weights.min() >= 0
    assert weights.max() <= 1


def test_softpick_can_attend_to_nothing_and_clipping_makes_exact_zeros() -> None:
    a = torch.tensor([[[[-1.0, -2.0, -3.0]]]])
    assert column_of("softpick").weigh(a, torch.ones(1, 3).bool()).abs().max() == 0
    weights = column_of("clipped_softmax").weigh(torch.tensor([[[[8.0, 0.0, 0.0]]]]), torch.ones(1, 3).bool())
    assert weights[0, 0, 0, 1] == 0
    assert weights[0, 0, 0, 0] > 0.99


# --- identities -----------------------------------------------------------------------------------------------------


def test_stable_mask_is_pseudo_logits_in_the_hidden_places() -> None:
    T, decay, far = 6, 0.7, 400
    q = torch.randn(1, TINY.n_head, T, 16, dtype=torch.float64)
    a = torch.randn(1, TINY.n_head, T, T, dtype=torch.float64)
    hidden = ~torch.ones(T, T).tril().bool()
    wide = torch.cat((a, torch.zeros(1, TINY.n_head, T, far - T)), dim=-1)
    pseudo = torch.arange(far) * math.log(decay)
    behind = torch.arange(far) > torch.arange(T)[:, None]
    want = torch.where(behind, pseudo.double(), wide).softmax(-1)[..., :T].masked_fill(hidden, 0.0)
    column = column_of("stable_mask", decay=decay).column(q, torch.arange(1, T + 1))
    lse = a.masked_fill(hidden, float("-inf")).logsumexp(-1)
    got = a.masked_fill(hidden, float("-inf")).softmax(-1) * torch.sigmoid(lse - column.logit).unsqueeze(-1)
    assert (got - want).abs().max() < 1e-6


def test_value_bias_is_added_to_the_output() -> None:
    """As a bias of v does: every row of a softmax sums to 1."""
    net = peaked(GPTNeoX(TINY, SinkConfig("value_bias"), seed=4))
    plain = GPTNeoX(TINY)
    state = {k: v.clone() for k, v in net.state_dict().items() if ".sink." not in k}
    for layer, block in enumerate(net.blocks):
        state[f"blocks.{layer}.attn.qkv.bias"][-TINY.d_model :] += block.attn.sink.value.flatten()
    plain.load_state_dict(state)
    ids = torch.randint(0, 96, (2, 40))
    assert torch.allclose(net(ids), plain(ids), atol=1e-4)


def test_an_open_gate_is_vanilla() -> None:
    for name in ("output_gate", "value_gate"):
        sink = column_of(name)
        with torch.no_grad():
            sink.gate.linear.weight.fill_(100.0)
        x, t = torch.ones(1, 5, TINY.d_model), torch.randn(1, TINY.n_head, 5, TINY.head_dim)
        hook = sink.output if name == "output_gate" else sink.values
        assert torch.equal(hook(x, t), t)


def test_gates_belong_to_their_heads() -> None:
    """Closing one head's gate takes that head's output away, and nothing else."""
    sink = column_of("output_gate")
    with torch.no_grad():
        sink.gate.linear.weight.fill_(100.0)
        sink.gate.linear.weight[2] = -100.0
    t = torch.ones(1, TINY.n_head, 5, TINY.head_dim)
    out = sink.output(torch.ones(1, 5, TINY.d_model), t)
    assert out[0, 2].abs().max() == 0
    assert torch.equal(out[0, [0, 1, 3]], t[0, [0, 1, 3]])


def test_weights_and_mass_sum_to_one(mechanism: SinkConfig) -> None:
    """Of every softmax; the other normalisations keep each weight in [0, 1] and give none to what is hidden."""
    sink = sinks.build(mechanism, TINY)
    q, k = torch.randn(2, 2, TINY.n_head, 12, TINY.head_dim) * 3
    visible = torch.ones(12, 12).tril().bool()
    weights, mass = attention.attention_weights(q, k, sink.column(q, visible.sum(-1)), visible, sink.weigher)
    assert weights.masked_select(~visible).abs().max() == 0
    if sink.weigher is None:
        assert torch.allclose(weights.sum(-1) + mass, torch.ones(2, TINY.n_head, 12), atol=1e-6)
    else:
        assert weights.min() >= 0
        assert weights.max() <= 1


@pytest.mark.parametrize("name", [name for name, cls in sinks.REGISTRY.items() if cls.uses("column")])
def test_autocast_does_not_round_a_columns_logit(name: str) -> None:
    """The kernels' own logits of 16-bit queries and keys are fp32, too."""
    sink = sinks.build(SinkConfig(name), TINY)
    for p in sink.parameters():
        torch.nn.init.normal_(p)
    q, seen = 3 * torch.randn(2, TINY.n_head, 12, TINY.head_dim).bfloat16(), torch.arange(1, 13)
    want = sink.column(q, seen)
    with torch.autocast("cpu", torch.bfloat16):
        got = sink.column(q, seen)
    assert got.logit.dtype == torch.float32
    assert torch.equal(got.logit, want.logit)


def test_other_weights_start_the_same_whatever_the_mechanism(mechanism: SinkConfig) -> None:
    plain, net = GPTNeoX(TINY, seed=4).state_dict(), GPTNeoX(TINY, mechanism, seed=4).state_dict()
    assert all(torch.equal(v, net[k]) for k, v in plain.items())


def test_drawn_parameters_follow_the_seed() -> None:
    def drawn(seed: int, **options: object) -> Tensor:
        return GPTNeoX(TINY, SinkConfig("sink_logit", dict(options)), seed=seed).blocks[0].attn.sink.s

    assert drawn(4).abs().max() == 0
    assert torch.equal(drawn(4, init_std=0.5), drawn(4, init_std=0.5))
    assert not torch.equal(drawn(4, init_std=0.5), drawn(5, init_std=0.5))
    gate = GPTNeoX(ModelConfig(n_layer=1, d_model=256, n_head=4, tokenizer_size=96), SinkConfig("output_gate"))
    assert gate.blocks[0].attn.sink.gate.linear.weight.std().item() == pytest.approx((2 / (5 * 256)) ** 0.5, rel=0.1)


def column_of(name: str, **options: object) -> sinks.Mechanism:
    return sinks.build(SinkConfig(name, dict(options)), TINY)


def test_the_column_mechanisms_meet_at_zero() -> None:
    q, seen = torch.randn(2, TINY.n_head, 5, TINY.head_dim), torch.arange(1, 6)
    zero = column_of("zero_sink").column(q, seen).logit
    for other in (column_of("off_by_c"), column_of("sink_logit"), column_of("key_bias"), column_of("key_value_bias")):
        assert torch.equal(other.column(q, seen).logit.expand(2, TINY.n_head, 5), zero.expand(2, TINY.n_head, 5))


def test_key_value_bias_is_torchs_add_bias_kv() -> None:
    d, heads = TINY.d_model, TINY.n_head
    module = nn.MultiheadAttention(d, heads, add_bias_kv=True, batch_first=True)
    x, T = torch.randn(2, 9, d), 9
    want, _ = module(x, x, x, attn_mask=torch.ones(T, T).triu(1).bool(), need_weights=False)
    mechanism = column_of("key_value_bias")
    with torch.no_grad():
        mechanism.key.copy_(module.bias_k.view(heads, -1))
        mechanism.value.copy_(module.bias_v.view(heads, -1))
    parts = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.view(2, T, heads, -1).transpose(1, 2) for t in parts)
    got = (
        attention.causal_attention(q, k, v, mechanism.column(q, torch.arange(1, T + 1)))
        .transpose(1, 2)
        .reshape(2, T, d)
    )
    assert torch.allclose(module.out_proj(got), want, atol=1e-5)


def test_a_sink_token_is_the_key_value_bias_read_off_at_position_zero() -> None:
    """Keys and values of a trained sink token, moved into the bias, with the text one position further on."""
    net = peaked(GPTNeoX(TINY, SinkConfig("sink_tokens", {"n": 1}), seed=4))
    bias = GPTNeoX(TINY, SinkConfig("key_value_bias"))
    text = torch.randint(0, 96, (1, 20))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    plain = net.causal(21, text.device)

    def reading(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        seen[layer] = (k[0, :, 0], v[0, :, 0])
        return plain(layer, q, k, v, sink)

    want = net.hidden(torch.cat((torch.tensor([net.prefix_ids]), text), dim=1), reading)[:, 1:]
    bias.load_state_dict(net.state_dict(), strict=False)
    with torch.no_grad():
        for layer, (key, value) in seen.items():
            bias.blocks[layer].attn.sink.key.copy_(key)
            bias.blocks[layer].attn.sink.value.copy_(value)
    cos, sin = bias.rope(torch.arange(1, 21))

    def shifted(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return attention.causal_attention(q, k, v, sink.column(q, torch.arange(1, q.shape[2] + 1)))

    assert torch.allclose(bias.hidden(text, shifted), want, atol=1e-4)


ADDED = [
    ("sink_logit", {}, 144),
    ("sink_logit", {"per_head": False}, 12),
    ("key_bias", {}, 9_216),
    ("key_value_bias", {}, 18_432),
    ("value_bias", {}, 9_216),
    ("output_gate", {}, 110_592),
    ("output_gate", {"elementwise": True}, 7_077_888),
    ("value_gate", {}, 110_592),
    ("stable_mask", {}, 0),
    ("sigmoid_attention", {}, 0),
]


@pytest.mark.parametrize(("name", "options", "parameters"), ADDED)
def test_parameters_added_to_160m(name: str, options: dict[str, object], parameters: int) -> None:
    model = ModelConfig(tokenizer_size=50277).resolved()
    with torch.device("meta"):
        assert 12 * sum(p.numel() for p in sinks.build(SinkConfig(name, options), model).parameters()) == parameters


IMPOSSIBLE = [
    ("off_by_c", {"c": 0.0}, "must be positive"),
    ("sink_logit", {"init_std": -1.0}, "must not be negative"),
    ("stable_mask", {"decay": 1.0}, "between 0 and 1"),
    ("clipped_softmax", {"alpha": -1.0}, "wrong direction"),
    ("clipped_softmax", {"zeta": 0.5}, "wrong direction"),
    ("clipped_softmax", {"alpha": 64.0}, "below the context"),
    ("clipped_softmax", {"alpha": 0.0}, "clip nothing"),
    ("output_gate", {"elementwise": 1}, "must be of type bool"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), IMPOSSIBLE)
def test_impossible_options_are_refused(name: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        sinks.build(SinkConfig(name, options), TINY)


def test_off_by_c_takes_the_logarithm() -> None:
    column = column_of("off_by_c", c=2).column(torch.zeros(1, 4, 1, 16), torch.ones(1))
    assert column.logit.item() == pytest.approx(0.6931, abs=1e-4)
