"""The logs of a run that was stopped and resumed read like those of one that never was."""

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.train import metric_writer
from vqgan_jax.train.metric_writer import MetricWriter, open_writer


def json_lines(workdir: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def tensorboard(workdir: Path) -> EventAccumulator:
    return EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def event_files(workdir: Path) -> list[Path]:
    return sorted((workdir / "tensorboard").iterdir())


def test_every_kind_is_read_back(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with open_writer(tmp_path, resume_step=0) as writer:
        writer.write_hparams({"lr": 1e-3, "name": "demo", "sizes": (1, 2), "none": None})
        writer.write_scalars(5, {"loss": 0.5, "bad": np.nan, "worse": -np.inf})
        writer.write_images(5, {"one": picture[None], "two": np.stack([picture[..., :1]] * 2)})
        writer.write_texts(5, {"note": "hello"})
        writer.write_histograms(5, {"weights": np.arange(10.0)})
        writer.flush()
    scalars, note = json_lines(tmp_path)
    assert scalars.pop("time") > 1e9 and note.pop("time") > 1e9
    assert scalars == {"step": 5, "loss": 0.5, "bad": "nan", "worse": "-inf"}
    assert note == {"step": 5, "note": "hello"}
    events = tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.5)]
    assert np.isnan(events.Scalars("bad")[0].value)
    assert set(events.Tags()["images"]) == {"one", "two/0", "two/1"}
    assert (events.Images("one")[0].width, events.Images("one")[0].step) == (4, 5)
    assert events.Histograms("weights")[0].histogram_value.num == 10
    assert "note/text_summary" in events.Tags()["tensors"]
    assert events.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"


def write(workdir: Path, resume_step: int, last: int, value: float) -> None:
    with open_writer(workdir, resume_step=resume_step) as writer:
        writer.write_hparams({"lr": 1.0})
        for step in range(resume_step + 1, last + 1):
            writer.write_scalars(step, {"loss": value})
            writer.write_images(step, {"picture": np.zeros((1, 2, 2, 3), np.uint8)})


def test_resuming_cuts_the_logs_back(tmp_path):
    """No step twice and none missing, over two resumptions, in both logs; the later run's values stand."""
    write(tmp_path, 0, 10, 0.0)
    write(tmp_path, 6, 9, 1.0)
    write(tmp_path, 3, 12, 2.0)
    wanted = [(k, 0.0) for k in range(1, 4)] + [(k, 2.0) for k in range(4, 13)]
    assert [(line["step"], line["loss"]) for line in json_lines(tmp_path)] == wanted
    events = tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == wanted
    assert [e.step for e in events.Images("picture")] == list(range(1, 13))
    loaded = [event for path in event_files(tmp_path) for event in EventFileLoader(str(path)).Load()]
    tags = [value.tag for event in loaded for value in event.summary.value]
    assert tags.count("_hparams_/session_start_info") == 1


def download(workdir: str, folder: Path) -> None:
    for file in storage.files(workdir):
        storage.write_bytes(folder / file.relative_to(workdir).as_posix(), file.read_bytes())


def test_resuming_in_a_bucket_cuts_the_logs_back(bucket, tmp_path, monkeypatch):
    """The same over many small event files, which is what a bucket gets."""
    monkeypatch.setattr(metric_writer, "_PART_BYTES", 100)
    monkeypatch.setattr(metric_writer, "_FLUSH_SECONDS", 0.0)
    write(bucket, 0, 5, 0.0)
    write(bucket, 3, 7, 1.0)
    download(bucket, tmp_path)
    wanted = [(1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0), (5, 1.0), (6, 1.0), (7, 1.0)]
    assert [(line["step"], line["loss"]) for line in json_lines(tmp_path)] == wanted
    assert len(event_files(tmp_path)) > 10
    events = tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == wanted
    assert [e.step for e in events.Images("picture")] == [step for step, _ in wanted]


def test_a_bucket_has_what_was_flushed_when_the_process_dies(bucket, tmp_path):
    writer = open_writer(bucket, resume_step=0)
    writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    writer.write_scalars(2, {"loss": 2.0})  # not flushed, and the writer is never closed
    download(bucket, tmp_path)
    assert [line["step"] for line in json_lines(tmp_path)] == [1]
    assert [e.step for e in tensorboard(tmp_path).Scalars("loss")] == [1]


def test_what_is_written_is_flushed_in_time_without_being_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writer, "_FLUSH_SECONDS", 0.0)
    writer = open_writer(tmp_path, resume_step=0)
    writer.write_scalars(1, {"loss": 1.0})
    assert [e.step for e in tensorboard(tmp_path).Scalars("loss")] == [1]
    writer.close()


def test_starting_afresh_drops_everything(tmp_path):
    for value in (4.0, 5.0):
        with open_writer(tmp_path, resume_step=0) as writer:
            writer.write_scalars(0, {"loss": value})
    assert [(line["step"], line["loss"]) for line in json_lines(tmp_path)] == [(0, 5.0)]
    assert [(e.step, e.value) for e in tensorboard(tmp_path).Scalars("loss")] == [(0, 5.0)]


@pytest.mark.parametrize("torn", [1, 7, 30])
def test_what_a_killed_process_tore_is_dropped(tmp_path, torn):
    write(tmp_path, 0, 5, 0.0)
    for path in (tmp_path / "metrics.jsonl", event_files(tmp_path)[0]):
        os.truncate(path, path.stat().st_size - torn)
    write(tmp_path, 4, 6, 1.0)
    wanted = [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (5, 1.0), (6, 1.0)]
    assert [(line["step"], line["loss"]) for line in json_lines(tmp_path)] == wanted
    assert [(e.step, e.value) for e in tensorboard(tmp_path).Scalars("loss")] == wanted


def test_a_line_that_lacks_its_newline_alone_is_kept(tmp_path):
    write(tmp_path, 0, 5, 0.0)
    os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 1)
    write(tmp_path, 5, 6, 1.0)
    assert [line["step"] for line in json_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_flush_puts_all_on_disk(tmp_path):
    writer = open_writer(tmp_path, resume_step=0)
    for step in range(200):
        writer.write_scalars(step, {"loss": step})
    writer.flush()
    assert len(json_lines(tmp_path)) == 200
    assert len(tensorboard(tmp_path).Scalars("loss")) == 200
    writer.close()


@pytest.mark.parametrize(
    "pictures", [np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 3), np.uint8), np.zeros((1, 2, 2, 2), np.uint8)]
)
def test_pictures_of_another_kind_are_refused(tmp_path, pictures):
    with open_writer(tmp_path, resume_step=0) as writer:
        with pytest.raises(ValueError, match="bad: takes uint8"):
            writer.write_images(1, {"bad": pictures})


def test_hands_on_to_clu_where_it_imports(tmp_path, monkeypatch, caplog):
    calls = []

    class Sink:
        def __getattr__(self, name):
            return lambda *args: calls.append((name, *args))

    fake = types.ModuleType("clu.metric_writers")
    fake.create_default_writer = lambda logdir, asynchronous: calls.append(logdir) or Sink()
    monkeypatch.setitem(sys.modules, "clu.metric_writers", fake)
    monkeypatch.setattr("clu.metric_writers", fake, raising=False)
    with open_writer(tmp_path, resume_step=0, hand_to_clu=True) as writer:
        writer.write_scalars(1, {"loss": 2.0})
        writer.write_histograms(1, {"w": np.ones(1)})
    assert calls[:2] == [str(tmp_path / "clu"), ("write_scalars", 1, {"loss": 2.0})]
    assert calls[2][:2] == ("write_histograms", 1) and calls[2][3] == {"w": 30} and calls[3] == ("close",)
    monkeypatch.setitem(sys.modules, "clu.metric_writers", None)
    monkeypatch.delattr("clu.metric_writers", raising=False)
    with open_writer(tmp_path, resume_step=1, hand_to_clu=True) as writer:
        writer.write_scalars(2, {"loss": 3.0})
    assert "does not import" in caplog.text
    assert [line["loss"] for line in json_lines(tmp_path)] == [2.0, 3.0]


class FakeServer(types.ModuleType):
    """W&B as far as a run shows: rows by step, which never go back, kept over restarts of the same id."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.Image = {}, lambda picture: picture.shape

    def init(self, *, id, resume, **said):
        assert resume == "allow"
        rows = self.runs.setdefault(id, [])
        self.said = said

        class Run:
            resumed = bool(rows)
            summary = {name: value for row in rows for name, value in row.items()}
            axes = {}

            def define_metric(self, name, step_metric):
                self.axes[name] = step_metric

            def log(self, values):
                assert self.axes == {"*": "step", "val/*": "val/step"}
                rows.append(values)

            def finish(self): ...

        return Run()


def test_one_run_of_wandb_a_workdir_without_gap_or_double(tmp_path, monkeypatch, caplog):
    server = FakeServer()
    monkeypatch.setitem(sys.modules, "wandb", server)
    (tmp_path / "config.json").write_text('{"seed": 3}')

    def look(writer, step):
        writer.write_scalars(step, {"val/psnr": step})
        writer.write_images(step, {"drawn": np.zeros((1, 4, 4, 3), np.uint8)})

    # Killed after step 6, goes on after the checkpoint of step 4; stopped at 8, where its looks are owed.
    for start, stop in ((0, 6), (4, 8), (8, 9)):
        with open_writer(tmp_path, resume_step=start, wandb="team/scenes") as writer:
            if start == 8:
                look(writer, 8)
            for step in range(start + 1, stop + 1):
                writer.write_scalars(step, {"loss": step / 2})
                if step != 8:
                    look(writer, step)
    (rows,) = server.runs.values()
    steps = range(1, 10)
    assert [row for row in rows if "loss" in row] == [{"loss": step / 2, "step": step} for step in steps]
    assert [row for row in rows if "val/psnr" in row] == [{"val/psnr": step, "val/step": step} for step in steps]
    assert [row["images/step"] for row in rows if "drawn" in row] == list(steps)
    assert (
        server.said["entity"] == "team" and server.said["project"] == "scenes" and server.said["config"] == {"seed": 3}
    )
    with open_writer(tmp_path, resume_step=9, wandb="scenes") as writer:
        writer.write_images(10, {"val/x": np.zeros((2, 4, 4, 3), np.uint8)})
    assert rows[-1] == {"val/x": [(4, 4, 3)] * 2, "images/step": 10} and server.said["entity"] is None
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_writer(tmp_path, resume_step=9, wandb="scenes") as writer:
        writer.write_scalars(10, {"loss": 3.0})
    assert "wandb does not import" in caplog.text and json_lines(tmp_path)[-1]["loss"] == 3.0


def test_a_fresh_start_in_a_workdir_is_a_run_of_its_own_at_wandb(tmp_path, monkeypatch):
    server = FakeServer()
    monkeypatch.setitem(sys.modules, "wandb", server)
    for start, value in ((0, 1.0), (2, 1.0), (0, 5.0), (2, 5.0)):  # the checkpoints were deleted in between
        with open_writer(tmp_path, resume_step=start, wandb="scenes") as writer:
            writer.write_scalars(start + 1, {"loss": value})
    assert list(server.runs.values()) == [[{"loss": value, "step": step} for step in (1, 3)] for value in (1.0, 5.0)]


@pytest.mark.parametrize("broken", ["init", "log", "finish", "Image"])
def test_what_wandb_raises_ends_no_run(tmp_path, monkeypatch, caplog, broken):
    class CommError(Exception): ...

    def fail(*_, **__):
        raise CommError("the network is down")

    server = FakeServer()
    if broken in ("init", "Image"):
        setattr(server, broken, fail)
    else:
        begin = server.init

        def init(**said):
            started = begin(**said)
            setattr(started, broken, fail)
            return started

        server.init = init
    monkeypatch.setitem(sys.modules, "wandb", server)
    with open_writer(tmp_path, resume_step=0, wandb="scenes") as writer:
        for step in (1, 2, 3):
            writer.write_scalars(step, {"loss": float(step)})
            writer.write_images(step, {"x": np.zeros((1, 2, 2, 3), np.uint8)})
    assert caplog.text.count("the network is down") == 1
    assert [line["loss"] for line in json_lines(tmp_path)] == [1.0, 2.0, 3.0]
    if broken == "Image":
        assert list(server.runs.values()) == [[{"loss": float(step), "step": step} for step in (1, 2, 3)]]


def test_what_a_full_disk_raises_on_the_way_out_takes_no_others_place_and_every_log_is_closed(caplog):
    class Sink:
        closed = 0

        def close(self):
            self.closed += 1
            raise OSError("No space left on device")

    sinks = [Sink(), Sink()]
    with pytest.raises(UserError, match="the first fault"), MetricWriter(sinks):
        raise UserError("the first fault")
    assert [sink.closed for sink in sinks] == [1, 1] and "No space left" in caplog.text
    with pytest.raises(OSError, match="No space left"), MetricWriter(sinks):
        pass


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with open_writer(tmp_path / "run", resume_step=0) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        writer.flush()
    assert not (tmp_path / "run").exists()
