"""What a user gets wrong, at the command line: one paragraph that names it, exit code 2, nothing half-written."""

import errno
import os

import numpy as np
import pytest
import soundfile

from ssl_kit.lab import files
from ssl_kit.lab.cli import main
from ssl_kit.lab.errors import CheckpointError


@pytest.fixture
def clip(tmp_path):
    """Nine channels of noise, a tenth of a second longer than the shortest clip that is taken."""
    path = tmp_path / "in" / "clip.wav"
    path.parent.mkdir()
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((4000, 9)), 16000, subtype="FLOAT")
    return path


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(arguments...): the complaint of a command that ends with 2 and leaves nothing in out/."""
    out = tmp_path / "out"
    out.mkdir()

    def check(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("ssl-kit: ") and "Traceback" not in shown.err and not list(out.iterdir())
        return shown.err

    check.out = out
    return check


def test_wrong_parameter(refused, clip):
    assert "did you mean 'corpus'" in refused("run", "routing_study", "-p", "corpse=embedded")
    assert "expects int" in refused("run", "routing_study", "-p", "seed=many")
    assert "respeeker" in refused("localize", clip, "--array", "respeeker", "--plot", refused.out / "a.png")


def test_wrong_channel_count(refused, clip):
    complaint = refused("localize", clip, "--array", "respeaker", "--plot", refused.out / "a.png")
    assert str(clip) in complaint and "4 mics" in complaint and "9 channels" in complaint and "--channels" in complaint


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_audio(refused, clip, bad):
    samples, rate = soundfile.read(clip)
    samples[100, 3] = bad
    soundfile.write(clip, samples, rate, subtype="FLOAT")
    complaint = refused("localize", clip, "--array", "6cm", "--plot", refused.out / "a.png")
    assert str(clip) in complaint and "NaN" in complaint


def test_missing_and_truncated_audio(refused, clip):
    assert "gone.wav" in refused("localize", clip.with_name("gone.wav"), "--array", "6cm")
    clip.write_bytes(clip.read_bytes()[:2000])
    assert str(clip) in refused("localize", clip, "--array", "6cm", "--plot", refused.out / "a.png")


def test_missing_data(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_KIT_RUNS", str(refused.out))
    monkeypatch.setenv("SSL_KIT_DATA", str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in refused("run", "localize_banks", "-p", "corpus=librispeech")
    monkeypatch.setenv("SSL_KIT_DATA", str(tmp_path))
    assert str(tmp_path / "noise") in refused("run", "localize_banks", "-p", "corpus=librispeech")


def test_full_disk(refused, clip, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", no_space)
    complaint = refused("localize", clip, "--array", "6cm", "--plot", refused.out / "a.png")
    assert str(refused.out / "a.png") in complaint and "No space left" in complaint


# Networks: the folder of a checkpoint, and what others publish.


@pytest.fixture(scope="module")
def network():
    """A small network with random weights."""
    from ssl_kit.localize.crnn import CRNN, CRNNConfig

    return CRNN(CRNNConfig(n_mics=4, hidden=8))


@pytest.mark.parametrize("spoil", ["truncated", "emptied", "altered", "config", "other"])
def test_spoilt_checkpoint(network, tmp_path, spoil):
    from ssl_kit.localize.checkpoints import load_checkpoint, save_checkpoint

    folder = save_checkpoint(tmp_path / "net", network)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    if spoil == "config":
        config.write_bytes(config.read_bytes()[:50])
    else:
        weights.write_bytes({"truncated": whole[:len(whole) // 2], "emptied": b"", "other": b"\x80\x04N.",
                             "altered": whole[:-4] + b"\0\0\x80?"}[spoil])
    with pytest.raises(CheckpointError, match="config.json" if spoil == "config" else "model.safetensors"):
        load_checkpoint(folder)


class Bomb:
    """An object whose pickle makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("spoil", ["foreign code", "truncated", "text"])
def test_foreign_pickle(network, tmp_path, spoil):
    import torch

    from ssl_kit.localize.checkpoints import convert_foreign

    foreign = tmp_path / "published.ckpt"
    torch.save({"state_dict": network.state_dict(), "extra": Bomb(tmp_path / "harm") if spoil == "foreign code" else 1},
               foreign)
    if spoil == "truncated":
        foreign.write_bytes(foreign.read_bytes()[:3000])
    elif spoil == "text":
        foreign.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="published.ckpt"):
        convert_foreign(foreign, network.config, tmp_path / "converted")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "converted").exists()


def test_full_disk_keeps_the_earlier_checkpoint(network, tmp_path, monkeypatch):
    from ssl_kit.lab.errors import StorageError
    from ssl_kit.localize.checkpoints import load_checkpoint, save_checkpoint

    folder = save_checkpoint(tmp_path / "net", network)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(StorageError, match="model.safetensors"):
        save_checkpoint(folder, network, {"epoch": 2})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and load_checkpoint(folder)
