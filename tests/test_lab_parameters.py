"""Strict parameters: what is declared, what is refused, and what the message says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.errors import ParameterError
from ssl_kit.lab.parameters import Parameter, nearest, parse_parameters, resolve, split_pair

CELL = """
seed: int = 0  # random seed
rate: float = 0.3
corpus: str = "embedded"  # embedded, librispeech
dry: bool = False
snr_db: list[float] = [0, 10.0]  # signal-to-noise ratios
arrays: list[str] = ["6cm"]
limit: int | None = None
"""


def test_declaration_is_read():
    declared = parse_parameters(CELL, "demo.ipynb")
    assert list(declared) == ["seed", "rate", "corpus", "dry", "snr_db", "arrays", "limit"]
    assert declared["snr_db"] == Parameter("snr_db", "float", [0.0, 10.0], "signal-to-noise ratios", many=True)
    assert declared["limit"].type_text == "int | None" and declared["limit"].default is None


@pytest.mark.parametrize(("cell", "complaint"), [
    ("seed = 0", "name: type = value"),
    ("seed: int", "name: type = value"),
    ("import os", "name: type = value"),
    ("seed: int = int(3)", "literal default"),
    ("seed: dict = {}", "expected a type"),
    ("seed: list[list[int]] = []", "expected a type"),
    ("seed: int = 1.5", "expects int"),
    ("seed: int = True", "expects int"),
    ("seed: int = 0\nseed: int = 1", "declared twice"),
    ("seed: int = ", "no valid Python"),
])
def test_a_cell_that_declares_badly_is_refused(cell, complaint):
    with pytest.raises(ParameterError, match=complaint) as caught:
        parse_parameters(cell, "demo.ipynb")
    assert "demo.ipynb" in str(caught.value)


def test_a_parameters_cell_is_never_executed(tmp_path):
    with pytest.raises(ParameterError):
        parse_parameters(f"x: int = open({str(tmp_path / 'made')!r}, 'w').write('')", "evil.ipynb")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("name", "text", "value"), [
    ("seed", "7", 7), ("seed", " -7 ", -7), ("rate", "1", 1.0), ("rate", "1e-3", 0.001), ("dry", "true", True),
    ("dry", "False", False), ("corpus", "librispeech", "librispeech"), ("corpus", "a=b", "a=b"),
    ("snr_db", "-5,0, 5", [-5.0, 0.0, 5.0]), ("snr_db", "[1, 2]", [1.0, 2.0]), ("snr_db", "", []),
    ("snr_db", "3", [3.0]), ("arrays", "6cm,12cm", ["6cm", "12cm"]), ("arrays", "['6cm']", ["6cm"]),
    ("limit", "none", None), ("limit", "4", 4),
])
def test_text_becomes_a_value(name, text, value):
    found = parse_parameters(CELL, "demo")[name].parse(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("name", "text"), [
    ("seed", "1.0"), ("seed", "one"), ("seed", ""), ("seed", "none"), ("rate", "fast"), ("rate", "nan"),
    ("rate", "inf"), ("dry", "1"), ("dry", "yes"), ("snr_db", "1,,2"), ("snr_db", "1;2"), ("limit", "null"),
])
def test_wrong_text_is_refused_with_name_type_and_what_was_found(name, text):
    declared = parse_parameters(CELL, "demo")[name]
    with pytest.raises(ParameterError) as caught:
        declared.parse(text)
    assert all(part in str(caught.value) for part in (name, declared.type_text))


def test_a_whole_number_beyond_all_floats_is_refused():
    with pytest.raises(ParameterError, match="'x'"):
        Parameter("x", "float", None).check(10**400)


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans())
def test_a_value_is_taken_as_the_declared_type_or_refused(value):
    for kind, allowed in [("int", (int,)), ("float", (int, float)), ("bool", (bool,))]:
        parameter = Parameter("x", kind, None)
        if type(value) in allowed:
            expected = float(value) if kind == "float" else value  # beyond 2**53 a float is not every integer
            assert parameter.check(value) == expected and type(parameter.check(value)).__name__ == kind
        else:
            with pytest.raises(ParameterError):
                parameter.check(value)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_lists_survive_the_command_line(values):
    assert Parameter("x", "float", None, many=True).parse(",".join(map(repr, values))) == values


def test_layers():
    declared = parse_parameters(CELL, "demo")
    values = resolve(declared, ("profile ci", {"seed": 1, "rate": 0}), ("-p", {"seed": 2}))
    assert (values["seed"], values["rate"], values["corpus"]) == (2, 0.0, "embedded")
    with pytest.raises(ParameterError, match="profile ci: unknown parameter 'sed'; did you mean 'seed'"):
        resolve(declared, ("profile ci", {"sed": 1}))
    with pytest.raises(ParameterError, match="profile ci"):
        resolve(declared, ("profile ci", {"snr_db": 3.0}))


def test_nearest_name_or_the_list():
    assert nearest("corpsu", ["corpus", "seed"]) == "did you mean 'corpus'?"
    assert nearest("zzz", ["corpus", "seed"]) == "there are: corpus, seed"
    assert nearest("zzz", []) == "there are: none"


def test_pairs():
    assert split_pair("a=b=c") == (None, "a", "b=c")
    assert split_pair("train.epochs=3") == ("train", "epochs", "3")
    for text in ("a", "=3", "a b=3", "t.x.y=1", "1=2", ".a=1"):
        with pytest.raises(ParameterError, match="expected key=value"):
            split_pair(text)
