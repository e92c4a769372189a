from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledbsoma_ml._common import (
    absolute_path,
    absolute_uri,
    cache_folder,
    check_bool,
    check_count,
    check_name,
    nearest_names,
    seeded_rng,
)


def draws(rng: np.random.Generator) -> list[int]:
    return rng.integers(2**62, size=8).tolist()


@given(seed=st.integers(0, 2**70))
def test_epoch_0_is_the_stream_of_the_seed_alone(seed: int) -> None:
    plain = draws(np.random.default_rng(seed))
    assert draws(seeded_rng(seed)) == draws(seeded_rng(seed, 0)) == plain
    assert draws(np.random.default_rng([seed, 0])) == plain


@given(seed=st.integers(0, 1000), epoch=st.integers(0, 1000))
def test_every_epoch_and_seed_has_its_own_stream_which_repeats(seed: int, epoch: int) -> None:
    stream = draws(seeded_rng(seed, epoch))
    assert draws(seeded_rng(seed, epoch)) == stream
    assert draws(seeded_rng(seed, epoch + 1)) != stream
    assert draws(seeded_rng(seed + 1, epoch)) != stream


def test_without_a_seed_every_generator_differs() -> None:
    assert draws(seeded_rng(None)) != draws(seeded_rng(None))


@pytest.mark.parametrize(
    ("given", "beginning"), [("{home}/mine", "mine"), ("~/mine", "mine"), ("", None), (None, None)]
)
def test_the_cache_folder_is_where_the_environment_says_or_else_below_the_home_directory(
    given: str | None, beginning: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    usual = cache_folder().parent
    assert usual in (tmp_path / ".cache", tmp_path / "Library" / "Caches")
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given.format(home=tmp_path))
    expected = usual if beginning is None else tmp_path / beginning
    assert cache_folder() == expected / "tiledbsoma_ml"
    assert not list(tmp_path.iterdir())


def test_an_empty_path_or_uri_is_refused_in_place_of_the_working_directory() -> None:
    with pytest.raises(ValueError, match=r"^window_dir='' must not be empty; try '\.' for the working dire"):
        absolute_path("", "window_dir")
    with pytest.raises(ValueError, match=r"^uri='' must not be empty"):
        absolute_uri("")
    assert absolute_path(".") == Path.cwd() == Path(absolute_uri("."))


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_a_bool_of_python_or_numpy_is_a_bool(value: Any) -> None:
    assert check_bool("shuffle", value) is bool(value)


@pytest.mark.parametrize("value", ["no", "False", 0, 1, None, np.int64(1), np.array([True])])
def test_what_is_no_bool_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^shuffle=.* must be True or False, not a \w+; try shuffle=True\.$"):
        check_bool("shuffle", value)


@pytest.mark.parametrize("value", [1, 7, np.int32(7), np.uint64(2**63)])
def test_a_count_of_any_integer_type_becomes_an_int(value: Any) -> None:
    count = check_count("batch_size", value, 128)
    assert type(count) is int
    assert count == value


def test_a_count_may_be_as_small_as_its_minimum() -> None:
    assert check_count("epoch", 0, 0, minimum=0) == 0


@pytest.mark.parametrize("value", [True, 2.0, "2", None, np.float64(2)])
def test_a_count_that_is_not_an_integer_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        check_count("batch_size", value, 128)
    name = type(value).__name__
    assert str(caught.value) == f"batch_size={value!r} must be a positive integer, not a {name}; try 128."


@pytest.mark.parametrize(
    ("value", "minimum", "rule"),
    [(0, 1, "a positive integer"), (-3, 1, "a positive integer"), (-1, 0, "an integer of at least 0")],
)
def test_a_count_below_its_minimum_is_a_value_error(value: int, minimum: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^batch_size={value} must be {rule}; try 128\.$"):
        check_count("batch_size", value, 128, minimum=minimum)


def test_a_known_name_is_returned() -> None:
    assert check_name("layer_name", "raw", iter(["counts", "raw"]), of="a layer") == "raw"


def test_an_unknown_name_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^layer_name='rwa' must be a layer; did you mean 'raw'\?$"):
        check_name("layer_name", "rwa", ["counts", "raw"], of="a layer")


@pytest.mark.parametrize(
    ("name", "known", "way_out"),
    [
        ("tisue", ["disease", "tissue"], "did you mean 'tissue'?"),
        ("cell_typ", ["cell_type", "cell_typo"], "did you mean 'cell_typo' or 'cell_type'?"),
        ("zzz", ["a", "b"], "there are 'a', 'b'."),
        ("zzz", [], "there are none."),
        ("zzz", list("abcdefghijkl"), f"there are {', '.join(map(repr, 'abcdefghij'))} and 2 more."),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest_or_else_with_all(
    name: str, known: list[str], way_out: str
) -> None:
    assert nearest_names(name, known) == way_out


def test_a_name_that_is_no_string_is_answered_too() -> None:
    assert nearest_names(3, ["3x", "b"]) == "did you mean '3x'?"  # type: ignore[arg-type]
