"""Review stages of enhancement: the collapse of R3 and its absence in R3-DPT, networks of a stage, figures."""

import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.enhance import figures, figures_review
from ssl_kit.enhance.diagnostics import MaskWarning, mask_statistics, warn_of_collapse
from ssl_kit.enhance.enhancer import shipped_checkpoint
from ssl_kit.enhance.evaluation import Costs, evaluate_systems, oracle_functions
from ssl_kit.enhance.models import make_network
from ssl_kit.enhance.review import review_table
from ssl_kit.enhance.stage_parts import (
    NetworkPlan,
    StageNetwork,
    mask_sentence,
    mask_table,
    obtain_network,
    save_evaluation,
    save_listening,
)
from ssl_kit.enhance.test_sets import load_test_set
from ssl_kit.enhance.training import EnhanceTask, train_network
from ssl_kit.lab.audio import read_audio
from ssl_kit.lab.context import StageContext
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.lab.figures import read_figure_data
from ssl_kit.lab.files import read_json
from ssl_kit.lab.stages import read_stage, stages_folder
from ssl_kit.lab.training import TrainingConfig

STAGES = ("enhance_crn", "enhance_mel", "enhance_stft", "enhance_dpt", "enhance_final", "enhance_review")


def collapsed(mask) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaskWarning)
        return warn_of_collapse(mask_statistics(mask))


def fresh(kind, seed, scale=1.0):
    torch.manual_seed(seed)
    settings = {"stft": {"d_model": 16, "feedforward": 16, "layers": 1},
                "dpt": {"d_model": 16, "feedforward": 16, "blocks": 1}}[kind]
    network = make_network(kind, **settings).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= scale
    return network


def inner_range(mask) -> float:
    """Largest difference between bins of a frame, the edges left out."""
    inside = mask[0, 3:-3]
    return float((inside.max(0).values - inside.min(0).values).max())


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.5, 3.0), level=st.floats(1e-3, 1.0))
def test_no_weights_let_the_mask_of_r3_differ_between_frequencies(seed, scale, level):
    noisy = level * torch.randn(1, 4000, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        mask = fresh("stft", seed, scale).forward_with_mask(noisy)[1]
        other = fresh("dpt", seed).forward_with_mask(noisy)[1]
    assert inner_range(mask) < 1e-4 and collapsed(mask)
    assert inner_range(other) > 1e-3


class Tones:
    """Tones in white noise: what is worth keeping lies at one frequency."""

    def __init__(self, seed=0):
        self.seed = seed

    def draw(self, step):
        rng = np.random.default_rng([self.seed, step])
        t = np.arange(4096) / 16000
        clean = np.stack([0.1 * np.sin(2 * np.pi * rng.uniform(300, 6000) * t) for _ in range(4)])
        noisy = clean + 0.07 * rng.standard_normal(clean.shape)
        return SimpleNamespace(noisy=torch.from_numpy(noisy).float(), clean=torch.from_numpy(clean).float())

    def identity(self):
        return {"tones": self.seed}


def test_the_detector_fires_on_a_trained_r3_and_not_on_a_trained_dpt(tmp_path):
    found = {}
    plan = TrainingConfig(steps=30, epoch_steps=30, warmup_steps=5, learning_rate=3e-3, precision="32-true",
                          average_decay=0.9)
    for kind in ("stft", "dpt"):
        task = EnhanceTask(kind, fresh(kind, 0).config)
        network, _ = train_network(tmp_path / kind, task, plan, Tones(), report=lambda row: None, device="cpu")
        with torch.no_grad():
            found[kind] = network.forward_with_mask(Tones(1).draw(0).noisy)[1]
    assert collapsed(found["stft"]) and not collapsed(found["dpt"])
    with pytest.warns(MaskWarning, match="hardly differs between frequencies"):
        warn_of_collapse(mask_statistics(found["stft"]))


@pytest.mark.parametrize("name, expected", [("stft", True), ("dpt", False)])
def test_the_detector_on_the_shipped_checkpoints(name, expected):
    try:
        folder = shipped_checkpoint(name)
    except MissingDataError as error:
        pytest.skip(f"no shipped checkpoint yet: {error}")
    from ssl_kit.enhance.checkpoints import load_checkpoint

    masks = mask_table(StageNetwork(*load_checkpoint(folder), [], name), load_test_set("embedded", limit=3))
    assert list(masks.collapsed) == [expected] * 3, mask_sentence(masks, name)


@pytest.fixture
def ctx(tmp_path):
    return StageContext("enhance_dpt", "abc", tmp_path, "ci", {"seed": 0}, {}, device_asked="cpu")


TINY = NetworkPlan("dpt", weights="train", size="tiny", steps=4, batch_size=2, clip_s=0.5)


def obtain(ctx, plan=TINY, name="dpt"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaskWarning)
        return obtain_network(ctx, name, plan)


def test_a_stage_goes_on_where_its_training_was_stopped(ctx, tmp_path):
    import time
    from dataclasses import replace

    whole = obtain(ctx)
    short = replace(ctx, run_dir=tmp_path / "other", deadline=time.time(), _notes={})
    part = obtain(short)
    notes = read_json(short.run_dir / "notes.json")
    assert len(part.history) == 1 and "time limit at step 2 of 4" in notes["unfinished"]
    rest = obtain(replace(short, deadline=None))
    assert [row["step"] for row in rest.history] == [2, 4]
    np.testing.assert_allclose([row["loss"] for row in rest.history], [row["loss"] for row in whole.history], rtol=1e-5)
    for a, b in zip(whole.network.parameters(), rest.network.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    again = obtain(ctx, NetworkPlan("dpt", checkpoint=str(ctx.artifacts / "dpt")))
    assert again.window_s == 0.5 and "folder that was given" in again.origin
    with pytest.raises(MissingDataError, match="checkpoint"):
        obtain(ctx, NetworkPlan("dpt", checkpoint=str(tmp_path / "nothing")))


def test_a_stage_says_whose_network_it_shows(ctx):
    from dataclasses import replace

    found = obtain(ctx, replace(TINY, weights="shipped"))
    try:
        shipped_checkpoint("dpt")
    except MissingDataError:
        assert "no checkpoint enhance_dpt yet" in found.origin and "tiny size" in found.origin
    else:
        assert "comes with the kit" in found.origin and found.network.config.d_model == 128
    for wrong in ({"weights": "my folder"}, {"size": "huge"}, {"recipe": "nothing"}):
        with pytest.raises(ParameterError):
            NetworkPlan(**{"recipe": "dpt"} | wrong)


@pytest.fixture(scope="module")
def mixtures():
    return load_test_set("embedded", limit=6)


@pytest.fixture(scope="module")
def table(mixtures):
    systems = {"noisy": np.asarray} | oracle_functions(["real mask", "mel + clean phase"], mixtures)
    return evaluate_systems(systems, mixtures, ("pesq", "stoi", "si_sdr"), workers=1)


def test_every_figure_has_its_data_and_its_origin(ctx, mixtures, table):
    noisy, clean = mixtures.noisy[0], mixtures.clean[0]
    masks = {}
    with torch.no_grad():
        for kind in ("stft", "dpt"):
            masks[kind] = fresh(kind, 0).forward_with_mask(torch.from_numpy(noisy)[None])[1]
    history = [{"step": k + 1, "loss": 1.0, "valid_loss": 1.0, "valid_pesq": 1.2, "mask_identity": 0.1,
                "mask_spread_frequency": 0.1} for k in range(3)]
    review = review_table(table, {}, ("pesq", "stoi", "si_sdr"))
    shown = {"noisy": mixtures.noisy[:2]}
    made = {
        "spectrograms": figures.spectrograms_figure({"noisy": noisy, "clean": clean}),
        "mask": figures.mask_figure(masks["dpt"], 0.008),
        "attention": figures.attention_figure(fresh("dpt", 0).attention_maps(torch.from_numpy(noisy)[None]), 0.008),
        "training": figures.training_figure(history),
        "review": figures_review.review_figure(review),
        "snr": figures_review.snr_figure(table),
        "collapse": figures_review.collapse_figure(masks, 0.008),
        "phase": figures_review.phase_figure(table, shown, mixtures.clean[:2]),
    }
    for name, (fig, data) in made.items():
        files = ctx.save_figure(fig, name, data, thesis=True, caption="A caption")
        origin = read_json(files["origin"])
        assert origin["stage"] == "enhance_dpt" and origin["thesis"] and origin["caption"] == "A caption"
        assert set(origin["files"]) == {f"{name}.pdf", f"{name}.png", f"{name}.csv"}
        saved = read_figure_data(files["csv"])
        assert len(saved) == len(data) > 0 and list(saved) == [str(column) for column in data], name
        assert files["csv"].stat().st_size < 1_500_000, name


def test_figures_refuse_what_they_cannot_show(table):
    with pytest.raises(DataError, match="noisy.*512 samples"):
        figures.spectrograms_figure({"noisy": np.zeros(100)})
    with pytest.raises(DataError, match="history"):
        figures.training_figure([])
    with pytest.raises(DataError, match="one test set"):
        figures_review.phase_figure(pd.concat([table, table.assign(test_set="other")]), {}, [])


def test_the_picture_of_a_complex_mask_is_that_of_its_magnitude():
    mask = torch.rand(1, 257, 50, generator=torch.Generator().manual_seed(0))
    for one in (mask, -mask, torch.stack([0.6 * mask, -0.8 * mask], dim=1)):
        np.testing.assert_allclose(figures.mask_magnitude(one), mask[0], rtol=1e-5)


def test_phase_errors_have_closed_forms():
    rng = np.random.default_rng(0)
    clean, other = rng.standard_normal((2, 32000)).astype(np.float32)
    edges = np.linspace(-182.5, 182.5, 74)
    same, turned = (figures_review.phase_errors(part, clean, edges) for part in (0.5 * clean, -clean))
    assert same[36] * 5 == pytest.approx(1, abs=1e-6)
    assert (turned[0] + turned[-1]) * 5 == pytest.approx(1, abs=1e-6)
    unrelated = figures_review.phase_errors(other, clean, np.linspace(-180, 180, 37))
    np.testing.assert_allclose(unrelated, 1 / 360, rtol=0.15)


def test_metrics_of_a_stage_leave_out_what_has_no_value(ctx, table):
    failed = table.copy()
    failed.loc[failed.system == "real mask", ["pesq", "stoi", "si_sdr"]] = np.nan
    failed.loc[failed.system == "real mask", "reason"] = "told to fail"
    save_evaluation(ctx, failed, {"real mask": Costs(None, None, 0.5)}, ["noisy", "real mask"])
    metrics = read_json(ctx.run_dir / "metrics.json")
    assert metrics["failed"] == 6 and metrics["costs"]["real mask"]["real_time_factor"] == 0.5
    assert {row["label"].split(":")[0] for row in metrics["headline"]} == {"noisy"}
    for name in ("mixtures", "summary", "by_snr", "by_kind", "differences"):
        assert (ctx.run_dir / "tables" / f"{name}.csv").is_file()


def test_what_is_heard_is_not_clipped_and_keeps_its_levels(ctx):
    tone = np.sin(np.arange(16000) / 5).astype(np.float32)
    paths = save_listening(ctx, {"noisy": 4 * tone, "clean": tone})
    loud, soft = (read_audio(paths[name])[0] for name in ("noisy", "clean"))
    assert np.abs(loud).max() < 1
    assert np.abs(loud).max() / np.abs(soft).max() == pytest.approx(4, rel=1e-3)


def test_stages_are_declared_and_the_review_needs_the_others():
    stages = {name: read_stage(stages_folder() / f"{name}.ipynb") for name in STAGES}
    assert set(stages["enhance_review"].needs) == set(STAGES[:-1]) and stages["enhance_dpt"].needs == ("enhance_stft",)
    for name, stage in stages.items():
        ci, quick, full = (stage.resolve(profile) for profile in ("ci", "quick", "full"))
        assert (ci["weights"], quick["weights"], full["weights"]) == ("train", "shipped", "train"), name
        assert full["limit"] == 105 and full["test_sets"] == ["matched", "unseen"] and ci["limit"] <= 6
        assert stage.data_folders(full) and not stage.data_folders(ci)
        with pytest.raises(ParameterError, match="test_sets"):
            stage.resolve("quick", {"test_sets": ["mached"]})
        with pytest.raises(ParameterError, match="weights"):
            stage.resolve("quick", {"weights": "trained"})


def test_no_two_figures_or_tables_for_the_thesis_share_a_name():
    import re

    names = []
    for path in sorted(stages_folder().glob("enhance_*.ipynb")):
        source = read_stage(path).source
        names += re.findall(r'save_figure\(fig, "(\w+)"', source) + re.findall(r'"(\w+)\.tex"', source)
    assert len(names) > 15 and len(names) == len(set(names)), sorted(names)
