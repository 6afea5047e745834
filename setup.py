"""Package description, read from settings.ini so that nbdev and pip see the same facts."""

import configparser
from pathlib import Path

from setuptools import find_packages, setup

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
        "Topic :: Multimedia :: Sound/Audio :: Analysis",
    ],
    packages=find_packages(include=["ssl_kit", "ssl_kit.*"]),
    package_data={"ssl_kit": asset_files()},
    include_package_data=False,
    zip_safe=False,
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
