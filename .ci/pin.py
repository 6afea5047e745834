"""Write constraints.txt: the exact version of everything the kit pulls in, as installed in this environment."""

import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[-_.]+")


def closure(requirements, oldest_python):
    """Name -> version of each requirement and all that it needs, here and now; all must run on `oldest_python`, too."""
    found, todo = {}, [(Requirement(r), ()) for r in requirements]
    seen = set()
    while todo:
        requirement, extras_from = todo.pop()
        key = (NAME.sub("-", requirement.name).lower(), tuple(sorted(requirement.extras)))
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras_from or ("",)):
            continue
        if key in seen:
            continue
        seen.add(key)
        try:
            package = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            sys.exit(f"pin.py: {requirement} is required but not installed; run make setup first")
        needed = package.metadata.get("Requires-Python", "")
        if not SpecifierSet(needed).contains(oldest_python):
            sys.exit(f"pin.py: {requirement.name} {package.version} needs Python {needed}, the kit promises "
                     f"{oldest_python}; install an earlier version of it")
        found[key[0]] = package.version.split("+")[0]  # a local build tag such as +cpu is this machine's business
        todo += [(Requirement(r), tuple(requirement.extras)) for r in package.requires or ()]
    return found


if __name__ == "__main__":
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    extras = ("requirements", "dev_requirements", "docs_requirements", "distributed_requirements",
              "page_requirements", "hpo_requirements", "hdf5_requirements", "onnx_requirements", "bench_requirements")
    wanted = " ".join(settings[k] for k in extras).split()
    lines = [f"{name}=={version}" for name, version in sorted(closure(wanted, settings["min_python"] + ".0").items())]
    header = "# The versions the kit is tested with; `make pin` writes this file from the environment.\n"
    (ROOT / "constraints.txt").write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"constraints.txt: {len(lines)} packages")
