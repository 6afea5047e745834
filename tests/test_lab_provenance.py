"""What enters the identity of a run, and what does not."""

import subprocess
import sys

import pytest

from ssl_kit.lab import provenance
from ssl_kit.lab.errors import MissingDataError
from ssl_kit.lab.provenance import code_digests, code_version, data_fingerprint, environment, modules_reached


@pytest.fixture
def package(tmp_path):
    """A package with imports at the top, in functions, relative, by name as text, and of whole folders."""
    root = tmp_path / "ssl_kit"
    files = {
        "__init__.py": "", "lab/__init__.py": "", "lab/files.py": "x = 1",
        "lab/cli.py": "from ssl_kit.lab import report",
        "lab/report.py": "y = 1", "localize/__init__.py": "", "localize/srp.py": "from ..lab.files import x",
        "localize/registry.py": "NAMES = {'crnn': 'ssl_kit.localize.crnn:Load', 'about': 'ssl_kit.lab.report says so'}",
        "localize/crnn.py": "def load():\n    from ssl_kit.arrays import angles",
        "arrays/__init__.py": "", "arrays/angles.py": "z = 1", "arrays/rooms.py": "",
        "routing/__init__.py": "", "routing/knn.py": "", "routing/vim.py": "",
        "routing/all.py": "import importlib\nimportlib.import_module('.knn', 'ssl_kit.routing')",
        "assets/net/weights.bin": "1",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(("source", "expected"), [
    ("import ssl_kit.lab.files", {"lab.files"}),
    ("from ssl_kit.localize.srp import srp", {"localize.srp", "lab.files"}),
    ("from ssl_kit.localize import srp as s", {"localize", "localize.srp", "lab.files"}),
    ("from ssl_kit.localize.registry import NAMES", {"localize.registry", "localize.crnn", "arrays", "arrays.angles"}),
    ("from ssl_kit.routing.all import x", {"routing", "routing.all", "routing.knn", "routing.vim"}),
    ("from ssl_kit.lab.cli import main", set()),
    ("import numpy", set()),
])
def test_modules_are_followed(package, source, expected):
    assert {name.removeprefix("ssl_kit.") for name in modules_reached(source, package)} == expected


def test_a_change_counts_where_it_is_reached(package):
    source = "from ssl_kit.localize.srp import srp"
    before = code_digests(source, package)
    (package / "lab" / "report.py").write_text("y = 2")
    assert code_digests(source, package) == before
    (package / "lab" / "files.py").write_text("# a comment\nx  =  1")
    assert code_digests(source, package) == before
    (package / "lab" / "files.py").write_text("x = 2")
    assert code_digests(source, package) != before


@pytest.mark.parametrize(("source", "counts"), [
    ("open(folder / 'assets' / 'net' / 'weights.bin')", True),
    ("open('ssl_kit/assets/net/weights.bin')", True),
    ("open(folder / 'assets' / name)", True),
    ("open(folder / 'assets' / 'voices')", False),
    ("open(folder / 'net')", False),
])
def test_a_new_checkpoint_is_new_code_where_it_may_be_opened(package, source, counts):
    (package / "assets" / "voices").mkdir()
    (package / "lab" / "files.py").write_text(source)
    before = code_digests("import ssl_kit.lab.files", package)
    (package / "assets" / "net" / "weights.bin").write_text("2")
    assert (code_digests("import ssl_kit.lab.files", package) != before) == counts


@pytest.mark.parametrize(("source", "counts"), [
    ("open(folder / 'assets' / 'net' / f'weights{end}')", True),
    ("open(folder / 'assets' / 'net' / 'weights.bin')", True),
    ("open(folder / 'assets' / 'net' / f'other_{name}')", False),
    ("find_checkpoint(name, folder / 'assets' / 'net', 'weights')", True),
    ("find_checkpoint(name, folder / 'assets' / 'net', ('other', 'weights'))", True),
    ("find_checkpoint(name, folder / 'assets' / 'net', 'other')", False),
    ("find_checkpoint(name, folder / 'assets' / 'net')", True),
    ("open(folder / 'assets' / 'net' / f'other_{name}', folder / 'net')", True),  # the folder is named elsewhere too
    ("open(folder / 'assets' / 'net' / f'{name}_other')", True),
])
def test_only_assets_whose_names_begin_as_told_count(package, source, counts):
    (package / "lab" / "files.py").write_text(source)
    before = code_digests("import ssl_kit.lab.files", package)
    (package / "assets" / "net" / "weights.bin").write_text("2")
    assert (code_digests("import ssl_kit.lab.files", package) != before) == counts


def test_machinery_names_modules_that_exist():
    """A renamed module must not slip into every identity, or out of it."""
    folder = provenance.package_folder()
    for name in provenance._MACHINERY:
        assert folder.joinpath(*name.split(".")[1:]).with_suffix(".py").is_file(), name


def test_version_in_and_outside_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "ssl_kit").mkdir()
    monkeypatch.setattr(provenance, "package_folder", lambda: tmp_path / "ssl_kit")
    assert code_version()["commit"] is None and code_version()["dirty"] is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "ssl_kit" / "a.py").write_text("x = 1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    clean = code_version()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "ssl_kit" / "a.py").write_text("x = 2")
    assert code_version()["dirty"] is True


def test_environment_imports_nothing_heavy():
    script = ("import sys; from ssl_kit.lab.provenance import environment; e = environment(); "
              "assert e['packages']['numpy'] and not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)
    assert environment()["packages"]["papermill"]


def test_data_fingerprint_sees_names_and_sizes(tmp_path):
    (tmp_path / "speech" / "train").mkdir(parents=True)
    (tmp_path / "speech" / "train" / "a.flac").write_bytes(b"123")
    before = data_fingerprint(tmp_path, ["speech"])
    assert before["speech"]["files"] == 1 and before["speech"]["bytes"] == 3
    (tmp_path / "speech" / "train" / "a.flac").rename(tmp_path / "speech" / "train" / "b.flac")
    assert data_fingerprint(tmp_path, ["speech"]) != before
    with pytest.raises(MissingDataError, match="noise"):
        data_fingerprint(tmp_path, ["speech", "noise"])


def test_a_card_beside_weights_counts_for_nothing(package):
    """It is written from the results of runs that depend on the weights: they would be stale by being written of."""
    source = "open(folder / 'assets' / 'net' / name)"
    before = code_digests(source, package)
    (package / "assets" / "net" / "README.md").write_text("what was measured")
    assert code_digests(source, package) == before
    (package / "assets" / "net" / "more.bin").write_text("2")
    assert code_digests(source, package) != before
