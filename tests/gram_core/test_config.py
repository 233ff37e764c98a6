import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_core.config import ConfigError, dump, load
from gram_core.evaluate.metrics import EvaluateConfig
from gram_core.model.gram import ModelConfig
from gram_core.sample.trajectory import SampleConfig
from gram_core.tasks.nqueens import NQueensConfig
from gram_core.train.loop import TrainConfig
from gram_core.train.objective import ObjectiveConfig

WHERE = "params.yaml: runs.a.model"
ALL = [
    ModelConfig, ObjectiveConfig, TrainConfig, SampleConfig, EvaluateConfig, NQueensConfig,
]  # fmt: skip

positive = st.floats(min_value=1e-3, max_value=1e3, allow_nan=False)


@st.composite
def model_configs(draw) -> ModelConfig:
    heads = draw(st.integers(1, 8))
    floor = draw(st.floats(1e-6, 0.05))
    return ModelConfig(
        dim=2 * heads * draw(st.integers(1, 16)),
        heads=heads,
        ffn=draw(st.integers(1, 512)),
        core=draw(st.sampled_from(["attention", "mixer"])),
        hierarchical=draw(st.booleans()),
        T=draw(st.integers(1, 9)),
        guidance=draw(st.sampled_from(["full", "stochastic_only", "guide_only", "none"])),
        sigma_floor=floor,
        sigma_init=min(10.0, floor + draw(positive)),
        prefix_tokens=draw(st.integers(0, 16)),
        rope_base=draw(positive),
    )


@given(model_configs())
@settings(max_examples=50, deadline=None)
def test_a_dumped_config_loads_as_the_same_even_through_json(config):
    plain = dump(config)
    assert load(ModelConfig, plain, WHERE) == config
    assert load(ModelConfig, json.loads(json.dumps(plain)), WHERE) == config
    assert set(plain) == set(ModelConfig.__struct_fields__)


@pytest.mark.parametrize("cls", ALL)
def test_defaults_are_valid_settings_and_survive_the_round_trip(cls):
    config = cls()
    assert load(cls, dump(config), "x") == config
    plain = {"kind": "nqueens"} if cls is NQueensConfig else {}
    assert load(cls, plain, "x") == config


@pytest.mark.parametrize("cls", ALL)
def test_configs_are_frozen(cls):
    config = cls()
    with pytest.raises(AttributeError):
        setattr(config, cls.__struct_fields__[0], 1)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"dimm": 16}, f"{WHERE}.dimm: unknown key; did you mean 'dim'?"),
        ({"sigma_inti": 0.1}, f"{WHERE}.sigma_inti: unknown key; did you mean 'sigma_init'?"),
        ({"xyzzy": 1}, f"{WHERE}.xyzzy: unknown key; known keys: dim, heads, ffn"),
        ({7: 1}, f"{WHERE}.7: unknown key; known keys: dim"),
        ({"dim": "16"}, f"{WHERE}.dim: Expected `int`, got `str`"),
        ({"dim": None}, f"{WHERE}.dim: Expected `int`, got `null`"),
        ({"dim": 0}, f"{WHERE}.dim: Expected `int` >= 1"),
        ({"sigma_init": -0.1}, f"{WHERE}.sigma_init: Expected `float` > 0"),
        ({"hierarchical": "yes"}, f"{WHERE}.hierarchical: Expected `bool`, got `str`"),
        ({"core": "lstm"}, f"{WHERE}.core: Invalid enum value 'lstm'"),
        ({"dim": 20, "heads": 8}, f"{WHERE}: dim 20 must be a multiple of 2 * heads = 16"),
        (
            {"sigma_init": 0.001, "sigma_floor": 0.001},
            f"{WHERE}: sigma_init 0.001 must be above sigma_floor 0.001",
        ),
        ([1, 2], f"{WHERE}: expected a mapping of settings, got [1, 2]"),
        (None, f"{WHERE}: expected a mapping of settings, got None"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line_that_names_its_key(mapping, message):
    with pytest.raises(ConfigError) as caught:
        load(ModelConfig, mapping, WHERE)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "mapping", "message"),
    [
        (TrainConfig, {"optim": {"lr": "fast"}}, "x.optim.lr: Expected `float`"),
        (TrainConfig, {"optim": {"rate": 1.0}}, "x.optim: Object contains unknown field `rate`"),
        (NQueensConfig, {"kind": "nqueens", "split": {"test": 2}}, "x.split.test: Expected"),
        (SampleConfig, {"depths": [4, 0]}, "x.depths[1]: Expected `int` >= 1"),
        (SampleConfig, {"depth": 65_536}, "x.depth: Expected `int` <= 65535"),
    ],
)
def test_keys_below_the_first_level_are_named_by_their_whole_path(cls, mapping, message):
    with pytest.raises(ConfigError) as caught:
        load(cls, mapping, "x")
    assert str(caught.value).startswith(message)


def test_whole_numbers_are_taken_for_fractional_settings():
    assert load(ModelConfig, {"sigma_init": 1}, WHERE).sigma_init == 1.0
