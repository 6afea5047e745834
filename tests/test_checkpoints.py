"""One reader for the checkpoints of all tracks: what is damaged or asks for the impossible is refused by name."""

import hashlib
import importlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.checkpoints import CONFIG, WEIGHTS, configured, find_checkpoint, fit_weights, write_checkpoint
from ssl_kit.lab.errors import CheckpointError, MissingDataError, ParameterError
from ssl_kit.lab.provenance import code_digests

ROOT = Path(__file__).resolve().parent.parent
SHELF = ROOT / "ssl_kit" / "assets" / "checkpoints"


def localizer():
    from ssl_kit.localize.crnn import CRNN, CRNNConfig

    return CRNN(CRNNConfig(channels=4, hidden=8))


def enhancer():
    from ssl_kit.enhance.models import make_network

    return make_network("crn", channels=(4, 4), hidden=8)


def refiner():
    from ssl_kit.nearfield.refiner import SpectrumRefiner

    return SpectrumRefiner((8, 8, 8))


def encoder():
    from ssl_kit.fewshot.encoder import Encoder, EncoderConfig

    return Encoder(EncoderConfig(channels=(4, 8, 4)))


def save_encoder(folder, network):
    from ssl_kit.fewshot.episodes import Preprocessing
    from ssl_kit.fewshot.training import save_encoder

    return save_encoder(folder, network, Preprocessing())


TRACKS = {  # maker, module, section of config.json, sizes that no memory holds
    "localize": (localizer, "ssl_kit.localize.checkpoints", "model", {"hidden": 10**12}),
    "enhance": (enhancer, "ssl_kit.enhance.checkpoints", "model", {"hidden": 10**12}),
    "nearfield": (refiner, "ssl_kit.nearfield.checkpoints", "model", {"widths": [8, 8, 8 * 10**9]}),
    "fewshot": (encoder, "ssl_kit.fewshot.training", "encoder", {"channels": [4, 8, 4 * 10**12]}),
}


@pytest.fixture(params=TRACKS)
def saved(request, tmp_path):
    """(folder, reader, section, impossible sizes) of a small network of each track."""
    make, module, section, impossible = TRACKS[request.param]
    home = importlib.import_module(module)
    torch.manual_seed(0)
    folder = save_encoder(tmp_path / "net", make()) if request.param == "fewshot" else \
        home.save_checkpoint(tmp_path / "net", make())
    return folder, home.load_encoder if request.param == "fewshot" else home.load_checkpoint, section, impossible


def describe(folder, **changes):
    """Another config.json, whose hash fits the weights that are there."""
    described = json.loads((folder / CONFIG).read_text())
    hashed = {"sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}
    (folder / CONFIG).write_text(json.dumps(described | hashed | changes))


def test_a_whole_one_is_read_in_evaluation_mode(saved):
    folder, load, *_ = saved
    network = load(folder)[0]
    assert not network.training and all(p.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("damage", [lambda whole: whole[:-5], lambda whole: whole[:len(whole) // 2], lambda whole: b"",
                                    lambda whole: b"\x80\x04N.", lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])],
                         ids=["truncated", "halved", "empty", "pickle", "altered"])
def test_other_bytes_than_described_are_refused(saved, damage):
    folder, load, *_ = saved
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: expected sha256 .*, found .*truncated"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\xff" * 64, b"\2\0\0\0\0\0\0\0{}"],
                         ids=["empty", "pickle", "header of exabytes", "no tensors"])
def test_a_fitting_hash_makes_no_weights(saved, content):
    folder, load, *_ = saved
    (folder / WEIGHTS).write_bytes(content)
    describe(folder)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: (expected safetensors|does not fit)"):
        load(folder)


def test_a_configuration_that_makes_no_network_is_refused(saved):
    folder, load, section, impossible = saved
    whole = json.loads((folder / CONFIG).read_text())
    for changes, words in (({section: whole[section] | impossible}, "expected the configuration"),
                           ({section: whole[section] | {"colour": 3}}, "expected the configuration.*colour"),
                           ({section: None}, "expected the configuration"), ({section: "text"}, "expected the config"),
                           ({"kind": "unet"}, "expected the configuration.*unet"), ({"kind": [3]}, "expected the conf"),
                           ({"about": 3}, "expected the configuration.*about")):
        if changes == {section: whole[section] | {"colour": 3}} and "widths" in whole[section]:
            continue  # a refiner has but its widths, and reads nothing else
        describe(folder, **changes)
        with pytest.raises(CheckpointError, match=f"{CONFIG}: {words}"):
            load(folder)
        (folder / CONFIG).write_text(json.dumps(whole))
    for text in ("{", "[]", "3", "[" * 100_000):
        (folder / CONFIG).write_text(text)
        with pytest.raises(CheckpointError, match=f"{CONFIG}: expected the configuration"):
            load(folder)


def test_what_is_not_there_is_named(saved):
    folder, load, *_ = saved
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / "aside")
        with pytest.raises(MissingDataError, match=f"net/{name}: expected a checkpoint folder"):
            load(folder)
        (folder / "aside").rename(folder / name)
    with pytest.raises(MissingDataError, match="net/config.json/"):
        load(folder / CONFIG)


def test_tensors_that_do_not_fit_are_named():
    line, other = torch.nn.Linear(3, 2), torch.nn.Linear(4, 2, bias=False)
    before = line.weight.clone()
    with pytest.raises(CheckpointError, match=r"a.st: .*missing \['bias'\], unknown \['more'\].*weight \(2, 4\) "
                                              r"instead of \(2, 3\)"):
        fit_weights(line, other.state_dict() | {"more": torch.zeros(1)}, "a.st")
    assert torch.equal(line.weight, before)


@given(half=st.booleans(), kept=st.sets(st.sampled_from(["weight", "bias"])))
def test_precision_is_of_the_file_and_what_is_kept_is_exact(tmp_path_factory, half, kept):
    line, folder = torch.nn.Linear(3, 2), tmp_path_factory.mktemp("c")
    write_checkpoint(folder, line, {"kind": "line"}, None, torch.float16 if half else None, kept)
    again = torch.nn.Linear(3, 2)
    from safetensors.torch import load_file

    stored = load_file(folder / WEIGHTS)
    fit_weights(again, stored, folder)
    for name, value in line.state_dict().items():
        exact = name in kept or not half
        assert stored[name].dtype == (torch.float32 if exact else torch.float16)
        assert torch.equal(again.state_dict()[name], value) or not exact


def test_unknown_settings_are_named():
    from ssl_kit.localize.crnn import CRNNConfig

    with pytest.raises(ParameterError, match=r"settings of crnn: .*hidden.*found \['hiden'\].*newer version"):
        configured(CRNNConfig, {"hiden": 3}, "crnn")


def test_the_shelf_comes_first_then_the_path(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "shelf" / "a", torch.nn.Linear(1, 1), {"kind": "line"})
    write_checkpoint(tmp_path / "a", torch.nn.Linear(1, 1), {"kind": "line"})
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("a", tmp_path / "shelf") == tmp_path / "shelf" / "a"
    assert find_checkpoint("./a", tmp_path / "elsewhere") == Path("a")
    with pytest.raises(MissingDataError, match="'b': expected one of a, a folder with model.safetensors.*; make one"):
        find_checkpoint("b", tmp_path / "shelf", "a", "; make one")
    with pytest.raises(MissingDataError, match="'b': expected a folder"):
        find_checkpoint("b", tmp_path / "shelf", "b")


def test_a_localizer_refuses_another_network():
    from ssl_kit.localize.geonet_localizer import GeoNetLocalizer
    from ssl_kit.localize.network import CRNNLocalizer

    for localizer, wrong, words in ((CRNNLocalizer, "geonet", "'crnn', found 'geonet'"),
                                    (GeoNetLocalizer, "crnn_6cm", "'geonet', found 'crnn'")):
        with pytest.raises(ParameterError, match=f"{wrong}: expected a checkpoint of kind {words}"):
            localizer.load(SHELF / wrong)


def test_a_stage_depends_on_the_checkpoints_of_its_track():
    """The shared reader names no shelf: a new near-field network leaves enhancement stages as they were."""
    def opened(source):
        return {name.split("/")[2] for name in code_digests(source) if name.startswith("assets/checkpoints/")}

    assert opened("from ssl_kit.lab.checkpoints import read_checkpoint") == set()
    enhance = opened("from ssl_kit.enhance.enhancer import load_enhancer")
    assert enhance and all(name.startswith("enhance_") for name in enhance)
    assert {"crnn_6cm", "geonet"} <= opened("from ssl_kit.localize.network import CRNNLocalizer")
