"""Model cards: every figure comes from a file or a table, none is typed, and what was not noted is not there"""

import json

import pandas as pd
import pytest

from ssl_kit.enhance.cards import ABOUT_KINDS, model_card, results_table, write_card
from ssl_kit.enhance.checkpoints import save_checkpoint
from ssl_kit.enhance.models import KINDS, make_network
from ssl_kit.lab.errors import DataError, MissingDataError

ROW = {"test_set": "matched", "system": "noisy", "metric": "pesq", "mean": 1.2, "low": 1.1, "high": 1.3, "n": 5,
       "n_failed": 1}


def test_every_kind_has_words():
    assert set(ABOUT_KINDS) == set(KINDS)


def test_failures_stand_in_the_table_and_columns_are_asked_for():
    table = results_table(pd.DataFrame([ROW]))
    assert "| matched | noisy | 5, 1 failed | 1.20 [1.10, 1.30] |" in table
    assert "STOI" not in table
    with pytest.raises(DataError, match="n_failed"):
        results_table(pd.DataFrame([ROW]).drop(columns="n_failed"))


def test_a_card_says_what_is_noted_and_nothing_else(tmp_path):
    folder = save_checkpoint(tmp_path / "a", make_network("crn"), {"parameters": 7, "seconds": 60})
    card = model_card(folder)
    assert "| size | 7 parameters" in card and "1 minutes" in card
    assert "trained on" not in card and "make it again" not in card and "Measured" not in card
    assert write_card(folder, pd.DataFrame([ROW]), "a command", "quiet rooms").read_text().endswith("quiet rooms\n")


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(MissingDataError, match="config.json"):
        model_card(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "unknown", "about": {}}))
    with pytest.raises(DataError, match="config.json"):
        model_card(tmp_path)
