"""README.md from nbs/index.ipynb: its markdown cells and code cells, without outputs. --check compares only."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- made from nbs/index.ipynb by `make readme` -->\n\n"


def render(notebook):
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\(\.\./", "](", source))  # links count from nbs/ there, from the root here
        elif cell["cell_type"] == "code" and source and not re.match(r"#\|\s*hide", source):
            parts.append(f"```python\n{source}\n```")
    return NOTE + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    text = render(json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")))
    target = ROOT / "README.md"
    if "--check" in sys.argv[1:]:
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            sys.exit("README.md is not what nbs/index.ipynb says: make readme")
    else:
        target.write_text(text, encoding="utf-8")
