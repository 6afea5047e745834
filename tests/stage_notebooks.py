"""Toy stages for the tests of stages, runs and commands."""

import json
from pathlib import Path

TOY = '''
import json, os, random, time
from ssl_kit.lab.files import read_json, write_json
from ssl_kit.lab.stages import stage_context

ctx = stage_context("toy")
state_path = ctx.artifacts / "state.json"
state = read_json(state_path) if state_path.exists() else {"step": 0, "total": 0.0, "starts": []}
state["starts"].append(state["step"])
for step in range(state["step"], n_steps):
    if ctx.time_left() < 1000:
        ctx.unfinished(f"time limit at step {step}")
        break
    if os.environ.get("TOY_HANGS_AT") == str(step):
        time.sleep(600)  # until somebody ends it
    time.sleep(step_s)
    state["total"] += random.Random(seed * 1000 + step).random()
    state["step"] = step + 1
    write_json(state_path, state)
if fail:
    raise ValueError(f"told to fail at seed {seed}")
'''
TOY_RESULT = '''
if state["step"] == n_steps:
    ctx.save_metrics({"total": state["total"], "starts": state["starts"],
                      "headline": [{"label": "total", "value": state["total"], "unit": "m", "interval": [0.0, 9.0]}]})
'''


def toy_total(n_steps, seed):
    """What the toy stage must come to, interrupted or not."""
    import random

    total = 0.0
    for step in range(n_steps):
        total += random.Random(seed * 1000 + step).random()
    return total


def write_stage(folder, name, stage="dict(title='A stage')", parameters="seed: int = 0  # random seed", profiles=None,
                cells=()):
    """Write a stage notebook; `stage`, `parameters`, `profiles` are the sources of the tagged cells."""
    tagged = [("stage", f"STAGE = {stage}"), ("parameters", parameters)]
    tagged += [("profiles", f"PROFILES = {profiles}")] if profiles is not None else []
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": [tag]} if tag else {}, "outputs": [],
              "execution_count": None, "source": source}
             for i, (tag, source) in enumerate([*tagged, *((None, source) for source in cells)])]
    kernel = {"kernelspec": {"name": "a-kernel-nobody-has", "language": "python", "display_name": "x"}}
    path = Path(folder) / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


def write_toy(folder, **kwargs):
    """The stage `toy`: adds up seeded numbers, a step at a time, and can go on where it stopped."""
    parameters = "seed: int = 0  # random seed\nn_steps: int = 2\nstep_s: float = 0.0\nfail: bool = False"
    return write_stage(folder, "toy", "dict(title='Toy', seconds={'quick': 1.0})", parameters,
                       "{'ci': {'n_steps': 1}}", cells=(TOY, TOY_RESULT), **kwargs)
