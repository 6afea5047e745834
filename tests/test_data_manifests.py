"Manifests: the schema, the project's own files, and the command line on them."

import argparse
import json
import os
import subprocess
import sys

import pytest
import yaml

from ssl_kit.lab import manifests
from ssl_kit.lab.data_command import add_data_arguments, run_data
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.lab.manifests import list_manifests, load_manifest, read_manifest, verify_dataset

GOOD = {"name": "toy", "what": "a toy data set", "licence": {"name": "CC0"}, "citation": "nobody in particular",
        "access": "open", "layout": [{"role": "clips", "match": "*.wav"}], "splits": {"train": "all"},
        "archives": [{"file": "a.zip", "kind": "zip", "bytes": None, "checksum": None, "urls": ["https://x.org/a.zip"]}]}


def written(tmp_path, **changes):
    raw = {**GOOD, **changes}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in raw.items() if value is not None}))
    return path


def run(*words):
    parser = argparse.ArgumentParser("ssl-kit data")
    add_data_arguments(parser)
    return run_data(parser.parse_args(words))


def test_the_projects_manifests():
    found = {manifest.name: manifest for manifest in list_manifests()}
    assert set(found) == {"realman", "librispeech", "librispeech_noise_kaggle", "dcase2024_task5_dev", "esc10", "esc50",
                          "embedded", "shared_layout"}
    for manifest in found.values():
        assert manifest.access != "open" or all(url.startswith("https://") for item in manifest.archives
                                                for url in item.urls)
    assert all(item.checksum and item.also_published and item.bytes for item in found["librispeech"].archives)
    assert {item.file for item in found["librispeech_noise_kaggle"].archives} == \
        {"test.7z", "y_test.7z", "train.7z", "y_train.7z"}
    assert found["librispeech"].archives[0].folder == "dev-clean"


@pytest.mark.parametrize("changes, message", [
    ({"licence": None}, "must contain .*'licence'"),
    ({"colour": "blue"}, "must not contain {'colour'}"),
    ({"access": "free"}, "data.access must be one of"),
    ({"archives": None}, "must contain .'archives'"),
    ({"access": "account"}, "must contain .'obtain'"),
    ({"archives": [{**GOOD["archives"][0], "checksum": "sha256:12"}]}, r"data.archives\[0\].checksum must match"),
    ({"archives": [{**GOOD["archives"][0], "bytes": "big"}]}, r"data.archives\[0\].bytes must be integer or null"),
    ({"archives": [{**GOOD["archives"][0], "file": "../a.zip"}]}, r"data.archives\[0\].file must match"),
    ({"archives": [{**GOOD["archives"][0], "urls": []}]}, r"data.archives\[0\].urls must contain at least 1"),
    ({"archives": [GOOD["archives"][0]] * 2}, "two archives have the same file name"),
    ({"name": "other"}, "expected 'toy' as the file's"),
    ({"layout": []}, "data.layout must contain at least 1"),
])
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    assert read_manifest(written(tmp_path)).name == "toy"
    with pytest.raises(DataError, match=f"toy.yaml.*{message}"):
        read_manifest(written(tmp_path, **changes))


def test_broken_and_missing_files(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text("name: [")
    with pytest.raises(DataError, match="toy.yaml is not valid YAML"):
        read_manifest(tmp_path / "toy.yaml")
    with pytest.raises(MissingDataError, match="does not exist"):
        read_manifest(tmp_path / "gone.yaml")
    with pytest.raises(ParameterError, match="unknown data set 'libri'; known: .*librispeech"):
        load_manifest("libri")
    monkeypatch.setenv("SSL_KIT_MANIFESTS", str(tmp_path / "nowhere"))
    with pytest.raises(MissingDataError, match="SSL_KIT_MANIFESTS"):
        list_manifests()


def test_layout_is_found_in_nested_folders(tmp_path):
    "As Kaggle unpacks them: test.7z into test/test/…, or one folder deeper."
    manifest = load_manifest("librispeech_noise_kaggle")
    for nested in ("test/test", "extra/y_test/y_test"):
        (tmp_path / nested).mkdir(parents=True)
        for number in range(105):
            (tmp_path / nested / f"{number}.wav").touch()
    assert manifests.layout_faults(manifest, tmp_path) == []
    (tmp_path / "test/test/0.wav").unlink()
    assert manifests.layout_faults(manifest, tmp_path) == \
        ["noisy test: expected 105 files *.wav below test, found 104"]
    report = verify_dataset(manifest, tmp_path)
    assert not report.ok and report.checked == 0


def test_verify_without_the_set_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_KIT_CACHE", str(tmp_path))
    with pytest.raises(MissingDataError, match="realman is not on this machine. Follow the download links"):
        verify_dataset(load_manifest("realman"))
    with pytest.raises(MissingDataError, match="esc50 is not on this machine. Run 'ssl-kit data fetch esc50'"):
        verify_dataset(load_manifest("esc50"))


def test_command_prints_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_KIT_CACHE", str(tmp_path / "cache"))
    assert run("list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["embedded"]["path"] and rows["realman"]["path"] is None
    assert rows["librispeech"]["fetch_bytes"] == 337926286 + 328757843 + 6387309499
    assert run("verify", "embedded", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["checked"] == 93 and report["missing"] == []
    assert run("path", "embedded") == 0
    assert os.path.isdir(capsys.readouterr().out.strip())
    assert run("fetch", "embedded") == 0 and "needs no fetching" in capsys.readouterr().out
    with pytest.raises(MissingDataError, match="Kaggle account"):
        run("fetch", "librispeech_noise_kaggle")


def test_command_verify_fails_on_faults(capsys, tmp_path):
    assert run("verify", "embedded", "--folder", str(manifests.dataset_folder(load_manifest("embedded")))) == 0
    capsys.readouterr()
    (tmp_path / "index.csv").write_text("file,sha256\nvoice00-0.flac,00\n")
    (tmp_path / "stray.flac").touch()
    assert run("verify", "embedded", "--folder", str(tmp_path)) == 1
    text = capsys.readouterr().out
    assert "missing: voice00-0.flac" in text and "extra: stray.flac" in text and "expected 93 files" in text


def test_command_help_shows_examples(capsys):
    for words in (["--help"], ["fetch", "--help"]):
        with pytest.raises(SystemExit):
            run(*words)
        assert "ssl-kit data fetch librispeech --archive dev-clean" in capsys.readouterr().out


def test_importing_the_command_is_light():
    code = ("import sys, ssl_kit.lab.data_command; "
            "print([name for name in ('torch', 'pandas', 'librosa', 'matplotlib', 'fastjsonschema', 'pooch', 'numpy') "
            "if name in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
