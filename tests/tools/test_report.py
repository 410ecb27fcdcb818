"""The run page shows what a run holds, leaves out what it lacks, and asks the network for nothing."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from vqgan_jax.config import UserError
from vqgan_jax.images import save_png
from vqgan_jax.tools import curves, page, report, tables

PIXEL = np.full((4, 4, 3), 90, np.uint8)


class Page(html.parser.HTMLParser):
    """A page's tags with their attributes, in order; fails where tags do not close in order."""

    VOID = {"meta", "link", "img"}

    def __init__(self, path):
        super().__init__()
        self.tags, self._open = [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def write_metrics(workdir, rows):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def demo(tmp_path):
    """A demo folder with everything that the page can show."""
    folder = tmp_path / "demo"
    vqgan = [{"step": s, "time": 1000.0 + s, "loss": 1 / s, "nll": 1 / s, "quantizer_loss": 0.1} for s in range(1, 9)]
    write_metrics(folder / "vqgan", [*vqgan, {"step": 8, "time": 1009.0, "val/psnr": 25.5, "odd_one": 7.0}])
    gpt = [{"step": s, "time": 2000.0 + s, "nll": 4 - s / 8, "images/s": 100.0} for s in range(1, 9)]
    write_metrics(folder / "transformer", gpt)
    for step in (90, 100):
        save_png(folder / "vqgan" / "images" / f"pairs_{step:08d}.png", np.full((4, 4, 3), step, np.uint8))
    (folder / "vqgan" / "config.json").write_text(json.dumps({"batch_size": 8, "note": "<script>"}))
    (folder / "vqgan" / "run").mkdir()
    for k in range(11):
        record = {"argv": ["train_vqgan.py"], "git": {"revision": f"rev{k}", "dirty": True}, "versions": {"jax": "1.2"}}
        record["devices"] = {"kind": "TPU v9", "platform": "tpu", "count": 4, "processes": 1}
        (folder / "vqgan" / "run" / f"{k}.json").write_text(json.dumps(record))
    (folder / "summary.json").write_text(json.dumps({"val_psnr": 25.5, "table_nll": 3.75, "codebook_usage": 0.5}))
    log = [
        {"command": f"A=1 python {name}.py", "seconds": 1.0, "exit": code}
        for name, code in [("x", 0), ("y", 42), ("failed", 3)]
    ]
    (folder / "commands.json").write_text(json.dumps([*log, log[0], {**log[1], "exit": 0}]))
    save_png(folder / "samples.png", PIXEL)
    return folder


def test_the_whole_page(demo, capsys):
    assert report.main([str(demo), "--title", "a <b> title"]) == 0
    assert str(demo / "index.html") in capsys.readouterr().out
    page = Page(demo / "index.html")
    assert "<h1>a &lt;b&gt; title</h1>" in page.text
    headings = re.findall("<h2>(.*?)</h2>", page.text)
    assert headings == ["Summary", "Commands", "Pictures", "Curves", "Pictures from training", "Run record"]
    assert page.text.index("<h3>vqgan</h3>") < page.text.index("<h3>transformer</h3>")  # as they were trained
    assert "25.5 <span>dB</span>" in page.text and "50.0 %" in page.text
    assert re.findall("<code>(.*?)</code>", page.text) == ["A=1 python x.py", "A=1 python y.py"]
    assert "rev10, with changes" in page.text and "4 x TPU v9 (tpu)" in page.text and "jax 1.2" in page.text
    assert "&quot;note&quot;: &quot;&lt;script&gt;&quot;" in page.text
    assert "odd one" in page.text or "odd_one" in page.text  # no panel shows it, yet it is not lost


def test_the_page_asks_for_nothing(demo):
    report.main([str(demo)])
    page = Page(demo / "index.html")
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#").startswith(("data:", "#")), (tag, attrs)
    assert "://" not in page.text and "@import" not in page.text
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page.text))
    (policy,) = (attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_pictures_are_embedded_and_the_newest_of_each_name_stands(demo):
    report.main([str(demo)])
    samples, pairs = Page(demo / "index.html").all("img")
    assert samples["alt"] == "Samples" and pairs["alt"] == "pairs"
    data = base64.b64decode(pairs["src"].removeprefix("data:image/png;base64,"))
    assert data == (demo / "vqgan" / "images" / "pairs_00000100.png").read_bytes()


def test_the_baseline_stands_beside_the_transformer_alone(demo):
    report.main([str(demo)])
    text = (demo / "index.html").read_text()
    vqgan, transformer = text[text.index("<h3>vqgan</h3>") :].split("<h3>transformer</h3>")[:2]
    assert 'class="dashed"' in transformer and "3.75" in transformer
    assert 'class="dashed"' not in vqgan


def test_curves_follow_the_page(demo):
    """Every colour of the plots is one of the style sheet's, and no id stands twice."""
    report.main([str(demo)])
    page = Page(demo / "index.html")
    assert len(page.all("svg")) == 4  # losses and PSNR; likelihood and speed
    svgs = "".join(re.findall("<svg.*?</svg>", page.text, re.DOTALL))
    assert "var(--c0)" in svgs and "var(--c1)" in svgs and not re.findall("#0000[0-9a-f]{2}", svgs)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    per_plot = [re.findall(' id="(.*?)"', svg) for svg in re.findall("<svg.*?</svg>", svgs, re.DOTALL)]
    assert ids and all(len(found) == len(set(found)) for found in per_plot)
    assert not any(re.fullmatch(r"(figure|axes|line2d|text)_\d+", name) for name in ids)


def test_a_workdir_with_metrics_alone(tmp_path):
    write_metrics(tmp_path / "run", [{"step": 5, "time": 1.0, "val/nll": 2.5}])
    assert report.main([str(tmp_path / "run"), f"--out={tmp_path / 'new' / 'page.html'}"]) == 0
    page = Page(tmp_path / "new" / "page.html")
    assert re.findall("<h2>(.*?)</h2>", page.text) == ["Summary", "Curves", "Run record"]
    assert "2.5 <span>nats a token</span>" in page.text


def test_broken_pieces_are_left_out(demo):
    (demo / "summary.json").write_text('{"val_psnr": 1')
    (demo / "commands.json").write_text("")
    (demo / "samples.png").write_bytes(b"no image")
    (demo / "vqgan" / "config.json").write_text("{")
    (demo / "vqgan" / "run" / "10.json").write_text("[")
    with (demo / "vqgan" / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 9, "time": 1010.0, "loss": "nan", "text": "hello"}\n{"step": 10, "lo')
    assert report.main([str(demo)]) == 0
    page = Page(demo / "index.html")
    assert "rev9, with changes" in page.text and "python train_vqgan.py" in page.text
    assert "<b>nan</b>" in page.text and "hello" not in page.text
    assert [attrs["alt"] for attrs in page.all("img")] == ["pairs"]


def test_a_run_that_only_gave_nan(tmp_path):
    write_metrics(tmp_path, [{"step": s, "time": 1.0, "loss": "nan", "quantizer_loss": "inf"} for s in range(400)])
    assert report.main([str(tmp_path)]) == 0


@pytest.mark.parametrize("argument, words", [("missing", "no such folder"), ("", "no metrics.jsonl in it")])
def test_a_folder_without_metrics_is_one_line(tmp_path, capsys, argument, words):
    assert report.main([str(tmp_path / argument)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and "--workdir" in error
    with pytest.raises(UserError):
        report.gather([tmp_path / argument])


def test_a_page_that_cannot_be_written_is_one_line(demo, capsys):
    assert report.main([str(demo), f"--out={demo / 'samples.png' / 'page.html'}"]) == 2
    assert capsys.readouterr().err.startswith("error: --out=")


def test_several_folders_keep_their_names_apart(demo, tmp_path):
    write_metrics(tmp_path / "long", [{"step": 5, "time": 1.0, "val/nll": 2.5, "val/nll_stderr": 0.5}])
    found = report.gather([demo, tmp_path / "long"])
    assert list(found["runs"]) == ["demo/vqgan", "demo/transformer", "long"]
    assert found["summary"]["demo/table_nll"] == 3.75 and found["summary"]["long/val/nll"] == 2.5
    report.main([str(demo), str(tmp_path / "long"), f"--out={tmp_path / 'both.html'}"])
    text = (tmp_path / "both.html").read_text()
    assert text.count('class="dashed"') == 1  # the demo's table says nothing about the other run
    assert "± 0.5" in text and text.count('<span class="soft">long</span>') == 2  # step and NLL; its error has no row


def test_a_long_curve_is_means_of_equal_stretches():
    steps, values = np.arange(1000), np.arange(1000.0)
    values[500] = np.nan
    thin_steps, thin_values = curves.thin(steps, values)
    assert len(thin_steps) <= curves.MAX_POINTS
    assert np.isnan(thin_values).sum() == 1
    kept = np.isfinite(thin_values)
    np.testing.assert_allclose(thin_values[kept], thin_steps[kept])
    assert thin_steps[0] == 1.5 and thin_steps[-1] == 997.5


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.5, "%", "50.0 %"),
        (59.2, "s", "59.2"),
        (553.2, "s", "9 min 13 s"),
        (7500, "s", "2 h 5 min"),
        (1024.0, "", "1,024"),
        (27.2134, "dB", "27.21"),
        (1.23e-5, "", "1.23e-05"),
        (12345.67, "", "12,345.7"),
        (float("nan"), "", "nan"),
        (float("-inf"), "", "-inf"),
    ],
)
def test_numbers_to_read(value, unit, text):
    assert tables.number(value, unit) == text


def test_small_pictures_grow_by_whole_factors(tmp_path):
    Image.fromarray(np.zeros((100, 200, 3), np.uint8)).save(tmp_path / "a.png")
    page.write_page(
        tmp_path / "p.html", title="t", summary={}, commands=[], runs={}, pictures=[("a", "", tmp_path / "a.png")]
    )
    (image,) = Page(tmp_path / "p.html").all("img")
    assert (image["width"], image["height"]) == ("400", "200")


def scored(tmp_path):
    """Two runs with one metric in common, and a result of each kind."""
    for name, psnr in (("long_run", 25.0), ("short", 20.0)):
        rows = [{"step": s, "time": 1.0, "loss": 1 / s, "val/psnr": psnr + s} for s in (1, 2, 3)]
        write_metrics(tmp_path / "runs" / name, rows)
    (tmp_path / "runs" / "short" / "evaluation.json").write_text(
        json.dumps({"val_psnr": 23.5, "val_psnr_stderr": 0.25, "fid": 12.0, "definition": {"a": 1}, "workdir": "x"})
    )
    (tmp_path / "runs" / "fid.json").write_text(json.dumps({"fid": 9.5, "precision": 0.5, "definition": {}}))
    rows = [{"name": "top_k=1", "scores": {"fid": 10.0}}, {"name": "top_k=2", "scores": {"fid": 11.0}}]
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "runs" / "notes.txt").write_text("no run")
    return sorted(str(path) for path in (tmp_path / "runs").iterdir())


def test_many_runs_become_tables_and_curves_laid_over_each_other(tmp_path, capsys):
    paths = scored(tmp_path)
    assert report.main(paths) == 0
    captured = capsys.readouterr()
    assert "passed over" in captured.err and "notes.txt" in captured.err and captured.out.count("wrote") == 5
    folder = tmp_path / "runs"
    lines = (folder / "report.md").read_text().splitlines()
    assert lines[0].split(" | ")[1:3] == ["Reconstruction PSNR [dB]", "FID"]
    table = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:3] for line in lines[2:]}
    assert table["short"] == ["23.5 ± 0.25", "12"] and table["fid"][1] == "9.5"  # of no known preset
    assert table["long_run"] == ["**28**", ""] and table["sweep: top_k=1"][1] == "10"
    rows = [line.split(",") for line in (folder / "report.csv").read_text().splitlines()]
    assert rows[0][:4] == ["run", "val_psnr", "val_psnr_stderr", "fid"]
    assert ["short", "23.5", "0.25", "12.0"] in [row[:4] for row in rows]
    latex = (folder / "report.tex").read_text()
    assert r"long\_run & \textbf{28}" in latex and "50.0 \\%" in latex
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    compared = page[page.index("<h2>Runs compared</h2>") : page.index("<h2>Curves</h2>")]
    assert compared.count("<svg") == 2 and compared.count("long_run") == compared.count("short") == 2


def test_one_run_is_not_compared_with_itself(tmp_path):
    write_metrics(tmp_path / "run", [{"step": 5, "time": 1.0, "loss": 2.5}])
    assert report.main([str(tmp_path / "run")]) == 0
    assert "Runs compared" not in (tmp_path / "run" / "index.html").read_text()
    assert [path.name for path in (tmp_path / "run").glob("*.md")] == []


def test_the_best_is_marked_by_the_figures_own_direction():
    rows = {"a": {"fid": 2.0, "val_psnr": 20.0, "samples": 5}, "b": {"fid": 3.0, "val_psnr": 30.0, "samples": 6}}
    for figures in rows.values():
        figures["definition"] = {"preset": "adm", "samples": 5, "reference": "train"}
        figures["samples"] = 5
    assert tables.best_rows(rows, "fid") == {"a"} and tables.best_rows(rows, "val_psnr") == {"b"}
    assert tables.best_rows(rows, "samples") == set()
    assert tables.best_rows({"a": rows["a"]}, "fid") == set()
    rows["a"]["fid"] = float("nan")
    assert tables.best_rows(rows | {"c": rows["b"] | {"fid": 4.0}}, "fid") == {"b"}


@pytest.mark.parametrize(
    "figure, change, marked",
    [
        ("fid", {}, True),
        ("fid", {"definition": {"preset": "clean"}}, False),
        ("fid", {"definition": {"network": {"sha256": "1"}}}, False),
        ("fid", {"definition": {"reference": {"source": "b"}}}, False),
        ("fid", {"definition": {"preset": None}}, False),
        ("fid", {"samples": 20}, False),
        ("fid", {"definition": {"data": {"path": "b"}}}, True),
        ("rfid", {"definition": {"data": {"path": "b"}}}, False),
        ("rfid", {"definition": {"data": {"path": "a", "threads": 8}}}, True),
        ("rfid", {"rfid_images": 20}, False),
        ("val_psnr", {"definition": {"preset": "clean"}}, True),
    ],
)
def test_no_best_among_scores_that_were_not_made_alike(figure, change, marked):
    said = {"preset": "adm", "network": {"sha256": "0"}, "reference": {"source": "a"}, "data": {"path": "a"}}
    row = {"samples": 10, "rfid_images": 10, "definition": said, figure: 2.0}
    other = row | change | {"definition": said | change.get("definition", {}), figure: 3.0}
    assert bool(tables.best_rows({"a": row, "b": other}, figure)) == marked
    assert tables.named("a", row) == ("a" if figure == "val_psnr" else "a [adm, 10]")


def test_results_of_one_name_and_followed_checkpoints_have_rows_of_their_own(tmp_path):
    said = {"preset": "clean", "reference": {}}
    for k, run in enumerate(("a", "b")):
        (tmp_path / run).mkdir()
        result = {"fid": 3.0 + k, "samples": 10, "definition": said}
        (tmp_path / run / "evaluation.json").write_text(json.dumps(result))
    followed = [{"step": step, "scores": {"fid": 9.0, "samples": 20, "definition": said}} for step in (5, 10)]
    (tmp_path / "follow.json").write_text(json.dumps({"rows": followed, "definition": said}))
    swept = [{"name": "top_k=1", "scores": {"fid": 9.0, "samples": 30}, "definition": said}]
    (tmp_path / "sweep.json").write_text(json.dumps({"rows": swept}))
    rows = report.gather_rows([str(path) for path in sorted(tmp_path.rglob("*.json"))])
    assert list(rows) == [
        "a/evaluation [clean, 10]",
        "b/evaluation [clean, 10]",
        "follow: step 5 [clean, 20]",
        "follow: step 10 [clean, 20]",
        "sweep: top_k=1 [clean, 30]",
    ]


@pytest.mark.parametrize("preset, compared", [("adm", True), ("clean", False)])
def test_runs_that_scored_themselves_are_compared_under_one_preset_alone(tmp_path, preset, compared):
    for name, chosen in (("a", "adm"), ("b", preset)):
        scored = [{"step": s, "time": 1.0, "val/fid": 5.0 / s, "val/psnr": 1.0 * s} for s in (1, 2)]
        write_metrics(tmp_path / name, [*scored, {"step": 3, "time": 2.0, "val/fid": 1.0 + (name == "b")}])
        config = {"fid_preset": chosen, "fid_samples": 50, "fid_reference": "train", "data": {"path": "x"}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert report.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = (tmp_path / "report.html").read_text()
    together = text[text.index("<h2>Runs compared</h2>") : text.index("<h2>Curves</h2>")]
    assert ("val/fid" in together or "FID" in together) == compared and "PSNR" in together
    table = (tmp_path / "report.md").read_text()
    assert "| a [adm, 50] |" in table and f"| b [{preset}, 50] |" in table and ("**1**" in table) == compared


def test_latex_escapes_what_it_would_take_for_commands():
    text = tables.latex({"50%_{x}&$": {"fid": 1.0}})
    assert r"50\%\_\{x\}\&\$" in text
