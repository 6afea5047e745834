"""mkdocs hooks: pages from the notebooks, navigation by track, formulas as MathML, nothing from other servers."""

import json
import re
import shutil
import tempfile
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
TRACKS = {"lab": "Lab", "arrays": "Arrays and rooms", "localize": "Localization", "routing": "Routing",
          "enhance": "Speech enhancement", "nearfield": "Near field", "apps": "Pages", "stages": "Stages"}
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff")
FORMULA = re.compile(r"(<(?:code|pre|script|style|textarea)\b.*?</(?:code|pre|script|style|textarea)>)"
                     r"|\$\$(.+?)\$\$|(?<![\\\w$])\$(?!\s)([^$\n<]+?)(?<!\s)\$(?![\w$])", re.DOTALL)
# What the notebook exporter adds for MathJax and mermaid, both of which it would fetch from elsewhere.
FOREIGN = re.compile(r'<script src="">\s*</script>|<script type="text/x-mathjax-config">.*?</script>'
                     r'|<script type="module">(?:(?!</script>).)*?mermaid.*?</script>', re.DOTALL)
STYLE = """<style>
.md-grid { max-width: 76rem; }
.jupyter-wrapper .jp-InputPrompt, .jupyter-wrapper .jp-OutputPrompt { display: none !important; }
.jupyter-wrapper .highlight pre { font-size: .66rem !important; }
</style>
</head>"""


def pages_of(folder):
    return sorted((ROOT / "nbs" / folder).glob("[!._]*.ipynb"))


def heading(path):
    """The first heading of a notebook, without the quotes of code."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        found = re.search(r"^# (.+)$", "".join(cell["source"]), re.MULTILINE)
        if found and cell["cell_type"] == "markdown":
            return found[1].replace("`", "")
    return path.stem


def reading_copy(path):
    """A notebook without nbdev's directives, the cells that hide and the front matter; links count from the page."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "raw" or re.match(r"#\|\s*hide|---\n", source):
            continue
        if cell["cell_type"] == "code":
            source = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
        else:
            source = re.sub(r"\]\(\.\./(?:nbs/)?(?=figures/|C[A-Z]+\.|[a-z_/]+\.ipynb)", "](", source)
            source = re.sub(r"(\]\([\w/]+)\.(?:md|ipynb)(?=[)#])", r"\1.html", source)  # as the pages are called
        if source:
            cells.append({**cell, "source": source})
    return json.dumps({**notebook, "cells": cells})


def on_config(config):
    docs = Path(tempfile.mkdtemp(prefix="ssl_kit_docs_"))
    nav = [{"Start": "index.ipynb"}, {"Conventions": "conventions.ipynb"}]
    for folder, title in {"": "", **TRACKS}.items():
        for path in pages_of(folder):
            target = docs / folder / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_text(reading_copy(path), encoding="utf-8")
        if title and pages_of(folder):
            nav.append({title: [{heading(path): f"{folder}/{path.name}"} for path in pages_of(folder)]})
    (docs / "figures").mkdir()
    for path in [*(ROOT / "figures").glob("*.png"), *(ROOT / name for name in BESIDE)]:
        shutil.copy(path, docs / "figures" if path.suffix == ".png" else docs)
    nav.append({"Project": [{"Changing something": "CONTRIBUTING.md"}, {"Changelog": "CHANGELOG.md"}]})
    config.docs_dir, config.nav = str(docs), nav
    return config


def mathml(match):
    if match[1]:
        return match[1]
    latex, display = (match[2], "block") if match[2] else (match[3], "inline")
    for name, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        latex = latex.replace(name, character)
    return convert(latex.strip(), display=display)


def on_post_page(output, page, config):
    return FORMULA.sub(mathml, FOREIGN.sub("", output)).replace("</head>", STYLE, 1)


def on_post_build(config):
    shutil.rmtree(config.docs_dir)
