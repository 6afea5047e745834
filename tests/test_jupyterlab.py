"""Panels as their users meet them: a notebook in JupyterLab, run from top to bottom, and a control that is moved."""

import json

import pytest
from browser import lab_server, open_browser, wait_for

LOCALIZE = """import numpy as np
from ssl_kit.arrays.geometry import named_array
from ssl_kit.arrays.recordings import Recording
from ssl_kit.localize.explorer import SpectrumExplorer

samples = 0.1 * np.random.default_rng(0).standard_normal((4, 16000))
SpectrumExplorer({"one": Recording(samples, 16000, named_array("uca:4:0.05")),
                  "two": Recording(samples[:, :8000], 16000, named_array("uca:4:0.05"))})"""
ENHANCE = """from ssl_kit.enhance.explorer import EnhancementExplorer, example_mixtures

EnhancementExplorer(example_mixtures(2), ["final_causal"])"""
FEWSHOT = """import tempfile
from ssl_kit.fewshot.explorer import PosteriorExplorer, example_recordings

folder = tempfile.TemporaryDirectory()
PosteriorExplorer(example_recordings(folder.name, ["trill", "arch"], 20.0))"""
STATE = """const panel = window.jupyterapp?.shell.currentWidget, kernel = panel?.sessionContext?.session?.kernel;
if (kernel?.status !== 'idle') return null;
const outputs = [...panel.content.model.cells].map(cell => cell.toJSON().outputs);
return outputs.map(of => of.map(output => output.output_type));"""

_OUTPUT = "document.querySelectorAll('.jp-CodeCell')[arguments[0]].querySelector('.jp-OutputArea {}')"
PICTURE = f"return {_OUTPUT.format('img')}.src"
CHOOSE_THE_SECOND = f"""const list = {_OUTPUT.format('select')};
list.selectedIndex = 1;
list.dispatchEvent(new Event('change', {{bubbles: true}}))"""


@pytest.mark.slow
def test_panels_of_three_tracks_run_top_to_bottom_and_answer(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipywidgets")
    cells = [nbformat.v4.new_code_cell(source) for source in (LOCALIZE, ENHANCE, FEWSHOT)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (tmp_path / "panels.ipynb").write_text(json.dumps(nbformat.v4.new_notebook(metadata=kernel, cells=cells)),
                                           encoding="utf-8")
    with open_browser(1400, 3000) as browser, lab_server(tmp_path) as address_of:
        browser.driver.get(address_of("panels.ipynb"))
        wait_for(lambda: browser.run(STATE), "kernel", 240)
        browser.run("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        outputs = wait_for(lambda: (lambda found: found and all(found) and found)(browser.run(STATE)), "outputs", 600)
        assert "error" not in [kind for output in outputs for kind in output]
        wait_for(lambda: len(browser.all(".jp-OutputArea audio")) == 5 and len(browser.all(".jp-OutputArea img")) == 4,
                 "pictures and players of three panels")
        for control in browser.all(".jp-OutputArea select, .jp-OutputArea .widget-slider"):
            label = browser.run("return arguments[0].closest('.jupyter-widgets').innerText", control)
            assert control.size["width"] > 50 or "from (s)" in label, label
        for number in range(3):
            picture = browser.run(PICTURE, number)
            browser.run(CHOOSE_THE_SECOND, number)
            wait_for(lambda number=number, picture=picture: browser.run(PICTURE, number) != picture,
                     f"other picture in cell {number}")
        browser.driver.save_screenshot(str(tmp_path / "panels.png"))
