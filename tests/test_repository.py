"""The repository keeps its own rules: sizes, layers, docstrings, what is imported, what is written down."""

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT / "ssl_kit").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
# Which tracks a track may import; modules of another track are named as text where a registry needs them.
LAYERS = {"lab": {"lab"}, "arrays": {"lab", "arrays"}, "localize": {"lab", "arrays", "localize"},
          "nearfield": {"lab", "arrays", "nearfield"}, "routing": {"lab", "routing"}, "enhance": {"lab", "enhance"},
          "fewshot": {"lab", "fewshot"}, "apps": {"lab", "arrays", "localize", "routing", "enhance", "apps"}}
EXCEPTIONS = {("routing", "arrays.angles")}  # the circle
name_of = dict(argnames="path", ids=lambda path: path.relative_to(ROOT).as_posix())


def settings():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def imported(path):
    """Absolute dotted names that a module imports, with `from a import b` as a.b."""
    package = ("ssl_kit", *path.relative_to(ROOT / "ssl_kit").parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_imported_resolves_relative_names():
    names = set(imported(ROOT / "ssl_kit" / "lab" / "figures.py"))
    assert "ssl_kit.lab.files.atomic_path" in names and "ssl_kit.__version__" in names


@pytest.mark.parametrize(argvalues=MODULES, **name_of)
def test_imports_point_one_way(path):
    track = path.relative_to(ROOT / "ssl_kit").parts[0]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in ("nbdev", "fastcore", "execnb"), f"the package may not import {name}"
        if parts[0] == "ssl_kit" and len(parts) > 2 and parts[1] in LAYERS and len(parts) >= 3:
            allowed = parts[1] in LAYERS[track] or (track, ".".join(parts[1:3])) in EXCEPTIONS
            assert allowed, f"{track} may import {sorted(LAYERS[track])}, found {name}"


@pytest.mark.parametrize(argvalues=MODULES, **name_of)
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring (the notebook's > line)"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize(argvalues=MODULES, **name_of)
def test_modules_are_short_and_narrow(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 450, f"{len(lines)} lines: split the notebook"
    exported = next(k for k, line in enumerate(lines) if line.startswith("__all__"))
    closing = next(k for k in range(exported, len(lines)) if lines[k].endswith("]"))
    long = [k + 1 for k, line in enumerate(lines) if len(line) > 120 and not exported <= k <= closing]
    assert not long, f"longer than 120: lines {long}"


@pytest.mark.parametrize(argvalues=NOTEBOOKS, **name_of)
def test_notebooks_are_short_clean_and_begin_with_a_title(path):
    text = path.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    assert len(text) <= 150_000 and len(cells) <= 100
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] is None for cell in code)
    assert sum(len(json.dumps(cell["outputs"])) for cell in code) <= 4000
    first = next("".join(cell["source"]) for cell in cells
                 if cell["cell_type"] == "markdown" and not "".join(cell["source"]).startswith("---"))
    assert re.match(r"# \S.*\n\n> \S", first), "expected '# Title' and a line '> what it is for'"


@pytest.mark.parametrize(argvalues=MODULES, **name_of)
def test_every_module_has_its_notebook(path):
    inside = path.relative_to(ROOT / "ssl_kit").with_suffix(".ipynb")
    assert (ROOT / "nbs" / inside).is_file()


def tracked_texts():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 1_000_000:
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_path_of_one_machine_is_written_down():
    here = re.escape(f"{ROOT}/")
    home = re.compile(rf"(?<![\w./~-])(?:{here}|/home/(?!USER)\w+/|/root/|/Users/\w+/|[A-Z]:\\\\Users)")
    found = [f"{name}: {match[0]}" for name, text in tracked_texts() if name != "tests/test_repository.py"
             for match in [home.search(text)] if match]
    assert not found


def test_no_large_file_is_tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    large = [name for name in filter(None, listed.stdout.split("\0"))
             if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 7_000_000]
    assert not large


def test_constraints_pin_everything_that_settings_ask_for():
    from packaging.requirements import Requirement

    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for key in ("requirements", "dev_requirements", "docs_requirements"):
        for text in settings()[key].split():
            requirement = Requirement(text)
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            assert requirement.specifier.contains(pinned[name]), f"{text} does not admit {name}=={pinned[name]}"


def test_settings_keep_what_stages_and_export_rely_on():
    values = settings()
    assert values["allowed_cell_metadata_keys"] == "tags" and values["update_pyproject"] == "False"
    assert "nbdev==2.4.14" in values["dev_requirements"].split() and "nbdev" not in values["requirements"]
    version = re.search(r'"(.+)"', (ROOT / "ssl_kit" / "__init__.py").read_text())[1]
    assert version == values["version"] == re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]


def test_readme_is_made_from_the_index_notebook():
    check = subprocess.run([sys.executable, ROOT / ".ci" / "readme.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_readme_points_at_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http") and not target.startswith("figures/"):
            assert (ROOT / target).is_file(), target
    from ssl_kit.lab.cli import COMMANDS

    for command in re.findall(r"`ssl-kit ([\w-]+)", text):
        assert command in COMMANDS, f"README speaks of ssl-kit {command}"


def test_package_does_not_load_what_it_does_not_need():
    code = ("import sys, ssl_kit.lab.cli; "
            "print({'nbdev', 'fastcore', 'torch', 'pandas', 'matplotlib', 'librosa'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_site_shows_every_notebook_and_its_links_lead_to_pages():
    pytest.importorskip("latex2mathml")
    import importlib.util
    import shutil
    from types import SimpleNamespace

    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / ".ci" / "docs_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    config = hooks.on_config(SimpleNamespace())
    docs = Path(config.docs_dir)
    try:
        shown = set(re.findall(r"[\w/]+\.ipynb", json.dumps(config.nav)))
        kept = {path.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS} - {"index.ipynb"}
        assert shown == kept | {"overview.ipynb"}  # the front page is another
        for page in docs.rglob("*.ipynb"):
            cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
            text = "\n".join(c["source"] for c in cells if c["cell_type"] == "markdown")
            for target in re.findall(r"\]\(([^)#]+)\)", text):
                if not target.startswith(("http", "figures/")):
                    found = [page.parent / target] + [(page.parent / target).with_suffix(s) for s in (".md", ".ipynb")]
                    assert any(path.is_file() for path in found), f"{page.name}: {target}"
                    assert not target.endswith((".md", ".ipynb")), f"{page.name}: the page of {target} is .html"
    finally:
        shutil.rmtree(docs)
