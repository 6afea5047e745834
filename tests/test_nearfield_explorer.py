"""Range slices: what is shown is the spectrum, the slider goes to sources, wrong factors are named."""

import sys

import numpy as np
import pytest

from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.nearfield.covariance import effective_covariance
from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes, true_covariance, true_factor
from ssl_kit.nearfield.spectra import PlaneGrid, capon_dense

GRID = PlaneGrid(41, 21)


@pytest.fixture
def explorer():
    pytest.importorskip("ipywidgets")
    from ssl_kit.nearfield.explorer import SliceExplorer, covariance_choices

    batch = draw_scenes(SceneConfig(n_sources=(2,), snr_db=(15.0, 15.0), path_gain=False), 4, range(3))
    return SliceExplorer(batch, covariance_choices(batch, ("ridge_ls",)), GRID, n_ranges=8)


def test_a_slice_is_the_capon_spectrum_of_the_one_builder(explorer):
    range_m = float(explorer.ranges_m[explorer.range.value])
    r = effective_covariance(true_covariance(explorer.batch), snr_db=explorer.batch.snr_db)[0]
    expected = 10 * np.log10(capon_dense(r, explorer.batch.surface, GRID, range_m))
    assert np.allclose(explorer.map_db, expected, atol=0.05)


def test_the_slider_begins_at_the_nearest_source_and_the_button_goes_through_all(explorer):
    for scene in range(3):
        explorer.scene.value = scene
        truth = explorer.batch.truth(scene)[:, 2]
        planes = [int(np.abs(1 / explorer.ranges_m - 1 / r).argmin()) for r in truth]
        assert explorer.range.value == planes[0]
        explorer.next_source()
        if len(set(planes)) == 2:
            assert explorer.range.value == planes[1]
            explorer.next_source()
        assert explorer.range.value == planes[0]


def test_every_control_changes_what_is_seen_and_slices_are_made_once(explorer):
    seen = {bytes(explorer.picture.value)}
    other = (explorer.range.value + 4) % 8
    for change in (lambda: setattr(explorer.covariance, "value", "ridge_ls"),
                   lambda: setattr(explorer.range, "value", other),
                   lambda: setattr(explorer.span, "value", 40), lambda: setattr(explorer.scene, "value", 1)):
        change()
        assert bytes(explorer.picture.value).startswith(b"\x89PNG")
        seen.add(bytes(explorer.picture.value))
    assert len(seen) == 5
    assert explorer.slices() is explorer.slices() and "ridge_ls" in explorer.numbers.value


def test_out_of_focus_a_source_is_lower(explorer):
    truth = explorer.batch.truth(0)
    from ssl_kit.nearfield.explorer import slice_db

    factor = true_factor(explorer.batch)[0]
    cell = tuple(np.abs(axis - value).argmin() for axis, value in
                 ((GRID.phi_deg, np.degrees(truth[0, 0])), (GRID.theta_deg, np.degrees(truth[0, 1]))))
    here, far = (slice_db(factor, 15.0, explorer.batch, GRID, r)[cell] for r in (truth[0, 2], 4 * truth[0, 2]))
    assert here > far + 1


def test_what_does_not_fit_is_named(explorer, monkeypatch):
    from ssl_kit.nearfield.explorer import SliceExplorer, slice_figure

    with pytest.raises(ParameterError, match="at least one covariance"):
        SliceExplorer(explorer.batch, {})
    with pytest.raises(DataError, match=r"factors\['mine'\].*\(3, 144, r\)"):
        SliceExplorer(explorer.batch, {"mine": np.ones((2, 144, 5))})
    with pytest.raises(DataError, match="map_db"):
        slice_figure(np.ones((3, 3)), GRID, 1.0, np.zeros((0, 3)))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(MissingDataError, match="ipywidgets"):
        SliceExplorer(explorer.batch, explorer.factors, GRID)
