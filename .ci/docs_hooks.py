"""mkdocs hooks: pages from notebooks and from what the repository says of itself; nothing from other servers."""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from latex2mathml.converter import convert

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import docs_pages  # noqa: E402

ROOT = docs_pages.ROOT
TRACKS = {"lab": "Lab", "arrays": "Arrays and rooms", "localize": "Localization", "routing": "Routing",
          "enhance": "Speech enhancement", "nearfield": "Near field", "fewshot": "Few-shot detection", "apps": "Pages",
          "stages": "Stages"}
GUIDES = {
    "Tutorials": ("guides/tutorial_localize", "guides/tutorial_enhance", "guides/tutorial_nearfield",
                  "guides/tutorial_fewshot"),
    "How to": ("localize/own_recordings", "guides/own_array", "routing/new_detector", "guides/own_data",
               "guides/explore", "lab/kaggle_guide", "guides/thesis", "guides/many_machines"),
}
AS_WRITTEN = ("lab/kaggle_guide",)  # not executed: it would show folders of the machine that builds
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff")
FRONT = "guides/front.md"  # index.html; the README's notebook is the page overview.html
AT_LENGTH = "The kit at length"
FORMULA = re.compile(r"(<(?:code|pre|script|style|textarea)\b.*?</(?:code|pre|script|style|textarea)>)"
                     r"|\$\$(.+?)\$\$|(?<![\\\w$])\$(?!\s)([^$\n<]+?)(?<!\s)\$(?![\w$])", re.DOTALL)
# What the notebook exporter adds for MathJax and mermaid, both of which it would fetch from elsewhere.
FOREIGN = re.compile(r'<script src="">\s*</script>|<script type="text/x-mathjax-config">.*?</script>'
                     r'|<script type="module">(?:(?!</script>).)*?mermaid.*?</script>', re.DOTALL)
# The same half a megabyte of style in every notebook's page: kept once, beside the theme's.
STYLE = re.compile(r'<style type="text/css">(.*?)</style>', re.DOTALL)
LARGE = 50_000
TEST_LINK = re.compile(r"\]\((?:\.\./)+tests/(test_\w+)\.py#(test_\w+)\)")


def pages_of(folder):
    return sorted((ROOT / "nbs" / folder).glob("[!._]*.ipynb"))


def heading(path):
    """The first heading of a page, without the quotes of code."""
    text = path.read_text(encoding="utf-8")
    cells = [c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"] \
        if path.suffix == ".ipynb" else [text]
    found = next(filter(None, (re.search(r"^# (.+)$", "".join(cell), re.MULTILINE) for cell in cells)), None)
    return found[1].replace("`", "") if found else path.stem


def as_page(text, depth):
    """A text whose links lead to the site's folder, from a page `depth` folders down, instead of to the checkout."""
    here, above = "../" * depth, re.escape("../" * (depth + 1))
    text = TEST_LINK.sub(rf"]({here}tests/\1.md#\2)", text)
    text = re.sub(rf"\]\({above}(?:nbs/|(?=figures/|C[A-Z]+\.))", f"]({here}", text)
    return text.replace(f"]({here}index.ipynb", f"]({here}overview.ipynb")


def reading_copy(text, depth):
    """A notebook without nbdev's directives, the cells that hide and the front matter."""
    notebook, cells = json.loads(text), []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "raw" or re.match(r"#\|\s*hide|---\n", source):
            continue
        if cell["cell_type"] == "code":
            source = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
        else:
            source = re.sub(r"(\]\([\w./-]+)\.(?:md|ipynb)(?=[)#])", r"\1.html", as_page(source, depth))
            # the anchors of a heading and of the table of contents differ where it has code in it
            source = re.sub(r"^#+ .*`.*$", lambda line: line[0].replace("`", ""), source, flags=re.MULTILINE)
        if source:
            shown = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
            cells.append({**cell, "source": source} | ({"outputs": shown} if cell["cell_type"] == "code" else {}))
    # the state of widgets, pictures and sounds included, is of no use without a kernel
    about = {key: value for key, value in notebook["metadata"].items() if key not in ("papermill", "widgets")}
    return json.dumps({**notebook, "cells": cells, "metadata": about})


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_sources(docs):
    """Notebooks and the guides' markdown; returns {test file: names of tests} that the pages link to."""
    wanted = {}
    for folder in ("", "guides", *TRACKS):
        for path in [*pages_of(folder), *sorted((ROOT / "nbs" / folder).glob("*.md"))]:
            text, depth = path.read_text(encoding="utf-8"), int(bool(folder))
            for file, name in TEST_LINK.findall(text):
                wanted.setdefault(file, set()).add(name)
            target = docs / folder / path.name
            if target == docs / FRONT:
                target, depth = docs / "index.md", 0
                text = re.sub(r"\]\((?=[\w-]+\.(?:ipynb|md))", "](guides/", text).replace("](../", "](")
            elif target == docs / "index.ipynb":
                target, text = docs / "overview.ipynb", text.replace('"# ssl_kit\\n', f'"# {AT_LENGTH}\\n', 1)
            write(target, reading_copy(text, depth) if path.suffix == ".ipynb" else as_page(text, depth))
    return wanted


def guide(name):
    """A page of nbs/ by its path without suffix, as an entry of the navigation."""
    path = next((ROOT / "nbs").glob(f"{name}.*"))
    return {heading(path): path.relative_to(ROOT / "nbs").as_posix()}


def on_config(config):
    docs = Path(tempfile.mkdtemp(prefix="ssl_kit_docs_"))
    tests = {f"tests/{name}.md": docs_pages.tests_page(ROOT / "tests" / f"{name}.py", wanted)
             for name, wanted in sorted(write_sources(docs).items())}
    names = {f"reference/{name}": text for name, text in docs_pages.api_pages(TRACKS).items()}
    cards = {f"cards/{name}": text for name, text in docs_pages.card_pages().items()}
    made = {"reference/stages.md": docs_pages.stages_page(TRACKS), **names, **cards, **tests}
    for name, text in made.items():
        write(docs / name, text)
    (docs / "figures").mkdir()
    write(docs / "assets" / "stylesheets" / "ssl_kit.css", (HERE / "docs_style.css").read_text(encoding="utf-8"))
    for path in [*(ROOT / "figures").glob("*.png"), *(ROOT / name for name in BESIDE)]:
        shutil.copy(path, docs / "figures" if path.suffix == ".png" else docs)
    title_of = {name: text.partition("\n")[0].lstrip("# ") for name, text in made.items()}
    guides = {name for names in GUIDES.values() for name in names}
    notebooks = {title: [{heading(path): f"{folder}/{path.name}"} for path in pages_of(folder)
                         if f"{folder}/{path.stem}" not in guides] for folder, title in TRACKS.items()}
    reference = [{title_of[name]: name} for name in ("reference/stages.md", "reference/api.md")]
    config.docs_dir, config.nav = str(docs), [
        {"Start": [{"Start": "index.md"}, {AT_LENGTH: "overview.ipynb"}, guide("guides/lessons"),
                   guide("guides/hard_knocks"), {"Conventions": "conventions.ipynb"}]},
        *({title: [guide(name) for name in names]} for title, names in GUIDES.items()),
        {"Reference": [*reference,
                       {"Names by track": [{title_of[n]: n} for n in names if n != "reference/api.md"]},
                       {"Cards": [{"Data and model cards": "cards/index.md"},
                                  *({title_of[n]: n} for n in cards if n != "cards/index.md")]}]},
        {"Notebooks": [{title: pages} for title, pages in notebooks.items()]},
        {"Project": [{"Changing something": "CONTRIBUTING.md"}, {"Changelog": "CHANGELOG.md"},
                     {"Tests that pages speak of": [{title_of[n]: n} for n in tests]}]}]
    return config


def executed(path):
    """A guide's text with what its cells answer and draw; kept as long as neither it nor the package changes."""
    from ssl_kit.lab.execute import execute_notebook

    sources = [path, *sorted((ROOT / "ssl_kit").rglob("*.py"))]
    key = hashlib.sha256(b"".join(hashlib.sha256(source.read_bytes()).digest() for source in sources)).hexdigest()[:16]
    kept = ROOT / ".cache" / "guides" / f"{path.stem}-{key}.ipynb"
    if not kept.is_file():
        for old in kept.parent.glob(f"{path.stem}-*.ipynb"):
            old.unlink()
        with tempfile.TemporaryDirectory() as folder:
            execute_notebook(path, folder, {}, {"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
            write(kept, (Path(folder) / "notebook.ipynb").read_text(encoding="utf-8"))
    return kept.read_text(encoding="utf-8")


def on_pre_build(config):
    for name in (name for names in GUIDES.values() for name in names if name not in AS_WRITTEN):
        path = ROOT / "nbs" / f"{name}.ipynb"
        if path.is_file():
            write(Path(config.docs_dir) / f"{name}.ipynb", reading_copy(executed(path), 1))


def mathml(match):
    if match[1]:
        return match[1]
    latex, display = (match[2], "block") if match[2] else (match[3], "inline")
    for name, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        latex = latex.replace(name, character)
    return convert(latex.strip(), display=display)


def kept_once(output, page, config):
    """The page with its large styles as links to files."""
    def link(match):
        if len(match[1]) < LARGE:
            return match[0]
        name = f"assets/stylesheets/notebook.{hashlib.sha256(match[1].encode()).hexdigest()[:8]}.css"
        target = Path(config.site_dir) / name
        if not target.is_file():
            write(target, match[1])
        return f'<link rel="stylesheet" href="{os.path.relpath(name, Path(page.url).parent)}">'
    return STYLE.sub(link, output)


def on_post_page(output, page, config):
    return FORMULA.sub(mathml, FOREIGN.sub("", kept_once(output, page, config)))


def on_post_build(config):
    shutil.rmtree(config.docs_dir)
