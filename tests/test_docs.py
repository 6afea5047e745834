"""The documentation: commands and files that it shows exist, generated pages say what is there, no link is dead."""

import argparse
import functools
import html.parser
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted(p for p in (ROOT / "nbs" / "guides").iterdir() if p.suffix in (".md", ".ipynb"))
named = dict(argnames="path", argvalues=GUIDES, ids=lambda path: path.name)


def markdown_of(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def blocks(text, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for kind, body in found if kind == language]


# -- what the guides tell people to type -------------------------------------------------------------------------


@functools.cache
def parser_of(command):
    """The argument parser of a subcommand, as `ssl-kit` builds it."""
    from ssl_kit.lab.cli import COMMANDS

    module = importlib.import_module(COMMANDS[command][0])
    parser = argparse.ArgumentParser(prog=command)
    getattr(module, f"add_{command.replace('-', '_')}_arguments")(parser)
    return parser


def options_of(parser):
    """(options, subparsers) of a parser."""
    options, below = {"-h", "--help", "--debug"}, {}
    for action in parser._actions:
        options |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            below |= action.choices
    return options, below


def commands_in(text):
    """Every `ssl-kit …` of a text as words; continued lines are joined, comments and what follows a pipe left out."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"`(ssl-kit [^`\n]+)`", text)
    found += [line.strip() for kind in ("", "bash") for block in blocks(text, kind) for line in block.splitlines()
              if line.strip().startswith("ssl-kit ")]
    found += [" ".join(["ssl-kit", *words[1:]]) for block in blocks(text, "yaml")
              for document in yaml.safe_load_all(block) for words in commands_of(document)
              if words[0].endswith("ssl-kit")]
    return [shlex.split(line.split(" #")[0].split(" | ")[0]) for line in found]


def commands_of(node):
    """The `command` lists in a tree of a manifest."""
    if isinstance(node, dict):
        yield from ([node["command"]] if isinstance(node.get("command"), list) else [])
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from commands_of(child)


def unknown_in(words):
    """What of a command line the kit does not know."""
    from ssl_kit.lab.cli import COMMANDS

    if len(words) < 2 or words[1] not in COMMANDS:
        return words[1:2] or ["nothing after ssl-kit"]
    options, below = options_of(parser_of(words[1]))
    rest = words[2:]
    if below and rest:
        if rest[0] not in below:
            return rest[:1]
        options, rest = options | options_of(below[rest[0]])[0], rest[1:]
    return [word for word in rest if re.match(r"--?[a-zA-Z]", word) and word.split("=")[0] not in options]


def test_a_wrong_command_would_be_found():
    text = "`ssl-kit fly` `ssl-kit run x --speed 3` `ssl-kit kaggle hold x` `ssl-kit run x -p a=-1 --profile ci`"
    assert [unknown_in(words) for words in commands_in(text)] == [["fly"], ["--speed"], ["hold"], []]


@pytest.mark.parametrize(**named)
def test_commands_and_options_exist(path):
    for words in commands_in(markdown_of(path)):
        assert not unknown_in(words), f"{' '.join(words)}: unknown {unknown_in(words)}"


@pytest.mark.parametrize(**named)
def test_stages_and_their_parameters_exist(path):
    from ssl_kit.lab.stages import list_stages

    stages = list_stages(ROOT / "nbs" / "stages")
    for words in commands_in(markdown_of(path)):
        if words[1] in ("run", "sweep") and words[2:3] not in ([], ["STAGE"]):
            stage = stages[words[2]]
            given = [word for before, word in zip(words, words[1:], strict=False) if before in ("-p", "--grid")]
            for pair in given:
                name, _, value = pair.partition("=")
                for one in value.split(",") if words[1] == "sweep" else [value]:
                    if not one.startswith("$"):
                        stage.parameters[name].parse(one)


def test_shell_scripts_are_valid_shell():
    scripts = [script for path in GUIDES for script in blocks(markdown_of(path), "bash")]
    assert len(scripts) >= 4
    for script in scripts:
        assert script.startswith("#!/bin/bash\n#SBATCH") and "set -euo pipefail" in script
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_manifests_for_kubernetes_hold_together():
    documents = [document for path in GUIDES for block in blocks(markdown_of(path), "yaml") for document in
                 yaml.safe_load_all(block)]
    kinds = [(document["apiVersion"], document["kind"]) for document in documents]
    assert kinds == [("batch/v1", "Job"), ("v1", "Service"), ("apps/v1", "Deployment"), ("apps/v1", "Deployment")]
    labels = []
    for document in documents:
        if document["kind"] == "Service":
            continue
        template = document["spec"]["template"]
        if document["kind"] == "Deployment":
            assert document["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
            labels.append(template["metadata"]["labels"])
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            assert all(isinstance(entry["value"], str) for entry in container.get("env", []))
    service = next(document for document in documents if document["kind"] == "Service")
    assert service["spec"]["selector"] in labels
    assert any(f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}" in words
               for document in documents for words in commands_of(document))


@pytest.mark.parametrize(**named)
def test_guides_name_no_option_of_dask_that_is_not_there(path):
    pytest.importorskip("distributed")
    known = {part: importlib.import_module(f"distributed.cli.dask_{part}").main for part in ("scheduler", "worker")}
    for part, rest in re.findall(r"dask\"?,? \"?(scheduler|worker)([^\n`|]*)", markdown_of(path)):
        options = {name for parameter in known[part].params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"--[a-z][\w-]+", rest)) <= options


# -- generated pages ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / ".ci" / "docs_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return SimpleNamespace(hooks=hooks, made=hooks.docs_pages)


def test_every_parameter_of_every_stage_is_in_the_table(pages):
    from ssl_kit.lab.stages import list_stages

    text = pages.made.stages_page(pages.hooks.TRACKS)
    for stage in list_stages(ROOT / "nbs" / "stages").values():
        part = text.partition(f"\n## {stage.name}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| .*? \| `([^`]+)` \|", part, re.MULTILINE)
        assert rows == [(name, p.type_text.replace("|", "\\|")) for name, p in stage.parameters.items()]
    row = re.search(r"^\| `n_test` .*$", text.partition("\n## localize_banks\n")[2], re.MULTILINE)[0]
    assert row.rstrip(" |").split(" | ")[3:] == ["`240`", "`48`", "`2009`"]  # quick, ci, full


def test_every_public_name_is_in_the_index(pages):
    import ssl_kit.routing.thresholds as module

    text = pages.made.api_pages(pages.hooks.TRACKS)["api_routing.md"]
    part = text.partition("## ssl_kit.routing.thresholds\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)`", part, re.MULTILINE))
    own = {name for name in module.__all__ if getattr(getattr(module, name), "__module__", "") == module.__name__}
    assert own and own <= listed


def test_every_set_and_every_checkpoint_has_a_card(pages):
    cards = pages.made.card_pages()
    sets = {f"data_{path.stem}.md" for path in (ROOT / "data_manifests").glob("*.yaml")}
    networks = {f"model_{path.name}.md" for path in (ROOT / "ssl_kit" / "assets" / "checkpoints").iterdir()}
    assert set(cards) == {"index.md"} | sets | networks
    for name in sets:
        manifest = yaml.safe_load((ROOT / "data_manifests" / f"{name[5:-3]}.yaml").read_text(encoding="utf-8"))
        assert pages.made.cell(manifest["licence"]["name"]) in cards[name]
        assert pages.made.cell(manifest["citation"]) in cards[name]
    for name in networks:
        folder = ROOT / "ssl_kit" / "assets" / "checkpoints" / name[6:-3]
        assert (folder / "README.md").read_text(encoding="utf-8").strip().partition("\n")[2].strip() in cards[name]


def test_a_test_that_pages_speak_of_must_exist(pages):
    path = ROOT / "tests" / "test_docs.py"
    text = pages.made.tests_page(path, {"test_a_wrong_command_would_be_found"})
    assert "## test_a_wrong_command_would_be_found" in text and "ssl-kit fly" in text
    with pytest.raises(KeyError):
        pages.made.tests_page(path, {"test_nothing"})


def test_lessons_point_to_tests_that_exist(pages):
    found = pages.hooks.TEST_LINK.findall((ROOT / "nbs" / "guides" / "lessons.md").read_text(encoding="utf-8"))
    assert len(found) >= 30
    for file, name in found:
        assert f"def {name}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")


def test_links_count_from_the_sites_folder(pages):
    as_page = pages.hooks.as_page
    assert as_page("[a](../figures/b.png) [c](../nbs/lab/d.ipynb)", 0) == "[a](figures/b.png) [c](lab/d.ipynb)"
    assert as_page("[a](../../figures/b.png) [c](../lab/d.ipynb)", 1) == "[a](../figures/b.png) [c](../lab/d.ipynb)"
    assert as_page("[t](../../tests/test_x.py#test_y)", 1) == "[t](../tests/test_x.md#test_y)"


def test_large_styles_are_kept_once(pages, tmp_path):
    style = ".a { color: red }" * 5000
    text = f'<style type="text/css">{style}</style><style type="text/css">.b {{}}</style>'
    config = SimpleNamespace(site_dir=str(tmp_path))
    short = pages.hooks.kept_once(text, SimpleNamespace(url="lab/x.html"), config)
    sheet = re.search(r'href="\.\./(assets/stylesheets/notebook\.\w+\.css)"', short)[1]
    assert (tmp_path / sheet).read_text(encoding="utf-8") == style and ".b {}" in short and len(short) < 300
    assert 'href="assets/' in pages.hooks.kept_once(text, SimpleNamespace(url="x.html"), config)


# -- the built site ----------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Anchors of a page, what it links to, and what it would fetch."""

    FETCHED = {"script": "src", "img": "src", "iframe": "src", "audio": "src", "video": "src", "source": "src",
               "link": "href", "object": "data", "embed": "src"}

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.fetched = set(), [], []
        self.feed(text)
        self.fetched += re.findall(r"url\(\s*['\"]?(https?:[^)'\"]+)|@import\s+['\"](https?:[^'\"]+)", text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in self.FETCHED and values.get(self.FETCHED[tag]) and values.get("rel") != "canonical":
            self.fetched.append(values[self.FETCHED[tag]])


def faults_of(site):
    """Dead links, dead anchors, and what would come from another server, as lines of text."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}
    read = {path: Page(text) for path, text in texts.items() if path.name != "404.html"}
    faults = []
    for path, page in read.items():
        where = path.relative_to(site).as_posix()
        for target in map("".join, page.fetched):
            parts = urlsplit(target)
            if parts.scheme in ("http", "https") or target.startswith("//"):
                faults.append(f"{where}: fetches {target}")
            elif parts.scheme != "data" and not (path.parent / unquote(parts.path)).exists():
                faults.append(f"{where}: {target} is not there")
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme or target.startswith("//"):
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file():
                faults.append(f"{where}: {target} leads nowhere")
            elif parts.fragment and there in read and unquote(parts.fragment) not in read[there].anchors:
                faults.append(f"{where}: {target} has no such anchor")
    return faults


def test_faults_of_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="b.html#there">b</a><a href="c.html">c</a><a href="#here">h</a>'
        '<img src="https://example.org/x.png"><a href="https://example.org">fine</a>', encoding="utf-8")
    (tmp_path / "b.html").write_text('<img src="gone.png"><style>a{background:url(https://example.org/y)}</style>',
                                     encoding="utf-8")
    assert len(faults_of(tmp_path)) == 5


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site: the folder that SSL_KIT_SITE names, or built here."""
    if named_site := os.environ.get("SSL_KIT_SITE"):
        return Path(named_site).resolve()
    pytest.importorskip("mkdocs_jupyter")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_no_link_of_the_site_is_dead_and_nothing_is_fetched_from_elsewhere(site):
    faults = faults_of(site)
    assert not faults, "\n".join(faults[:40])


@pytest.mark.slow
def test_guides_show_what_their_cells_drew(site):
    for name in ("tutorial_localize", "tutorial_enhance", "tutorial_nearfield", "tutorial_fewshot", "own_array"):
        assert "data:image/png;base64" in (site / "guides" / f"{name}.html").read_text(encoding="utf-8"), name


@pytest.mark.slow
def test_pages_are_small(site):
    large = {path.relative_to(site).as_posix(): path.stat().st_size for path in site.rglob("*.html")
             if path.stat().st_size > 1_500_000}
    assert not large
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 120e6
