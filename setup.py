"""Package description, read from settings.ini so that nbdev and pip see the same facts."""

import configparser
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


def read_settings():
    """The DEFAULT section of settings.ini, comments left out."""
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(HERE / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def asset_files():
    """Everything under ssl_kit/assets, as paths relative to the package."""
    package = HERE / "ssl_kit"
    return sorted(p.relative_to(package).as_posix() for p in (package / "assets").rglob("*") if p.is_file())


class BuildWithStages(build_py):
    """A wheel takes the stage notebooks and the manifests along: who has no clone can run the stages too."""

    def run(self):
        """Copy them to where the package looks last; an editable installation has the clone."""
        super().run()
        for source, target in (("nbs/stages", "stages"), ("data_manifests", "data_manifests")):
            for path in () if self.editable_mode else sorted((HERE / source).glob("[!_.]*")):
                if path.suffix in (".ipynb", ".yaml", ".csv"):
                    folder = Path(self.build_lib) / "ssl_kit" / target
                    folder.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, folder / path.name)


settings = read_settings()
readme = HERE / "README.md"
EXTRAS = ("dev", "docs", "distributed", "page", "demo", "hpo", "hdf5", "onnx", "bench", "kaggle")
extras = {extra: settings[f"{extra}_requirements"].split() for extra in EXTRAS}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else settings["description"],
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="MIT",
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {settings['audience']}",
        "Natural Language :: English",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Multimedia :: Sound/Audio :: Analysis",
    ],
    cmdclass={"build_py": BuildWithStages},
    packages=find_packages(include=["ssl_kit", "ssl_kit.*"]),
    package_data={"ssl_kit": asset_files()},
    include_package_data=False,
    zip_safe=False,
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
