"""The perceptual loss against the PESQ that it imitates, in closed forms, and what it must not do"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.enhance.losses import LossConfig, enhancement_loss
from ssl_kit.enhance.metrics import pesq_wb
from ssl_kit.enhance.perceptual import bark_bands, perceptual_disturbance
from ssl_kit.enhance.test_sets import load_test_set
from ssl_kit.lab.errors import ParameterError


def test_it_ranks_mixtures_and_enhanced_signals_as_pesq_does():
    loaded = load_test_set("embedded", limit=12)
    found, wanted = [], []
    for noisy, clean in zip(loaded.noisy, loaded.clean, strict=True):
        for share in (0.0, 0.5, 0.8):                                 # of the noise that is taken away
            estimate = (1 - share) * noisy + share * clean
            found.append(float(perceptual_disturbance(torch.from_numpy(estimate)[None], torch.from_numpy(clean)[None])))
            wanted.append(pesq_wb(clean, estimate))
    raw = (3.8224 - np.log(4 / (np.array(wanted) - 0.999) - 1)) / 1.3669
    assert np.corrcoef(found, 4.5 - raw)[0, 1] > 0.85


def test_added_noise_counts_more_than_missing_speech():
    generator = torch.Generator().manual_seed(0)
    clean = 0.1 * torch.randn(1, 16000, generator=generator)
    envelope = (torch.arange(16000) // 2000 % 2).float()
    clean = clean * envelope                                          # half of the time silent
    added = clean + 0.05 * torch.randn(1, 16000, generator=generator) * (1 - envelope)
    missing = clean * (1 - 0.5 * (torch.arange(16000) // 4000 % 2))
    assert perceptual_disturbance(added, clean) > perceptual_disturbance(missing, clean)


def test_what_is_below_the_threshold_of_hearing_or_masked_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    clean = 0.1 * torch.randn(1, 16000, generator=generator)
    other = 0.1 * torch.randn(1, 16000, generator=generator)
    assert perceptual_disturbance(clean + 1e-4 * other, clean) < 0.02
    assert perceptual_disturbance(clean + other, clean) > 0.3


def test_bands_have_the_widths_of_the_scale():
    bands, threshold, width = bark_bands(49)
    assert np.isclose(49 * width, 6 * np.arcsinh(8000 / 600))
    assert np.allclose(bands.sum(0)[1:-1], 1) and (bands.sum(1) > 0).all() and (threshold > 0).all()
    with pytest.raises(ParameterError, match="n_bands"):
        bark_bands(0)


@settings(max_examples=15, deadline=None)
@given(gain=st.floats(0.05, 20.0), seed=st.integers(0, 99))
def test_volume_does_not_matter(gain, seed):
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (0.1 * torch.randn(2, 8000, generator=generator) for _ in range(2))
    plain = perceptual_disturbance(clean + noise, clean)
    assert torch.allclose(perceptual_disturbance(gain * (clean + noise), clean), plain, rtol=2e-3)
    assert torch.allclose(perceptual_disturbance(gain * (clean + noise), gain * clean), plain, rtol=2e-3)


def test_the_loss_has_it_with_its_weight_and_not_without():
    generator = torch.Generator().manual_seed(0)
    clean, noise = (0.1 * torch.randn(2, 8000, generator=generator) for _ in range(2))
    plain = enhancement_loss(clean + noise, clean)
    heard = enhancement_loss(clean + noise, clean, LossConfig(perceptual_weight=0.5))
    assert torch.allclose(heard - plain, 0.5 * perceptual_disturbance(clean + noise, clean).mean(), rtol=1e-3)


def test_shapes_are_asked_for():
    with pytest.raises(ParameterError, match="same shape"):
        perceptual_disturbance(torch.zeros(1, 8000), torch.zeros(2, 8000))
