"""Pages of the site that are made from what the repository says of itself: stages, names, data, networks, tests."""

import ast
import html
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
ACCESS = {"open": "free to download", "account": "needs an account or a form", "shipped": "part of the kit",
          "local": "on this machine alone"}


def cell(text):
    """Text that is safe within a cell of a table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").strip()


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def page(title, line, *parts):
    return "\n\n".join([f"# {title}", line, *(part for part in parts if part)]) + "\n"


# -- parameters of the stages ------------------------------------------------------------------------------------


def shown(value):
    """A value as -p takes it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value)) or "(empty)"
    return f"{value:g}" if isinstance(value, float) else str(value) or "(empty)"


def value_cell(value):
    """A value as code; a long list may break behind its commas."""
    if len(value) < 20 or "," not in value:
        return f"`{value}`"
    return f"<code>{html.escape(value).replace(',', ',<wbr>')}</code>"


def parameter_row(name, parameter, by_profile):
    quick, *others = (shown(by_profile[profile][name]) for profile in ("quick", "ci", "full"))
    choices = f"one of {', '.join(f'`{shown(value)}`' for value in parameter.choices)}" if parameter.choices else ""
    return [f"`{name}`", "; ".join(filter(None, (parameter.help.rstrip("."), choices))), f"`{parameter.type_text}`",
            value_cell(quick), *(value_cell(value) if value != quick else "" for value in others)]


def stage_part(stage, tracks):
    by_profile = {profile: stage.resolve(profile) for profile in ("quick", "ci", "full")}
    needs = ", ".join(f"[`{name}`](#{name})" for name in stage.needs)
    data = sorted({folder for folders in stage.data.values() for folder in folders})
    facts = [f"Track: {tracks.get(stage.track, stage.track)}." if stage.track else "",
             f"Needs {needs}." if needs else "",
             f"With real data it reads {', '.join(f'`{name}`' for name in data)} of the data root." if data else ""]
    return "\n\n".join([
        f"## {stage.name}",
        f"{stage.title}. [The stage](../stages/{stage.name}.ipynb). {' '.join(filter(None, facts))}",
        table(["name", "what", "type", "quick", "ci", "full"],
              [parameter_row(name, parameter, by_profile) for name, parameter in stage.parameters.items()])])


def stages_page(tracks):
    from ssl_kit.lab.stages import list_stages

    stages = list_stages(ROOT / "nbs" / "stages")
    return page(
        "Parameters of the stages",
        "What `ssl-kit run STAGE -p NAME=VALUE` may set. The profile `quick` is the default; where `ci` or `full` have "
        "another value it stands in their column. A list is written `a,b`. The same from a terminal: "
        "`ssl-kit list STAGE`.",
        table(["stage", "what"], [[f"[`{stage.name}`](#{stage.name})", stage.title] for stage in stages.values()]),
        *(stage_part(stage, tracks) for stage in stages.values()))


# -- public names --------------------------------------------------------------------------------------------------


def first_line(node):
    """The first sentence or line of a docstring."""
    text = re.sub(r"\s*\n\s*", " ", (ast.get_docstring(node) or "").split("\n\n")[0])
    return re.sub(r"(`[^`]*`)|([<*_\[])", lambda found: found[1] or {"<": "&lt;"}.get(found[2], f"\\{found[2]}"), text)


def public_names(path):
    """(docstring, rows) of a module: (name, first line, what it is called with) of each name that is defined in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    exported = next((set(ast.literal_eval(node.value)) for node in tree.body
                     if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"), set())
    rows = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exported:
            kind = "class" if isinstance(node, ast.ClassDef) else f"({', '.join(argument_names(node.args))})"
            rows.append([f"`{node.name}`", first_line(node), kind if kind == "class" else f"`{kind}`"])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if getattr(target, "id", "") in exported:
                rows.append([f"`{target.id}`", constant(node.value), "constant"])
    return first_line(tree), rows


def argument_names(arguments):
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else ["*"] if arguments.kwonlyargs else []
    return names + [argument.arg for argument in arguments.kwonlyargs] + \
        ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def constant(node):
    text = ast.unparse(node)
    return f"`{text}`" if len(text) <= 70 else ""


def api_pages(tracks):
    """{file: text}: an index, and the names of each track."""
    pages, rows = {}, []
    for track, title in tracks.items():
        modules = sorted(p for p in (ROOT / "ssl_kit" / track).glob("[!_]*.py"))
        if not modules:
            continue
        parts, count = [], 0
        for path in modules:
            about, names = public_names(path)
            count += len(names)
            parts.append(f"## ssl_kit.{track}.{path.stem}\n\n{about}. [The module](../{track}/{path.stem}.ipynb)"
                         + (f"\n\n{table(['name', 'what', 'arguments'], names)}" if names else ""))
        pages[f"api_{track}.md"] = page(
            f"Names: {title}", f"The public names of `ssl_kit.{track}`, module by module. Each module's page has the "
            "code, the whole docstring with shapes and units, and the checks.", *parts)
        rows.append([f"[`ssl_kit.{track}`](api_{track}.md)", title, str(len(modules)), str(count)])
    pages["api.md"] = page("Names", "What can be imported. A module is a notebook: its page shows why, the code, and "
                           "what checks it.", table(["package", "what", "modules", "public names"], rows))
    return pages


# -- data and networks ---------------------------------------------------------------------------------------------


def size(n_bytes):
    if n_bytes is None:
        return "not published"
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.3g} {unit}" if n_bytes < 100 else f"{n_bytes:.0f} {unit}"
        n_bytes /= 1000


def data_card(manifest):
    licence = manifest["licence"]
    named = f"[{licence['name']}]({licence['url']})" if "url" in licence else licence["name"]
    facts = [["licence", named], ["access", ACCESS[manifest["access"]]], ["citation", manifest["citation"]]]
    if "homepage" in manifest:
        facts.append(["home page", f"<{manifest['homepage']}>"])
    archives = [[f"`{item['file']}`", size(item["bytes"]), (item["checksum"] or "none").split(":")[0],
                 item.get("what", "")] for item in manifest.get("archives", [])]
    layout = [[item["role"], f"`{item['match']}`" + (f" below `{item['below']}`" if "below" in item else ""),
               item.get("count", ""), "may be missing" if item.get("optional") else "", item.get("what", "")]
              for item in manifest["layout"]]
    return page(
        f"Data: {manifest['name']}", cell(manifest["what"]), table(["", ""], facts),
        f"## How to obtain it\n\n{cell(manifest['obtain'])}" if "obtain" in manifest else "",
        "## Archives\n\n" + table(["file", "size", "checksum", "what"], archives) if archives else "",
        "## What is in it\n\n" + table(["role", "files", "count", "", "what"], layout),
        "## Splits\n\n" + table(["split", "from"], manifest["splits"].items()),
        f"`ssl-kit data verify {manifest['name']}` compares a copy with this.")


def model_card(path):
    """A checkpoint's README; its parts are one level down so that a page has one title."""
    name = path.parent.name
    tensors = path.parent / "model.safetensors"
    about = f"Checkpoint `{name}`, {size(tensors.stat().st_size)}, part of the kit."
    text = path.read_text(encoding="utf-8").strip()
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{about}\n\n{rest.strip()}\n"


def card_pages():
    """{file: text}: an index, a page for each data set and each checkpoint."""
    pages, data_rows, model_rows = {}, [], []
    for path in sorted((ROOT / "data_manifests").glob("*.yaml")):
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
        pages[f"data_{path.stem}.md"] = data_card(manifest)
        data_rows.append([f"[{manifest['name']}](data_{path.stem}.md)", manifest["what"],
                          manifest["licence"]["name"], ACCESS[manifest["access"]]])
    for path in sorted((ROOT / "ssl_kit" / "assets" / "checkpoints").glob("*/README.md")):
        file = f"model_{path.parent.name}.md"
        pages[file] = model_card(path)
        model_rows.append([f"[{path.parent.name}]({file})", pages[file].partition("\n")[0].lstrip("# ")])
    pages["index.md"] = page(
        "Data and model cards", "What the studies were made of: from the manifests in `data_manifests/` and the cards "
        "beside the checkpoints.", "## Data sets\n\n" + table(["set", "what", "licence", "access"], data_rows),
        "## Networks that come with the kit\n\n" + table(["checkpoint", "what"], model_rows))
    return pages


# -- tests that pages speak of ---------------------------------------------------------------------------------------


def tests_page(path, wanted):
    """The functions of a test file that pages link to; KeyError for one that isn't there."""
    source = path.read_text(encoding="utf-8")
    found = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    lines, parts = source.splitlines(), []
    for name in sorted(wanted, key=lambda name: found[name].lineno):
        node = found[name]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        code = "\n".join(lines[first - 1:node.end_lineno])
        parts.append(f"## {name}\n\n```python\n{code}\n```")
    n_tests = sum(name.startswith("test_") for name in found)
    return page(f"Tests: {path.name}", f"{len(wanted)} of the {n_tests} tests in `tests/{path.name}`, those that other "
                "pages speak of.", *parts)
