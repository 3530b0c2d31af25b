import dataclasses
import json

import pytest

from hf_skein import SkeinConfig


def test_defaults_are_the_documented_ones():
    config = SkeinConfig()
    assert (config.method, config.exact_rows, config.min_length, config.backend) == ("adaptive", 1, 1024, "auto")
    for field in dataclasses.fields(SkeinConfig):
        assert f"{field.name}:" in SkeinConfig.__doc__


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SkeinConfig().num_columns = 3


def test_round_trip_through_json():
    config = SkeinConfig(method="skeinformer", num_columns=7, num_pilots=3, layers={2: {"method": "exact"}, 0: {}})
    values = json.loads(json.dumps(config.to_dict()))
    assert values["version"] == 1
    assert SkeinConfig.from_dict(values) == config


def test_missing_fields_have_their_default():
    assert SkeinConfig.from_dict({"num_columns": 5}) == SkeinConfig(num_columns=5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "linformer"),
        ("method", None),
        ("method", ["adaptive"]),
        ("num_columns", 0),
        ("num_columns", 1.5),
        ("num_columns", True),
        ("num_columns", "128"),
        ("block_size", -1),
        ("max_blocks", 0),
        ("num_pilots", 0),
        ("exact_rows", -1),
        ("exact_rows", 1000),
        ("min_length", None),
        ("seed", -1),
        ("seed", 2**32),
        ("residual", "cubic"),
        ("row_normalization", "l2"),
        ("column_sampling", "all"),
        ("backend", "cuda"),
        ("strict", "yes"),
        ("pilot_reutilization", 1),
        ("layers", [1]),
        ("layers", {-1: {}}),
        ("layers", {"first": {}}),
        ("layers", {0: {"num_columns": 0}}),
        ("layers", {0: {"nonsense": 0}}),
        ("layers", {0: {"layers": {}}}),
        ("layers", {0: 3}),
        ("layers", {0: {}, "0": {}}),
    ],
)
def test_a_bad_value_names_the_field_what_was_given_and_what_is_allowed(field, value):
    with pytest.raises(ValueError, match=field) as error:
        SkeinConfig(**{field: value})
    assert "allowed" in str(error.value)
    if not isinstance(value, dict):
        assert repr(value) in str(error.value)


def test_an_unknown_key_warns_and_is_ignored():
    with pytest.warns(UserWarning, match="sharpness"):
        assert SkeinConfig.from_dict({"num_columns": 9, "sharpness": 3}) == SkeinConfig(num_columns=9)


def test_a_newer_version_is_refused():
    with pytest.raises(ValueError, match="Upgrade"):
        SkeinConfig.from_dict({"version": 2})


def test_per_layer_overrides():
    config = SkeinConfig(num_columns=64, layers={"1": {"num_columns": 8}})
    assert config.for_layer(0).num_columns == 64
    assert config.for_layer(1).num_columns == 8
    with pytest.raises(ValueError, match="layer_idx"):
        config.for_layer(None)
    assert SkeinConfig().for_layer(None) == SkeinConfig()
