"""Configurations: strict reading, recipes found by name, and the recipe of the paper as the default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from sinkpretrain import sinks
from sinkpretrain.config import ModelConfig, RunConfig, SinkConfig, from_dict, load_yaml, recipe_path, save_yaml
from sinkpretrain.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"


def test_round_trip(tmp_path: Path) -> None:
    config = RunConfig(out="a", sink=SinkConfig("sink_tokens", {"n": 2}), model=ModelConfig(n_layer=3))
    save_yaml(config, tmp_path / "c.yaml")
    assert load_yaml(RunConfig, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"modle": {}}, "unknown setting 'modle'; did you mean model?"),
        ({"model": {"n_layers": 3}}, r"unknown setting 'model.n_layers'; did you mean model.n_layer\?"),
        ({"model": {"n_layer": "three"}}, "'model.n_layer' must be int, not 'three'"),
        ({"model": {"n_layer": True}}, "'model.n_layer' must be int, not True"),
        ({"model": 3}, "'model' is a group of settings"),
        ({"training": {"precision": "fp8"}}, "'training.precision' must be '32-true' or"),
        ({"data": {"shuffle": "yes"}}, "'data.shuffle' must be bool"),
    ],
)
def test_mistakes_are_named(data: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        from_dict(RunConfig, data)


def test_an_int_is_a_float_and_none_is_allowed_where_it_says_so() -> None:
    config = from_dict(RunConfig, {"optimizer": {"clip": 1}, "data": {"shuffle": None}})
    assert config.optimizer.clip == 1.0
    assert config.data.shuffle is None


def test_the_default_is_the_cited_recipe() -> None:
    """configs/pythia-160m.yaml spells out, with sources, what the defaults are."""
    recipe = yaml.safe_load((CONFIGS / "pythia-160m.yaml").read_text())
    loaded = from_dict(RunConfig, recipe)
    default = RunConfig(model=ModelConfig(vocab_size=50304, tokenizer_size=50277))
    assert loaded == default
    for group in ("model", "optimizer"):
        fields = {f.name for f in dataclasses.fields(getattr(default, group))}
        assert fields - set(recipe[group]) <= {"d_ff"}


def test_padding_gives_pythias_vocabulary() -> None:
    assert ModelConfig().resolved(50277).vocab_size == 50304
    assert ModelConfig().resolved(2048).vocab_size == 2176


@pytest.mark.parametrize("path", sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("sinks/*.yaml")]), ids=lambda p: p.stem)
def test_every_recipe_is_found_and_valid(path: Path) -> None:
    assert recipe_path(path.stem).resolve() == path.resolve()
    config = load_yaml(RunConfig, path)
    sinks.build(config.sink, config.model.resolved(50277))


def test_unknown_recipe() -> None:
    with pytest.raises(UserError, match=r"did you mean pythia-160m\?"):
        recipe_path("pythia-160")
    with pytest.raises(UserError, match=r"known recipes: .*zero-sink"):
        recipe_path("qqq")


@pytest.mark.parametrize(
    ("sink", "sentence"),
    [
        (SinkConfig("sink_token"), r"unknown sink mechanism 'sink_token'; did you mean sink_tokens\?"),
        (SinkConfig("sink_tokens", {"m": 1}), "unknown option 'm' of the mechanism sink_tokens; it has n"),
        (SinkConfig("zero_sink", {"n": 1}), "it has none"),
        (SinkConfig("sink_tokens", {"n": "two"}), "must be of type int"),
        (SinkConfig("sink_tokens", {"n": True}), "must be of type int"),
        (SinkConfig("sink_tokens", {"n": 0}), "at least 1"),
    ],
)
def test_sink_mistakes_are_named(sink: SinkConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        sinks.build(sink, ModelConfig())


def test_prefixes_use_the_spare_rows() -> None:
    vocabulary = sinks.Vocabulary(50277, 50304)
    model = ModelConfig()
    assert sinks.build(SinkConfig("sink_tokens", {"n": 2}), model).prefix_ids(vocabulary) == (50277, 50278)
    assert len(sinks.build(SinkConfig("sink_tokens", {"n": 27}), model).prefix_ids(vocabulary)) == 27
    with pytest.raises(UserError, match="28 sink tokens do not fit the 27 spare rows"):
        sinks.build(SinkConfig("sink_tokens", {"n": 28}), model).prefix_ids(vocabulary)
    with pytest.raises(UserError, match="not an id of the tokenizer"):
        sinks.build(SinkConfig("fixed_first_token", {"id": 50277}), model).prefix_ids(vocabulary)
    assert sinks.label(SinkConfig("sink_tokens", {"n": 1})) == "sink_tokens(n=1)"
