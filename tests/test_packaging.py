"""What is built from the repository: a wheel that works without a clone, an archive of the source that is whole."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import ssl_kit

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for folder in ("ssl_kit", "scripts", "tests", ".ci") for path in (ROOT / folder).rglob("*.py"))
NOTEBOOKS = sorted(path for folder in ("stages", "guides") for path in (ROOT / "nbs" / folder).glob("[!_.]*.ipynb"))
# Gone in 3.12, then in 3.13 (PEP 594); pkg_resources goes with newer setuptools.
GONE = frozenset("""asynchat asyncore distutils imp smtpd
aifc audioop cgi cgitb chunk crypt imghdr lib2to3 mailcap msilib nis nntplib ossaudiodev pipes sndhdr spwd sunau
telnetlib uu xdrlib pkg_resources""".split())
GONE_NAMES = frozenset("""configparser.SafeConfigParser importlib.find_loader pkgutil.ImpImporter pkgutil.ImpLoader
sqlite3.enable_shared_cache ssl.RAND_pseudo_bytes ssl.match_hostname ssl.wrap_socket
locale.resetlocale re.template typing.io typing.re unittest.findTestCases unittest.makeSuite
webbrowser.MacOSX""".split())


def settings():
    """The DEFAULT section of settings.ini."""
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def sources():
    """(name, code) of every module, and of notebooks that export none, without the lines that are IPython's."""
    for path in (*MODULES, ROOT / "setup.py"):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").splitlines()
        yield path.relative_to(ROOT).as_posix(), "\n".join(
            "pass" if line.lstrip()[:1] in ("%", "!") else line for line in lines)


def outdated(code, version):
    """What Python `version` lacks of what the code imports or names."""
    found = set()
    for node in ast.walk(ast.parse(code, feature_version=version)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & GONE
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module.split(".")[0]} & GONE
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & GONE_NAMES
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {f"{node.value.id}.{node.attr}"} & GONE_NAMES
    return found


def test_nothing_is_used_that_newer_pythons_lack():
    """The syntax of 3.11, the least that is promised, and none of what 3.12 and 3.13 took away."""
    found = {name: outdated(code, (3, 11)) for name, code in sources()}
    assert len(found) > 300 and not {name: gone for name, gone in found.items() if gone}
    assert outdated("import distutils.util\nfrom imp import reload\nimport ssl\nssl.wrap_socket", (3, 11)) == {
        "distutils", "imp", "ssl.wrap_socket"}


@pytest.mark.parametrize("python", ["3.11.0", "3.11.2", "3.12.0", "3.13.0"])  # 3.11.2 is Debian 12's
def test_every_pinned_version_runs_on_the_pythons_that_are_promised(python):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    installed = {re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one for one in metadata.distributions()}
    refused = [f"{name} {version} needs {needed}" for name, version in pins.items() if name in installed
               and installed[name].version.split("+")[0] == version
               and not SpecifierSet(needed := installed[name].metadata.get("Requires-Python", "")).contains(python)]
    assert not refused and len(pins.keys() & installed.keys()) > 100


def test_version_and_licence_are_told_alike():
    cited, known = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")), settings()
    assert cited["version"] == known["version"] == ssl_kit.__version__
    assert cited["license"] == "MIT" and (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert cited["authors"] and cited["cff-version"] == "1.2.0" and cited["title"] and cited["message"]
    assert f"## {known['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(word in told for word in ("nbdev_export", "nbdev_update", "make check", "make test", "stage notebook"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The package as a wheel has it."""
    folder = tmp_path_factory.mktemp("built")
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)], cwd=ROOT, check=True,
                   capture_output=True)
    return folder


def test_a_wheel_needs_no_clone(built, tmp_path):
    """Stages and manifests come along: from an empty folder all of them are listed, and the doctor is content."""
    for source, target in (("nbs/stages", "stages"), ("data_manifests", "data_manifests")):
        there = {path.name: path.read_bytes() for path in (built / "ssl_kit" / target).iterdir()}
        assert there == {path.name: path.read_bytes() for path in (ROOT / source).glob("[!_.]*") if path.is_file()}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SSL_KIT_")}

    def told(*arguments):
        return subprocess.run([sys.executable, "-m", "ssl_kit.lab.cli", *arguments], cwd=tmp_path, check=True,
                              text=True, capture_output=True, env=clean | {"PYTHONPATH": str(built)}).stdout

    listed = told("list", "--json")
    known = {path.stem for path in (ROOT / "nbs" / "stages").glob("[!_.]*.ipynb")}
    assert {stage["name"] for stage in json.loads(listed)["stages"]} == known
    assert "realman" in told("data", "list")


def test_the_archive_of_the_source_is_whole(tmp_path):
    """Every tracked file but what git itself needs, and figures in the forms that neither README nor site show."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)], cwd=ROOT, check=True,
                   capture_output=True)
    packed = set(next(tmp_path.glob("*.egg-info/SOURCES.txt")).read_text(encoding="utf-8").splitlines())
    left_out = set(tracked.stdout.splitlines()) - packed
    assert {name for name in left_out if Path(name).parts[0] != "figures" or name.endswith(".png")} == {".gitignore"}
