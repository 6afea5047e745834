"""What the train commands share: whole epochs, options by the names of numbers, how a training ended."""

import argparse
import json
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.errors import ParameterError
from ssl_kit.lab.train_options import changed_numbers, say_trained, whole_epochs

TRACKS = {  # words that come before the numbers; reader of the command; where a short training is asked for
    "localize": (["geonet", "there"], "localize.train_command", "add_train_arguments", "chosen_recipe"),
    "enhance": (["final-medium", "there"], "enhance.train_command", "add_train_enhance_arguments",
                "chosen_enhance_recipe"),
    "nearfield": (["backbone", "there"], "nearfield.train_command", "add_train_nearfield_arguments",
                  "chosen_nearfield_recipe"),
}


def chosen(track, *words):
    """The module of a train command and the recipe that it makes of these words."""
    from importlib import import_module

    start, module, add_arguments, choose = TRACKS[track]
    module, parser = import_module(f"ssl_kit.{module}"), argparse.ArgumentParser()
    getattr(module, add_arguments)(parser)
    args = parser.parse_args([*start, *words])
    return module, args, getattr(module, choose)(args)


@given(steps=st.integers(1, 5000), epoch_steps=st.integers(1, 800))
def test_epochs_are_whole_and_as_long_as_can_be(steps, epoch_steps):
    k = whole_epochs(steps, epoch_steps)
    assert steps % k == 0 and k <= epoch_steps
    assert not any(steps % longer == 0 for longer in range(k + 1, min(epoch_steps, steps) + 1))


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize(("words", "epoch_steps"), [("--steps 7", 7), ("--steps 1013 --epoch-steps 500", 1),
                                                    ("--steps 90 --epoch-steps 40", 30)])
def test_a_short_training_has_short_epochs(track, words, epoch_steps):
    assert chosen(track, *shlex.split(words))[2].epoch_steps == epoch_steps


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize("word", ["--steps", "--epoch-steps", "--batch-size"])
def test_what_must_be_positive_is_named_as_it_was_typed(track, word):
    for value in ("0", "-3"):
        with pytest.raises(ParameterError, match=f"{word}: expected more than 0, found {value}"):
            chosen(track, word, value)
    assert chosen(track, "--seed", "0")[2].seed == 0


@pytest.mark.parametrize("track", ["enhance", "nearfield"])
def test_the_command_of_a_card_makes_its_recipe_again(track):
    module, args, recipe = chosen(track, "--batch-size", "12", "--learning-rate", "0.00025", "--seed", "9")
    words = shlex.split(module.training_command(args, recipe))
    assert {"--batch-size", "--learning-rate", "--seed"} <= set(words) and "--warmup-steps" not in words
    start = words.index("FOLDER") + 1
    assert chosen(track, *words[start:])[2] == recipe


def test_numbers_that_were_not_given_stay_out():
    args = argparse.Namespace(steps=3, clip_s=None)
    assert changed_numbers(args, ["steps", "clip_s", "unheard_of"], ["steps", "clip_s"]) == {"steps": 3}


@pytest.mark.parametrize("done", [True, False])
def test_how_it_ended(done, capsys):
    history = [{"step": 20, "loss": 0.5}]
    assert say_trained("m/checkpoint", history, 80, done, as_json=True) == (0 if done else 3)
    assert json.loads(capsys.readouterr().out) == {"checkpoint": "m/checkpoint", "complete": done, "history": history}
    say_trained("m/checkpoint", history, 80, done, as_json=False)
    assert capsys.readouterr().out == ("checkpoint in m/checkpoint\n" if done else
                                       "stopped at step 20 of 80; the same command goes on from there\n")


def test_help_of_the_commands_needs_no_torch():
    code = ("import sys, ssl_kit.enhance.train_command, ssl_kit.localize.train_command, ssl_kit.fewshot.shipped, "
            "ssl_kit.nearfield.train_command, ssl_kit.fewshot.command; sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
