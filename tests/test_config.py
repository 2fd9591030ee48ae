"""Settings as plain data: what comes in is what was meant, or a clear error."""

import json
import re

import pytest
import yaml

from dichroic.config import DiffusionConfig, FitConfig, MixtureConfig, SamplerConfig, settings
from dichroic.errors import ConfigError

CHANGED = FitConfig(
    seed=3,
    holdout=0.25,
    order=(("a", "b"), ("c",)),
    mixture=MixtureConfig(components=8, floor=1e-4),
    diffusion=DiffusionConfig(covariance="jacobian", learning_rate=2e-3),
    sampler=SamplerConfig(name="predictor-corrector", schedule="karras"),
)


@pytest.mark.parametrize("config", [FitConfig(), CHANGED], ids=["defaults", "changed"])
def test_settings_survive_json_and_yaml(config):
    values = config.to_dict()
    assert FitConfig.from_dict(values) == config
    assert FitConfig.from_dict(json.loads(json.dumps(values))) == config
    assert (
        FitConfig.from_dict(yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(values)))))
        == config
    )


def test_what_is_left_out_has_its_default():
    config = FitConfig.from_dict({"mixture": {"components": 3}})
    assert config == FitConfig(mixture=MixtureConfig(components=3))


def test_every_setting_is_listed_with_its_type_and_default():
    listed = settings()
    assert listed["mixture.components"] == (int, 64)
    assert listed["holdout"] == (float, 0.1)
    flat = {k: default for k, (_, default) in listed.items()}
    assert FitConfig(seed=9).replace(flat) == FitConfig()
    depth = lambda values: sum(
        depth(v) if v and isinstance(v, dict) else 1 for v in values.values()
    )
    assert len(listed) == depth(FitConfig().to_dict())


def test_settings_are_replaced_by_dotted_name():
    config = CHANGED.replace({"mixture.components": 2, "seed": 7, "sampler.name": "ddim"})
    assert (config.mixture.components, config.seed, config.sampler.name) == (2, 7, "ddim")
    assert (
        config.replace({"mixture.components": 8, "seed": 3, "sampler.name": "predictor-corrector"})
        == CHANGED
    )
    assert CHANGED.replace({}) == CHANGED


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"fit: unknown key 'sed'; did you mean 'seed'\?"),
        ({"zzz": 1}, r"fit: unknown key 'zzz'; known keys: seed, holdout"),
        ({"mixture": {"iteration": 1}}, r"fit\.mixture: unknown key 'iteration'; did you mean 'iterations'\?"),
        ({"mixture": 3}, r"fit\.mixture: expected a table of settings, got 3"),
        ({"mixture": None}, r"fit\.mixture: expected a table of settings, got None"),
        ({"seed": "one"}, r"fit\.seed: expected int, got 'one'"),
        ({"seed": "1"}, r"fit\.seed: expected int, got '1'"),
        ({"seed": 1.5}, r"fit\.seed: expected int, got 1\.5"),
        ({"seed": True}, r"fit\.seed: expected int, got True"),
        ({"seed": None}, r"fit\.seed: expected int, got None"),
        ({"seed": [1]}, r"fit\.seed: expected int, got \[1\]"),
        ({"seed": -1}, r"fit\.seed: must be at least 0, got -1"),
        ({"holdout": "some"}, r"fit\.holdout: expected float, got 'some'"),
        ({"holdout": -0.1}, r"fit\.holdout: must be at least 0 and below 1, got -0\.1"),
        ({"sampler": {"name": "euler"}}, r"fit\.sampler\.name: 'euler' is none of 'auto', 'ancestral'"),
        ({"sampler": {"solver": 1}}, r"fit\.sampler\.solver: 1 is none of"),
        ({"order": "a"}, r"fit\.order: expected a list, got 'a'"),
        ({"order": ["a", "b"]}, r"fit\.order: expected a list, got 'a'"),
        ({"order": [["a", 1]]}, r"fit\.order: expected text, got 1"),
        ({"order": [["a", None]]}, r"fit\.order: expected text, got None"),
        ({"diffusion": {"ema": 1}}, r"fit\.diffusion\.ema: must be at least 0 and below 1, got 1"),
        ({"sampler": {"sigma_min": 0}}, r"fit\.sampler\.sigma_min: must be positive and below 1, .*, got 0\.0 and 30"),
        ({"sampler": {"sigma_min": 2, "sigma_max": 2}}, r"fit\.sampler\.sigma_min: must be positive and below 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        FitConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "expect"),
    [
        ({"seed": 2.0}, FitConfig(seed=2)),
        ({"holdout": 0}, FitConfig(holdout=0.0)),
        (yaml.safe_load("diffusion: {learning_rate: 1e-4}"), FitConfig().replace({"diffusion.learning_rate": 1e-4})),
        ({"order": None}, FitConfig()),
        ({"order": [["b"], ["a", "c"]]}, FitConfig(order=(("b",), ("a", "c")))),
    ],
)  # fmt: skip
def test_values_that_mean_the_same_are_the_same(values, expect):
    config = FitConfig.from_dict(values)
    assert config == expect
    assert type(config.seed) is int
    assert type(config.holdout) is float


COUNTS = """
    batch_size sampler.steps sampler.beam_width
    mixture.components mixture.steps mixture.iterations mixture.gaussian_iterations mixture.final_iterations
    mixture.active_assignments mixture.beam_width mixture.rank diffusion.channels diffusion.levels diffusion.level_depth
    diffusion.steps diffusion.batch_size diffusion.width diffusion.depth
    diffusion.evidence_draws diffusion.evidence_observations
""".split()


def test_of_what_is_counted_there_is_at_least_one():
    refused = set()
    for name, (kind, _) in settings().items():
        if kind is int:
            try:
                FitConfig().replace({name: 0})
            except ConfigError as error:
                assert str(error) == f"settings.{name}: must be at least 1, got 0"
                refused.add(name)
    assert refused == set(COUNTS)
    with pytest.raises(ConfigError, match="components: must be at least 1, got 0"):
        MixtureConfig(components=0)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"holdout": "-0.1"}, id="negative number as text"),
        pytest.param({"holdout": float("nan")}, id="NaN"),
        pytest.param({"holdout": "nan"}, id="NaN as text"),
        pytest.param({"seed": float("inf")}, id="infinite int"),
        pytest.param({"seed": float("nan")}, id="NaN int"),
        pytest.param({"sampler": {"name": ["ddpm"]}}, id="a list for a name"),
    ],
)
def test_odd_values_are_refused(values):
    with pytest.raises(ConfigError):
        FitConfig.from_dict(values)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mixture.component", r"did you mean 'mixture\.components'\?"),
        ("mixtur.components", r"did you mean 'mixture\.components'\?"),
        ("seed.x", r"did you mean 'seed'\?"),
        ("mixture", ""),
        ("a.b.c", "known keys: seed, "),
        ("", "known keys: seed, "),
    ],
)
def test_replacing_an_unknown_setting_is_refused(name, hint):
    with pytest.raises(ConfigError, match=rf"settings: unknown key '{re.escape(name)}'; .*{hint}"):
        FitConfig().replace({name: 3})
