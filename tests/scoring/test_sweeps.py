"""A sweep's rows stay done, whatever grid asks for them, and are looked up by all that defines them."""

import json

from vqgan_jax import storage
from vqgan_jax.scoring import sweeps


def scorer(calls):
    return lambda setting: calls.append(setting) or {"fid": 10.0 + len(calls), "is_mean": 2.0}


def define(setting):
    return {"checkpoint": "a", "classifier": "small" if setting.get("acceptance", 1) < 1 else None}


def run(folder, text, calls, define=define, **fixed):
    settings = [fixed | setting for setting in sweeps.parse(text)]
    return sweeps.run(settings, scorer(calls), storage.path(folder / "s.json"), define)


def test_a_sweep_under_fixed_settings_goes_on(tmp_path):
    calls = []
    found = run(tmp_path, "temperature=1", calls, interval=(0.25, 0.75))
    assert run(tmp_path, "temperature=1", calls, interval=(0.25, 0.75)) == found and len(calls) == 1
    more = run(tmp_path, "temperature=1,2", calls, interval=(0.25, 0.75))
    assert more["rows"][0] == found["rows"][0] and len(calls) == 2
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_rows_that_a_grid_does_not_ask_for_stay_done(tmp_path):
    calls = []
    run(tmp_path, "top_k=1,2,3", calls)
    found = run(tmp_path, "top_k=4,2", calls)
    assert [row["name"] for row in found["rows"]] == ["top_k=4", "top_k=2"] and len(calls) == 4
    assert [row["name"] for row in found["earlier"]] == ["top_k=1", "top_k=3"] and found["best"] == "top_k=2"
    found = run(tmp_path, "top_k=1,2,3,4", calls)
    assert len(calls) == 4 and not found["earlier"]


def test_a_stopped_sweep_drops_nothing(tmp_path):
    calls = []
    run(tmp_path, "top_k=1,2", calls)
    stop = lambda setting: 1 / 0  # noqa: E731
    try:
        sweeps.run(sweeps.parse("top_k=1,5,2"), stop, storage.path(tmp_path / "s.json"), define)
    except ZeroDivisionError:
        pass
    assert len(run(tmp_path, "top_k=1,2", calls)["rows"]) == len(calls) == 2


def test_a_row_is_looked_up_by_its_own_definition(tmp_path):
    calls = []
    found = run(tmp_path, "acceptance=1,0.5", calls)
    assert [row["definition"]["classifier"] for row in found["rows"]] == [None, "small"]
    other = lambda setting: {name: value and f"{value} " for name, value in define(setting).items()}  # noqa: E731
    run(tmp_path, "acceptance=1,0.5", calls, lambda setting: other(setting) | {"checkpoint": "a"})
    assert calls[2:] == [{"acceptance": 0.5}]  # another classifier is another row where one is asked, only there
    assert json.loads((tmp_path / "s.json").read_text())["earlier"][0]["definition"]["classifier"] == "small"


def test_hosts_that_do_not_see_the_file_go_on_as_the_first_does(tmp_path, monkeypatch):
    calls = []
    found = run(tmp_path, "top_k=1,2", calls)
    there = sweeps._finished(storage.path(tmp_path / "s.json"))
    monkeypatch.setattr(sweeps.parallel, "of_first_host", lambda make: there)
    (tmp_path / "s.json").unlink()
    assert run(tmp_path, "top_k=1,2", calls) == found and len(calls) == 2
