"""What stage notebooks may declare, how they are found and ordered, and the context by hand."""

import pytest
from stage_notebooks import write_stage, write_toy

from ssl_kit.lab.context import StageContext, stage_context
from ssl_kit.lab.errors import MissingDataError, ParameterError
from ssl_kit.lab.files import read_json, write_json
from ssl_kit.lab.stages import find_stage, list_stages, read_stage, stages_folder, with_needs


def test_a_stage_is_read_without_being_run(tmp_path):
    path = write_stage(
        tmp_path, "study", "dict(title='Study', track='routing', needs=['rooms'], seconds={'ci': 3.0}, "
        "data={'corpus=librispeech': ['speech'], '': ['noise']})",
        "seed: int = 0  # random seed\ncorpus: str = 'embedded'\nn: int = 5", "{'ci': {'n': 1}, 'full': {'n': 100}}",
        cells=["raise SystemError('a stage was executed')", "%matplotlib inline\nx = n"])
    stage = read_stage(path)
    assert (stage.name, stage.title, stage.track, stage.needs) == ("study", "Study", "routing", ("rooms",))
    assert [stage.resolve(profile)["n"] for profile in ("ci", "quick", "full")] == [1, 5, 100]
    assert stage.resolve("ci", {"n": 7})["n"] == 7
    assert stage.data_folders(stage.resolve()) == ["noise"]
    assert stage.data_folders(stage.resolve("quick", {"corpus": "librispeech"})) == ["noise", "speech"]
    assert "matplotlib" in stage.source and "STAGE" not in stage.source and "PROFILES" not in stage.source


@pytest.mark.parametrize(("kwargs", "complaint"), [
    ({"stage": "dict(needs=[])"}, "no title"),
    ({"stage": "dict(title='x', need=['a'])"}, "did you mean 'needs'"),
    ({"stage": "dict(title='x', needs='rooms')"}, "'needs'"),
    ({"stage": "dict(title=str(1))"}, "literals alone"),
    ({"stage": "dict(title='x', data={'corpus=a': ['speech']})"}, "names no parameter"),
    ({"parameters": "seed = 0"}, "name: type = value"),
    ({"profiles": "{'ci': {'sed': 1}}"}, "profile ci: unknown parameter 'sed'; did you mean 'seed'"),
    ({"profiles": "{'ci': {'seed': 'one'}}"}, "expects int"),
    ({"profiles": "{'tiny': {'seed': 1}}"}, "profile 'tiny' is unknown"),
    ({"stage": "dict(title='x', choices={'sed': [0, 1]})"}, "did you mean 'seed'"),
    ({"stage": "dict(title='x', choices={'seed': [1, 2]})"}, "default: parameter 'seed' knows no 0"),
    ({"stage": "dict(title='x', choices={'seed': [0]})", "profiles": "{'ci': {'seed': 1}}"}, "profile ci.*knows no 1"),
    ({"stage": "dict(title='x', paths=['sed'])"}, "STAGE\\['paths'\\] names 'sed'"),
])
def test_a_wrong_declaration_names_notebook_and_fault(tmp_path, kwargs, complaint):
    with pytest.raises(ParameterError, match=complaint):
        read_stage(write_stage(tmp_path, "wrong", **kwargs))


def test_the_folder_of_stages(tmp_path, monkeypatch):
    folder = tmp_path / "clone" / "nbs" / "stages"
    write_toy(folder)
    monkeypatch.delenv("SSL_KIT_STAGES", raising=False)
    (tmp_path / "clone" / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone" / "deep" / "er")
    assert stages_folder() == folder.resolve()
    monkeypatch.setenv("SSL_KIT_STAGES", str(tmp_path / "nowhere"))
    with pytest.raises(MissingDataError, match="nowhere"):
        stages_folder()
    with pytest.raises(ParameterError, match="did you mean 'toy'"):
        find_stage("tou", folder)


def test_order_does_not_depend_on_names(tmp_path):
    for name, needs in [("a_study", "['m_banks', 'z_rooms']"), ("m_banks", "['z_rooms']"), ("z_rooms", "[]")]:
        write_stage(tmp_path, name, f"dict(title='{name}', needs={needs})")
    write_stage(tmp_path, "_draft", "not even a stage")
    stages = list_stages(tmp_path)
    assert list(stages) == ["z_rooms", "m_banks", "a_study"]
    assert list(with_needs("m_banks", stages)) == ["z_rooms", "m_banks"]
    write_stage(tmp_path, "b_lost", "dict(title='b', needs=['z_room'])")
    with pytest.raises(ParameterError, match="did you mean 'z_rooms'"):
        list_stages(tmp_path)


def finished(runs, stage, run_id, **parameters):
    write_json(runs / stage / run_id / "params.json", parameters)
    write_json(runs / stage / run_id / "status.json", {"state": "finished"})


def test_context_by_hand(tmp_path, monkeypatch):
    """In JupyterLab the newest run that agrees on shared parameters stands in for what a stage needs."""
    write_stage(tmp_path / "stages", "rooms")
    write_stage(tmp_path / "stages", "study", "dict(title='Study', needs=['rooms'])", "seed: int = 3\nn: int = 1")
    runs = tmp_path / "runs"
    monkeypatch.setenv("SSL_KIT_STAGES", str(tmp_path / "stages"))
    monkeypatch.setenv("SSL_KIT_RUNS", str(runs))
    monkeypatch.delenv("SSL_KIT_RUN_DIR", raising=False)
    with pytest.raises(MissingDataError, match="ssl-kit run rooms"):
        stage_context("study")
    finished(runs, "rooms", "other", seed=4)
    finished(runs, "rooms", "mine", seed=3)
    ctx = stage_context("study")
    assert ctx.interactive and ctx.run_dir == runs / "study" / "interactive" and ctx.upstream("rooms").name == "mine"
    assert ctx.seed == 3 and ctx.artifacts.is_dir()
    with pytest.raises(ParameterError, match="not declared"):
        ctx.upstream("banks")
    with pytest.raises(ParameterError, match="give its name"):
        stage_context()
    monkeypatch.setenv("JPY_SESSION_NAME", "nbs/stages/study.ipynb")
    assert stage_context().stage == "study"


@pytest.mark.parametrize("headline", [{"MAE": 3}, [{"label": "MAE"}], [{"label": "a", "value": 1, "units": "°"}], [3]])
def test_a_headline_that_no_table_could_read_is_refused(tmp_path, headline):
    ctx = StageContext("demo", "id", tmp_path, "ci", {}, {})
    with pytest.raises(ParameterError, match="headline"):
        ctx.save_metrics({"headline": headline})


def test_what_a_context_saves(tmp_path):
    import matplotlib.figure
    import pandas as pd

    ctx = StageContext("demo", "id", tmp_path, "ci", {"seed": 1}, {}, device_asked="cpu", code_version="0.1.0+abc")
    frame = pd.DataFrame({"rate": [0.1, 0.2], "mae": [3.0, 2.5]})
    assert pd.read_csv(ctx.save_table(frame, "mae")).equals(frame)
    figure = matplotlib.figure.Figure()
    figure.subplots().plot(frame.rate, frame.mae)
    paths = ctx.save_figure(figure, "mae", frame, thesis=True, caption="Error")
    origin = read_json(tmp_path / "figures" / "mae.origin.json")
    assert all(path.exists() for path in paths.values())
    assert {"stage": "demo", "run_id": "id", "thesis": True, "caption": "Error",
            "code_version": "0.1.0+abc"}.items() <= origin.items()
    (tmp_path / "net.bin").write_bytes(b"abc")
    assert ctx.note_checkpoint(tmp_path / "net.bin").startswith("ba7816bf") and ctx.device == "cpu"
    notes = read_json(tmp_path / "notes.json")
    assert notes["checkpoints"]["net.bin"].startswith("ba7816bf") and notes["device"] == "cpu"


def test_optional_data_is_used_where_it_is_and_not_missed_where_it_is_not(tmp_path, monkeypatch):
    from ssl_kit.lab.runs import plan

    write_stage(tmp_path / "stages", "toy", "dict(title='T', optional_data=['tables'])")
    stages = list_stages(tmp_path / "stages")
    monkeypatch.setenv("SSL_KIT_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "tables").mkdir(parents=True)
    (tmp_path / "data" / "tables" / "a.csv").write_text("1")
    with_data = plan(stages, runs=tmp_path / "runs")["toy"]
    (tmp_path / "data" / "tables" / "a.csv").unlink()
    (tmp_path / "data" / "tables").rmdir()
    without = plan(stages, runs=tmp_path / "runs")["toy"]
    assert with_data.folder != without.folder


def test_a_value_that_is_no_choice_is_refused(tmp_path):
    path = write_stage(tmp_path, "study", "dict(title='x', choices={'corpora': ['embedded', 'librispeech']})",
                       "corpora: list[str] = ['embedded']")
    stage = read_stage(path)
    assert stage.resolve("quick", {"corpora": ["librispeech", "embedded"]})["corpora"] == ["librispeech", "embedded"]
    with pytest.raises(ParameterError, match="'corpora' knows no 'libri'; did you mean 'librispeech'"):
        stage.parameters["corpora"].parse("embedded,libri")


def test_a_path_is_known_by_its_content(tmp_path, monkeypatch):
    from ssl_kit.lab.runs import plan

    write_stage(tmp_path / "stages", "toy", "dict(title='T', paths=['checkpoint'])", "checkpoint: str = ''")
    stages = list_stages(tmp_path / "stages")
    monkeypatch.chdir(tmp_path)

    def planned(value):
        return plan(stages, "quick", [f"checkpoint={value}"], "toy", tmp_path / "runs")["toy"]

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("1")
    one = planned("one")
    assert one.values["checkpoint"] == str(tmp_path / "one")  # the kernel works in the run folder
    assert planned("two").run_id == one.run_id != planned("").run_id
    (tmp_path / "one" / "weights").write_text("2")
    assert planned("one").run_id != one.run_id
    assert planned("one/weights").values["checkpoint"].endswith("one/weights")
    with pytest.raises(MissingDataError, match="-p checkpoint=three: expected a file or folder"):
        planned("three")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    import torch

    from ssl_kit.lab.context import found_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match="'cuda'.*doctor"):
        found_device("cuda")
    with pytest.raises(ParameterError, match="'gpu' is unknown; there are: auto, cpu"):
        found_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert found_device("auto") == "cuda"
