"""Whatever a file or an override holds: a configuration, or one ConfigError that says what is wrong."""

import random
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmshearing.config import Config, ConfigError, all_keys, load_config

ROOT = Path(__file__).resolve().parent.parent
RECIPE = (ROOT / "configs" / "tiny" / "prune.yaml").read_text(encoding="utf-8")

ODD = ["3ba", "${seed}", "${", "???"]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(ODD))
KEYS = st.one_of(st.sampled_from([key.rpartition(".")[2] for key in all_keys()]), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)
bounded = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def load(path: Path, content: str | bytes, overrides: list[str] = ()) -> Config | ConfigError:
    """The outcome; anything else that is raised fails the test."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        return load_config(path, overrides)
    except ConfigError as error:
        assert error.problems and all(isinstance(problem, str) and problem for problem in error.problems)
        return error


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fuzzed.yaml"


@bounded
@given(st.binary(max_size=60))
def test_any_bytes(file: Path, content: bytes) -> None:
    assert isinstance(load(file, content), ConfigError)


@bounded
@given(st.text(max_size=60))
def test_any_text(file: Path, content: str) -> None:
    assert isinstance(load(file, content), ConfigError)


@bounded
@given(st.integers(0, 2**32))
def test_a_recipe_with_bytes_changed(file: Path, seed: int) -> None:
    generator = random.Random(seed)
    content = bytearray(RECIPE.encode())
    for _ in range(generator.randint(1, 6)):
        place = generator.randrange(len(content))
        content[place : place + generator.randint(0, 3)] = bytes(
            generator.choices(b"\x00\n\t :-{}[]$&*!|>'\"#%@`x0.", k=2)
        )
    load(file, bytes(content))


@bounded
@given(st.sampled_from(all_keys()), VALUES)
def test_a_recipe_with_any_structure_in_a_key(file: Path, key: str, value: object) -> None:
    made = yaml.safe_load(RECIPE)
    place, (*path, last) = made, key.split(".")
    for part in path:
        place[part] = place[part] if isinstance(place.get(part), dict) else {}
        place = place[part]
    place[last] = value
    load(file, yaml.safe_dump(made, allow_unicode=True))


@bounded
@given(
    st.lists(
        st.one_of(st.text(max_size=20), st.builds("{}={}".format, st.sampled_from(all_keys()), st.text(max_size=9))),
        max_size=3,
    )
)
def test_any_overrides(file: Path, overrides: list[str]) -> None:
    load(file, RECIPE, overrides)
