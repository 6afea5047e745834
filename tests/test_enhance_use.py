"""Enhancement in use: windows, rates, streams, files, folders, kills and full disks, ONNX, eight bits, benchmark."""

import contextlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.enhance import bench
from ssl_kit.enhance.checkpoints import load_checkpoint, save_checkpoint
from ssl_kit.enhance.enhancer import SHIPPED, Enhancer, load_enhancer, shipped_checkpoint
from ssl_kit.enhance.final_net import FinalConfig, FinalNet
from ssl_kit.enhance.long_signals import EnhancementChain, StreamedPass, WindowedPass
from ssl_kit.enhance.models import EnhancementNetwork, make_network
from ssl_kit.enhance.onnx_export import mask_graph, onnx_session, run_onnx, state_shapes
from ssl_kit.lab.audio import audio_info, read_audio, write_audio
from ssl_kit.lab.audio_out import audio_writer, output_format
from ssl_kit.lab.cli import main
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.lab.files import remove_leftovers

TINY = {"entry": 4, "channels": 8, "frequency_hidden": 4, "time_hidden": 8, "blocks": 1}
needs_onnx = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
                                reason="onnx and onnxruntime are not installed: pip install 'ssl-kit[onnx]'")


def noise(channels, n, seed=0, level=0.1):
    return (level * np.random.default_rng(seed).standard_normal((channels, n))).astype(np.float32)


def syllables(seconds, level=0.1, seed=0, rate=16000):
    t = np.arange(round(seconds * rate)) / rate
    return noise(1, len(t), seed, level) * (1 + np.sin(2 * np.pi * 3 * t)).astype(np.float32)


def final(seed=0, **kwargs):
    "A final network, untrained, that does something; norms as if they had seen data."
    torch.manual_seed(seed)
    network = FinalNet(FinalConfig(**TINY | kwargs))
    with torch.no_grad():
        network.network.last.weight *= 20
        for name, value in network.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.1)
        for name, value in network.named_parameters():
            if ".act." in name or "norm" in name:
                value += 0.2 * torch.rand_like(value)
    return network.eval()


class Halving(EnhancementNetwork):
    "Half of the input: what is measured is all around the network."
    kind, config_class = "halving", FinalConfig

    def forward(self, noisy):
        return noisy / 2


def through(chain, x, size):
    pieces = [chain.push(x[:, k:k + size]) for k in range(0, x.shape[1], size)]
    return np.concatenate([*pieces, chain.finish()], axis=1)


def level_db(x, reference):
    return 20 * np.log10(np.linalg.norm(x) / np.linalg.norm(reference))


# windows


@settings(max_examples=30)
@given(st.integers(1, 6000), st.integers(1, 4000), st.integers(1, 60), st.integers(1, 60))
def test_windows_give_every_sample_once(n, size, context, fade):
    x = noise(2, n)
    y = through(WindowedPass(lambda piece: piece, 2, 2 * (2 * context + fade) + 37, context, fade), x, size)
    np.testing.assert_allclose(y, x, atol=1e-6)


def test_windows_are_all_as_long_as_they_should_and_a_short_signal_is_one():
    lengths = []

    def watch(piece):
        lengths.append(piece.shape[1])
        return piece

    for n in (900, 1000, 1001, 4321):
        lengths.clear()
        through(WindowedPass(watch, 1, 1000, 50, 50), noise(1, n), 700)
        assert lengths[0] == min(n, 1000) and set(lengths) == {min(n, 1000)}
    with pytest.raises(ParameterError, match="window"):
        WindowedPass(watch, 1, 100, 50, 50)


def test_windows_fade_and_do_not_jump():
    turn = iter(range(100))
    y = through(WindowedPass(lambda piece: np.full_like(piece, next(turn)), 1, 1000, 100, 200), noise(1, 5000), 999)
    assert np.abs(np.diff(y)).max() < 0.01 and y.max() > 5             # a hard cut steps by one


def test_a_long_file_is_almost_what_the_network_makes_of_it_whole():
    network = final()
    x = syllables(20)
    with torch.inference_mode():
        whole = network(torch.from_numpy(x)).numpy()
    windows = Enhancer(network).enhance(x, 16000)
    assert level_db(whole - x, x) > -20                                # something is done at all
    assert level_db(windows - whole, whole - x) < -60
    elsewhere = WindowedPass(Enhancer(network)._whole, 1)              # windows that begin between frames
    assert level_db(through(elsewhere, x, 50_000) - whole, whole - x) > -30
    assert np.allclose(Enhancer(network).enhance(x[:, :100_000], 16000),
                       Enhancer(network, window_s=7).enhance(x[:, :100_000], 16000), atol=1e-6)


def test_a_quiet_talker_after_a_loud_one_is_heard_at_his_own_level():
    network = final()
    both = np.concatenate([syllables(10, 0.2), syllables(14, 0.002, seed=1)], axis=1)
    enhancer = Enhancer(network, window_s=4)
    windows, alone = enhancer.enhance(both, 16000), enhancer.enhance(both[:, 160_000:], 16000)
    with torch.inference_mode():
        whole = network(torch.from_numpy(both)).numpy()
    later = slice(160_000 + 64_000, None)                              # beyond the window that holds both
    done = alone[:, 64_000:] - both[:, later]
    assert level_db(windows[:, later] - alone[:, 64_000:], done) < -60
    assert level_db(whole[:, later] - alone[:, 64_000:], done) > -20   # the level of the whole file is not his

    def largest_jump_db(enhanced, noisy):
        gains = [20 * np.log10(np.linalg.norm(y) / np.linalg.norm(x)) for y, x in
                 zip(enhanced[0, :len(noisy[0]) // 800 * 800].reshape(-1, 800),
                     noisy[0, :len(noisy[0]) // 800 * 800].reshape(-1, 800), strict=True)]
        return np.abs(np.diff(gains)).max()

    way = slice(160_000 + 16_000, None)                                # and on the way there no more jumps than there
    assert largest_jump_db(windows[:, way], both[:, way]) < largest_jump_db(alone, both[:, 160_000:]) + 1


# rates


@settings(max_examples=12)
@given(st.sampled_from([8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000]), st.integers(1000, 30_000),
       st.integers(500, 40_000))
def test_a_network_that_does_nothing_changes_no_rate(rate, n, size):
    x = noise(2, n)
    y = through(EnhancementChain(WindowedPass(lambda piece: piece, 2, 4000, 500, 500), rate, 2), x, size)
    assert y.shape == x.shape and np.abs(y - x).max() < 1e-5


def test_what_the_network_does_not_hear_is_turned_down_with_what_it_hears():
    x = noise(1, 96_000)
    y = through(EnhancementChain(WindowedPass(lambda piece: 0.03 * piece, 1), 48_000, 1), x, 10_000)
    spectra = [np.abs(np.fft.rfft(z[0].reshape(-1, 960) * np.hanning(960), axis=1)) ** 2 for z in (x, y)]
    loss_db = 10 * np.log10(spectra[1].mean(0) / spectra[0].mean(0))
    assert loss_db[200:].max() < -25                                   # above 10 kHz: no hiss is left over
    dull = through(EnhancementChain(WindowedPass(lambda piece: piece, 1), 48_000, 1), x, 10_000)
    assert level_db(dull, x) > -0.01                                   # and nothing is cut off


def test_rates_below_8_khz_are_refused():
    with pytest.raises(ParameterError, match="8000"):
        EnhancementChain(WindowedPass(lambda piece: piece, 1), 6000, 1)


# the enhancer


def test_shape_strength_and_channels():
    network = final()
    x = noise(3, 20_001)
    enhancer = Enhancer(network)
    y = enhancer.enhance(x, 16000)
    with torch.inference_mode():
        np.testing.assert_allclose(y, network(torch.from_numpy(x)).numpy(), atol=1e-5)
    assert np.array_equal(enhancer.enhance(x[1:2], 16000)[0], y[1])    # each channel by itself
    assert np.array_equal(enhancer.enhance(x, 16000, strength=0), x)
    np.testing.assert_allclose(enhancer.enhance(x, 16000, strength=0.25), 0.75 * x + 0.25 * y, atol=1e-6)
    shares = []
    assert enhancer.enhance(noise(2, 500_000), 44100, progress=shares.append).shape == (2, 500_000)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 2
    assert not np.any(enhancer.enhance(np.zeros((1, 20_000), np.float32), 44100))


def test_wrong_arrays_are_refused():
    enhancer = Enhancer(Halving())
    for samples, rate, what in ((noise(1, 5000)[0], 16000, "channel, sample"), ([[1.0]], 16000, "list"),
                                (np.zeros((1, 5000), np.int16), 16000, "int16"), (noise(1, 5000), 4000, "8000")):
        with pytest.raises(ParameterError, match=what):
            enhancer.enhance(samples, rate)
    broken = noise(1, 100_000)
    broken[0, 70_000] = np.nan
    with pytest.raises(DataError, match="NaN"):
        enhancer.enhance(broken, 16000)
    with pytest.raises(DataError, match="0.032"):
        enhancer.enhance(noise(1, 500), 16000)
    with pytest.raises(ParameterError, match="strength.*1.1"):
        enhancer.enhance(noise(1, 5000), 16000, strength=1.1)


def test_models_are_named(tmp_path):
    with pytest.raises(ParameterError, match="did you mean 'final_causal'"):
        load_enhancer("final_casual")
    with pytest.raises(MissingDataError, match="nowhere"):
        load_enhancer(tmp_path / "nowhere")
    save_checkpoint(tmp_path / "mine" / "checkpoint", final())
    assert load_enhancer(tmp_path / "mine").network.kind == "final"
    for name in SHIPPED:
        try:
            assert (shipped_checkpoint(name) / "config.json").is_file()
        except MissingDataError as error:
            assert "train-enhance" in str(error)


# streams


def test_a_stream_equals_the_file_and_is_as_late_as_it_says():
    network = final(causal=True)
    enhancer = Enhancer(network)
    x = syllables(1.3)[:, :20_101]
    with torch.inference_mode():
        whole = network(torch.from_numpy(x)).numpy()
    assert level_db(whole - x, x) > -20
    for hop_by_hop, size in ((True, 100), (True, 9999), (False, 4000)):
        assert np.abs(through(enhancer.chain(16000, 1, 1.0, hop_by_hop), x, size) - whole).max() < 1e-4
    chain, behind, given = enhancer.chain(16000, 1, 1.0, True), 0, 0
    for k in range(0, 6400, 32):
        behind = max(behind, k + 32 - given)
        given += chain.push(x[:, k:k + 32]).shape[1]
    assert enhancer.latency_s == 0.032 == behind / 16000


def test_a_stream_that_forgets_is_another():
    network = final(causal=True)
    x = syllables(1)
    kept = through(StreamedPass(network, 1, 256), x, 256)
    forgetful = np.concatenate([through(StreamedPass(network, 1, 256), x[:, k:k + 256], 256)
                                for k in range(0, x.shape[1], 256)], axis=1)
    assert np.abs(kept - forgetful).max() > 1e-2


def test_streams_of_networks_that_look_ahead_are_refused(tmp_path):
    write_audio(tmp_path / "x.wav", noise(1, 5000))
    with pytest.raises(ParameterError, match="final_causal"):
        Enhancer(final()).enhance_file(tmp_path / "x.wav", tmp_path / "y.wav", stream=True)


def test_a_streamed_file_is_the_offline_one(tmp_path):
    enhancer = Enhancer(final(causal=True))
    soundfile.write(tmp_path / "x.wav", syllables(2, rate=44100).T, 44100, "FLOAT")
    told = enhancer.enhance_file(tmp_path / "x.wav", tmp_path / "s.wav", stream=True, progress=False)
    enhancer.enhance_file(tmp_path / "x.wav", tmp_path / "o.wav", progress=False)
    streamed, offline = (read_audio(tmp_path / name, None) for name in ("s.wav", "o.wav"))
    assert np.abs(streamed - offline).max() < 1e-4 and told["latency_s"] == 0.032


# files


@pytest.mark.parametrize("name, rate, channels, subtype", [
    ("a.wav", 44100, 2, "PCM_24"), ("a.flac", 16000, 1, "PCM_16"), ("a.wav", 8000, 3, "FLOAT"),
    ("a.ogg", 22050, 1, "VORBIS"), ("a.aiff", 48000, 1, "PCM_16"), ("a.mp3", 32000, 2, "MPEG_LAYER_III")])
def test_rate_length_and_format_stay(tmp_path, name, rate, channels, subtype):
    kind = {"mp3": "MP3", "aiff": "AIFF"}.get(name[2:], name[2:].upper())
    soundfile.write(tmp_path / name, noise(channels, 30_011).T, rate, subtype, format=kind)
    told = Enhancer(Halving()).enhance_file(tmp_path / name, tmp_path / "out" / name, progress=False)
    before, after = audio_info(tmp_path / name), audio_info(tmp_path / "out" / name)
    assert [getattr(before, key) for key in ("sample_rate", "channels", "frames", "format", "subtype")] == \
        [getattr(after, key) for key in ("sample_rate", "channels", "frames", "format", "subtype")]
    x, y = read_audio(before.path, None), read_audio(after.path, None)
    inside = slice(2000, -2000)                                        # resamplers ring where a signal is cut off
    assert level_db((y - x / 2)[:, inside], x) < (-10 if subtype in ("VORBIS", "MPEG_LAYER_III") else -70)
    assert level_db(y - x / 2, x) < -10 and max(np.abs(y).max(), 0.1) < np.abs(x).max()
    assert told["clipped_samples"] == 0 and told["duration_s"] == pytest.approx(30_011 / rate)


def test_another_suffix_is_another_container_and_zero_strength_is_a_copy(tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(2, 9000).T, 44100, "PCM_32")
    enhancer = Enhancer(Halving())
    enhancer.enhance_file(tmp_path / "x.wav", tmp_path / "same.wav", strength=0, progress=False)
    assert (tmp_path / "same.wav").read_bytes() == (tmp_path / "x.wav").read_bytes()
    enhancer.enhance_file(tmp_path / "x.wav", tmp_path / "y.flac", progress=False)
    assert (audio_info(tmp_path / "y.flac").format, audio_info(tmp_path / "y.flac").subtype) == ("FLAC", "PCM_16")
    with pytest.raises(ParameterError, match="xyz"):
        enhancer.enhance_file(tmp_path / "x.wav", tmp_path / "y.xyz", progress=False)
    info = audio_info(tmp_path / "x.wav")
    assert output_format("z.wav", info) == ("WAV", "PCM_32")


def test_what_is_wrong_is_said(tmp_path):
    enhancer = Enhancer(Halving())

    def fails(kind, match, source, target="y.wav", **kwargs):
        with pytest.raises(kind, match=match):
            enhancer.enhance_file(tmp_path / source, tmp_path / target, progress=False, **kwargs)
        assert target != "y.wav" or not (tmp_path / "y.wav").exists()

    write_audio(tmp_path / "x.wav", noise(1, 5000))
    write_audio(tmp_path / "short.wav", noise(1, 300))
    soundfile.write(tmp_path / "low.wav", noise(1, 5000).T, 6000)
    broken = noise(1, 200_000)
    broken[0, 150_000] = np.inf
    soundfile.write(tmp_path / "broken.wav", broken.T, 16000, "FLOAT")
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "link.wav").symlink_to(tmp_path / "x.wav")
    (tmp_path / "there.wav").write_bytes(b"precious")
    fails(MissingDataError, "gone.wav", "gone.wav")
    fails(DataError, "text.wav", "text.wav")
    fails(DataError, "empty", "empty.wav")
    fails(DataError, "NaN or infinite", "broken.wav")
    fails(DataError, "too short", "short.wav")
    fails(DataError, "8000 Hz", "low.wav")
    fails(ParameterError, "overwrite", "x.wav", "there.wav")
    fails(ParameterError, "input itself", "x.wav", "x.wav", overwrite=True)
    fails(ParameterError, "input itself", "x.wav", "link.wav", overwrite=True)
    fails(ParameterError, "strength", "x.wav", strength=-0.1)
    assert (tmp_path / "there.wav").read_bytes() == b"precious"
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    whole = (tmp_path / "x.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:-4000])
    fails(DataError, "truncated", "cut.wav")


def test_loud_samples_are_clipped_and_counted(tmp_path):
    class Doubling(Halving):
        def forward(self, noisy):
            return 2 * noisy

    write_audio(tmp_path / "x.wav", noise(1, 5000, level=0.3).clip(-1, 1))
    told = Enhancer(Doubling()).enhance_file(tmp_path / "x.wav", tmp_path / "y.wav", progress=False)
    expected = int((np.abs(read_audio(tmp_path / "x.wav", None)) > 0.5).sum())
    assert told["clipped_samples"] == expected > 0
    assert np.abs(read_audio(tmp_path / "y.wav", None, check=False)).max() <= 1


# faults


def in_child(function):
    "Exit code, or minus the signal, of a forked process that calls `function`."
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            function()
            code = 0
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_kill_leaves_no_half_file_and_the_command_goes_on(tmp_path, suffix):
    source, target = tmp_path / f"x{suffix}", tmp_path / f"y{suffix}"
    write_audio(source, noise(1, 400_000))
    enhancer = Enhancer(Halving(), window_s=4)

    def killed():
        enhancer.enhance_file(source, target, progress=lambda share: share > 0.4 and os.kill(os.getpid(), 9))

    assert in_child(killed) == -signal.SIGKILL
    assert not target.exists() and [path.suffix for path in tmp_path.glob(".*")] == [".tmp"]
    remove_leftovers(tmp_path)
    enhancer.enhance_file(source, target, progress=False)
    assert audio_info(target).frames == 400_000 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, suffix):
    write_audio(tmp_path / f"x{suffix}", noise(1, 300_000))

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(StorageError, match="could not write .*y"):
            Enhancer(Halving()).enhance_file(tmp_path / f"x{suffix}", tmp_path / f"y{suffix}", progress=False)

    assert in_child(full) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


def test_a_writer_that_fails_keeps_the_old_file(tmp_path):
    (tmp_path / "y.wav").write_bytes(b"precious")
    with pytest.raises(DataError, match="NaN"), audio_writer(tmp_path / "y.wav", 16000, 1, "WAV", "PCM_16") as writer:
        writer.write(noise(1, 1000))
        writer.write(np.full((1, 10), np.nan, np.float32))
    assert (tmp_path / "y.wav").read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 1


# memory


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as on Linux")
def test_memory_does_not_grow_with_length(tmp_path):
    for name, seconds in (("short", 20), ("long", 200)):
        with soundfile.SoundFile(tmp_path / f"{name}.wav", "w", 48000, 2, "PCM_16") as sound:
            block = noise(2, 480_000).T
            for _ in range(seconds // 10):
                sound.write(block)

    def grows():
        enhancer, peaks = Enhancer(Halving()), []
        for name in ("short", "long"):
            enhancer.enhance_file(tmp_path / f"{name}.wav", tmp_path / f"{name}_out.wav", progress=False)
            peaks.append(peak_mb())
        (tmp_path / "peaks.json").write_text(json.dumps(peaks))

    assert in_child(grows) == 0
    short, long = json.loads((tmp_path / "peaks.json").read_text())
    assert long - short < 20                                           # the long file is 77 MB as floats


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as on Linux")
def test_an_hour_takes_less_than_a_gigabyte(tmp_path):
    from ssl_kit.enhance.final_net import final_config

    save_checkpoint(tmp_path / "model", FinalNet(final_config("medium")))
    with soundfile.SoundFile(tmp_path / "hour.flac", "w", 16000, 1, "PCM_16") as sound:
        for k in range(360):
            sound.write(syllables(10, seed=k)[0])
    code = ("import resource, sys; from ssl_kit.lab.cli import main; code = main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code, "enhance", str(tmp_path / "hour.flac"),
                           str(tmp_path / "out.flac"), "--model", str(tmp_path / "model")],
                          capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1000
    assert audio_info(tmp_path / "out.flac").frames == 3600 * 16000


# the command


@pytest.fixture
def model(tmp_path):
    return str(save_checkpoint(tmp_path / "model", final(causal=True)))


def test_a_folder_is_mirrored_resumed_and_its_bad_files_are_named(tmp_path, model, capsys):
    top, out = tmp_path / "in", tmp_path / "in" / "clean"               # below the input: not enhanced again
    write_audio(top / "a.wav", noise(1, 9000), 44100)
    write_audio(top / "deep" / "b.flac", noise(2, 9000))
    write_audio(top / ".hidden" / "c.wav", noise(1, 9000))
    (top / "bad.wav").write_bytes(b"no audio")
    (top / "notes.txt").write_text("no audio either")
    command = ["enhance", str(top), str(out), "--model", model]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "bad.wav" in told.err and "1 of 3 files" in told.err and "2 files" in told.out
    made = sorted(str(path.relative_to(out)) for path in out.rglob("*.*") if path.suffix != ".json")
    assert made == ["a.wav", "deep/b.flac"]
    stamp = (out / "a.wav").stat().st_mtime_ns
    (out / "deep" / "b.flac").unlink()
    assert main([*command, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row.get("already_done", False) for row in rows["done"]] == [True, False] and len(rows["failed"]) == 1
    assert (out / "a.wav").stat().st_mtime_ns == stamp and (out / "deep" / "b.flac").is_file()
    write_audio(top / "a.wav", noise(1, 8000), 44100)                   # another recording under the old name
    main(command)
    assert audio_info(out / "a.wav").frames == 8000
    capsys.readouterr()
    assert main([*command, "--strength", "0.5"]) == 2
    assert "strength: 1.0 before, 0.5 now" in capsys.readouterr().err
    assert main([*command, "--strength", "0.5", "--overwrite", "--stream"]) == 1
    assert "32 ms" in capsys.readouterr().out


def test_files_of_others_are_not_written_over(tmp_path, model, capsys):
    write_audio(tmp_path / "in" / "a.wav", noise(1, 9000))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.wav").write_bytes(b"precious")
    assert main(["enhance", str(tmp_path / "in"), str(tmp_path / "out"), "--model", model]) == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "out" / "a.wav").read_bytes() == b"precious"
    assert main(["enhance", str(tmp_path / "in"), str(tmp_path / "in"), "--model", model]) == 2
    assert "input itself" in capsys.readouterr().err


def test_the_command_speaks_plainly(tmp_path, model, capsys):
    write_audio(tmp_path / "x.wav", noise(1, 9000))
    x, y = str(tmp_path / "x.wav"), str(tmp_path / "y.wav")
    for words, match in ((["gone.wav", y], "gone.wav does not exist"), ([x, y, "--model", "finall"], "'final'"),
                         ([x, y, "--strength", "2"], "strength"), ([str(tmp_path / "model"), y], "audio files"),
                         ([x, x], "input itself")):
        assert main(["enhance", *words, *([] if "--model" in words else ["--model", model])]) == 2
        assert match in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert main(["enhance", x, str(tmp_path / "folder"), "--model", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"][0]["target"].endswith("folder/x.wav")


# ONNX and eight bits


@needs_onnx
@pytest.mark.parametrize("causal, groups, blocks", [(False, 1, 2), (True, 1, 1), (True, 2, 2), (False, 2, 1)])
def test_the_graph_is_the_network(causal, groups, blocks):
    network = final(causal=causal, groups=groups, blocks=blocks)
    session = onnx_session(mask_graph(network))
    for batch, frames in ((1, 1), (2, 7)):
        features = torch.rand(batch, 3, 257, frames)
        zeros = [np.zeros(shape, np.float32) for shape in state_shapes(network, batch)]
        taps, *now = session.run(None, {"features": features.numpy()} | {f"past_{k}": z for k, z in enumerate(zeros)})
        with torch.inference_mode():
            wanted, state = network.network(features)
        assert np.abs(taps - wanted.numpy()).max() < 1e-4 < wanted.abs().max()
        if causal:
            flat = [*state[:2], *(part for block in state[2:] for pair in block for part in pair)]
            assert all(np.abs(a - b.numpy()).max() < 1e-4 for a, b in zip(now, flat, strict=True))


@needs_onnx
def test_numpy_goes_from_wave_to_wave():
    x = syllables(0.5)[:, :7777]
    for settings_ in ({}, {"causal": True, "level_frames": 5}, {"hop_length": 128, "window": "hann"}):
        network = final(**settings_)
        with torch.inference_mode():
            wanted = network(torch.from_numpy(x))[0].numpy()
        model = mask_graph(network)
        assert np.abs(run_onnx(model, x[0]) - wanted).max() < 1e-4 < np.abs(wanted - x).max()
        if network.config.causal:
            assert np.abs(run_onnx(model, x[0], n_frames=1) - wanted).max() < 1e-4
        else:
            with pytest.raises(ParameterError, match="causal"):
                run_onnx(model, x[0], n_frames=1)


@needs_onnx
def test_foreign_models_and_kinds_are_refused(tmp_path):
    import onnx

    with pytest.raises(ParameterError, match="'crn'"):
        mask_graph(make_network("crn", channels=(4, 4), hidden=8))
    with pytest.raises(ParameterError, match="'crn'"):
        Enhancer(make_network("crn", channels=(4, 4), hidden=8), int8=True)
    one = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    two = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "g", [one], [two])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(DataError, match="metadata"):
        run_onnx(model.SerializeToString(), noise(1, 5000)[0])


def test_without_onnx_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDataError, match=r"ssl-kit\[onnx\]"):
        mask_graph(final())


@needs_onnx
def test_eight_bits_are_close_the_same_each_time_and_come_from_floats(tmp_path):
    from ssl_kit.enhance.int8 import int8_graph

    x = syllables(1.5)
    for causal in (False, True):
        network = final(causal=causal, channels=16)
        save_checkpoint(tmp_path / "model", network)
        again = load_checkpoint(tmp_path / "model")[0]
        assert int8_graph(network) == int8_graph(again) and len(int8_graph(network)) < len(mask_graph(network))
        lighter = load_enhancer(tmp_path / "model", int8=True)
        small, plain = lighter.enhance(x, 16000), Enhancer(network).enhance(x, 16000)
        assert np.array_equal(small, load_enhancer(tmp_path / "model", int8=True).enhance(x, 16000))
        assert -70 < level_db(small - plain, plain - x) < -20
        if causal:
            hops = through(lighter.chain(16000, 1, 1.0, True), x, 3000)
            assert level_db(hops - plain, plain - x) < -20


@needs_onnx
def test_the_command_that_exports(tmp_path, model, capsys):
    path = tmp_path / "net.onnx"
    assert main(["export-enhance", model, str(path)]) == 0 and "states" in capsys.readouterr().out
    with torch.inference_mode():
        x = syllables(0.5)
        wanted = load_checkpoint(model)[0](torch.from_numpy(x))[0].numpy()
    assert np.abs(run_onnx(path, x[0], n_frames=4) - wanted).max() < 1e-4
    assert main(["export-enhance", model, str(path)]) == 2 and "exists" in capsys.readouterr().err
    assert main(["export-enhance", model, str(path), "--int8", "--overwrite"]) == 0
    assert level_db(run_onnx(path, x[0]) - wanted, wanted - x[0]) < -20


# the benchmark


def test_the_benchmark_has_its_rows_and_says_what_it_ran(monkeypatch):
    monkeypatch.setattr(bench, "_network", lambda name: (final(causal=name == "final_causal"), "fresh"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # noisereduce's own
        rows = {row.name: row for row in bench.bench_enhance(quick=True)}
    assert list(rows) == ["enhance_final", "enhance_stream", "enhance_int8", "enhance_stream_int8"]
    row = rows["enhance_stream"]
    assert row.target == 0.1 and row.detail["latency_s"] == 0.032 and row.detail["weights"] == "fresh"
    assert row.detail["threads"] == 1 and 0 < row.value and row.met == (row.value <= 0.1)
    there = importlib.util.find_spec("noisereduce") is not None
    assert (row.peer is not None) == there and ("not installed" in row.detail["compared_with"]) == (not there)


def test_without_a_checkpoint_the_benchmark_says_fresh(monkeypatch):
    def absent(name):
        raise MissingDataError("none")

    monkeypatch.setattr("ssl_kit.enhance.enhancer.shipped_checkpoint", absent)
    network, weights = bench._network("final_causal")
    assert network.config.causal and "fresh" in weights


def test_the_enhancer_gives_a_network_no_more_than_the_clips_it_knows():
    from ssl_kit.enhance.evaluation import network_function

    torch.manual_seed(0)
    network = make_network("dpt", d_model=8, heads=2, feedforward=8, blocks=1)
    noisy = (0.1 * np.random.default_rng(0).standard_normal((1, 48000))).astype(np.float32)
    through = Enhancer(network, trained_s=1.0).enhance(noisy, 16000)
    assert np.allclose(through[0], network_function(network, 1.0)(noisy[0]), atol=1e-5)
    assert not np.allclose(through, Enhancer(network).enhance(noisy, 16000), atol=1e-4)
