"""A sweep's plan: trials from overrides, validated against the config, and stages that are the same made once."""

import json
import re

import pytest

from configs import common
from vqgan_jax.config import UserError
from vqgan_jax.tools import trials
from vqgan_jax.tools.trials import Plan, make_plan

CHAIN = '''
"""A chain of two stages and scores."""
from configs import common

def chain(arg=None):
    stage = "--config=configs/demo_transformer.py"
    return {
        "tokenizer": ("train_vqgan.py", "--config=configs/demo_vqgan.py", "--workdir={out}", "--config.steps=30"),
        "gpt": ("train_transformer.py", stage, "--config.vqgan={tokenizer}", "--workdir={out}"),
        "scores": ("evaluate.py", "--workdir={gpt}", "--out={out}.json"),
    }

def sweep():
    codes, layers = "tokenizer.model.quantizer.codebook_size", "gpt.model.transformer.layers"
    return common.product({codes: (64, 128), layers: (1, 2)})

'''


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its name."""

    def write(text):
        file = tmp_path / "swept.py"
        file.write_text(text)
        return str(file)

    return write


def plan(config, **changes):
    return make_plan(config, "runs/x", **{"check": None, **changes})


def test_products_and_zips():
    both = common.zipped({"a": (1, 2), "b": (3, 4)})
    assert list(common.product({"x": (0, 1)}, both)) == [{"x": x, "a": a, "b": a + 2} for x in (0, 1) for a in (1, 2)]
    with pytest.raises(ValueError, match="longer"):
        list(common.zipped({"a": (1,), "b": (1, 2)}))


def test_a_chain_shares_what_is_the_same(write):
    made = plan(write(CHAIN))
    assert [trial.name for trial in made.trials] == [
        f"codebook_size={q} layers={layers}" for q in (64, 128) for layers in (1, 2)
    ]
    kinds = [name.partition("-")[0] for name in made.stages]
    assert [kinds.count(kind) for kind in ("tokenizer", "gpt", "scores")] == [2, 4, 4]
    first, second = made.trials[:2]
    assert first.stages[0] == second.stages[0] and first.stages[1] != second.stages[1]
    tokenizer, gpt, scores = (made.stages[name] for name in first.stages)
    assert tokenizer.name.startswith("tokenizer-codebook_size=64-") and tokenizer.job.startswith("tokenizer-")
    assert tokenizer.words[-1] == "--config.model.quantizer.codebook_size=64"
    assert f"--config.vqgan={tokenizer.out}" in gpt.words and tokenizer.out == f"runs/x/{tokenizer.name}"
    assert gpt.needs == (tokenizer.name,) and scores.needs == (gpt.name,)
    assert scores.words == ("evaluate.py", f"--workdir={gpt.out}", f"--out={scores.out}.json")
    seen = set()
    for stage in made.stages.values():  # each after what it needs
        assert seen.issuperset(stage.needs)
        seen.add(stage.name)
    assert Plan.from_json(made.to_json()) == made


def test_a_stage_is_known_by_its_config_not_by_its_place(write):
    """The names tell what would be made: same elsewhere, other where a config, or a stage before it, is."""
    config = write(CHAIN)
    names = set(plan(config).stages)
    assert set(make_plan(config, "gs://bucket/other", check=None).stages) == names
    default = plan(config, settings=["tokenizer.batch_size=8"])  # what it is anyway
    assert set(default.stages) == names
    assert not set(plan(config, settings=["tokenizer.batch_size=16"]).stages) & names
    later = set(plan(config, settings=["gpt.batch_size=16"]).stages)
    assert {name for name in later & names} == {name for name in names if name.startswith("tokenizer")}
    overridden = plan(config, settings=["scores.samples=8"])
    assert all("--samples=8" in s.words for s in overridden.stages.values() if s.name.startswith("scores"))


def test_clusters_hold_the_jobs_of_two_sweeps(write):
    """The same stages in two folders: the same digests, other jobs; names that clusters take, whatever the stages'."""
    config = write(CHAIN.replace('"gpt":', '"Gpt_2":').replace("{gpt}", "{Gpt_2}").replace('"gpt.', '"Gpt_2.'))
    first, second = make_plan(config, "gs://b/x", check=None), make_plan(config, "gs://b/y", check=None)
    assert [s.digest for s in first.stages.values()] == [s.digest for s in second.stages.values()]
    jobs = [s.job for plan in (first, second) for s in plan.stages.values()]
    assert len(set(jobs)) == len(jobs) == 20
    jobs += [trials._job(kind, "digest", "runs/x") for kind in ("2nd", "_", "Ä" * 50, "long_" * 20)]
    assert all(re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])", job) for job in jobs), jobs


def test_a_plan_knows_whether_it_still_holds(write):
    config = write(CHAIN)
    made = plan(config, settings=["gpt.batch_size=16"])
    made = Plan.from_json(json.loads(json.dumps(made.to_json())))
    trials.check_unchanged(made, made.stages.values())
    write(CHAIN.replace("--config.steps=30", "--config.steps=31"))
    with pytest.raises(UserError, match="tokenizer-codebook_size=64-.*: is not what .* says by now"):
        trials.check_unchanged(made, made.stages.values())
    write(CHAIN.replace('--out={out}.json"', '--out={out}.json", "--samples=1"'))
    unscored = [s for s in made.stages.values() if not s.name.startswith("scores")]
    trials.check_unchanged(made, unscored)
    with pytest.raises(UserError, match="scores-"):
        trials.check_unchanged(made, made.stages.values())


def test_without_a_chain_it_is_the_configs_trainer(write):
    text = "from configs.demo_transformer import get_config\nfrom configs import common\n"
    text += 'def sweep_rate(): yield {"optimizer.learning_rate": 1e-3}; yield {"optimizer.learning_rate": 3e-4}\n'
    text += (
        'def sweep_shape(): return common.zipped({"model.transformer.layers": (1, 2), "arg": ("condition=none", "")})\n'
    )
    config = write(text)
    made = plan(f"{config}:reference", sweeps=("rate", "shape"), settings=["vqgan=runs/v"])
    assert len(made.trials) == len(made.stages) == 4
    (stage,) = (made.stages[name] for name in made.trials[0].stages)
    assert made.trials[0].name == "learning_rate=0.001 layers=1 arg=condition=none"
    assert stage.words[:2] == ("train_transformer.py", f"--config={config}:reference,condition=none")
    assert {"--config.vqgan=runs/v", "--config.optimizer.learning_rate=0.001"} <= set(stage.words)
    assert stage.words[2] == f"--workdir={stage.out}"


def test_names_tell_keys_apart_that_end_alike(write):
    text = CHAIN + 'def sweep_size():\n    return common.zipped({"tokenizer.seed": (0, 1), "gpt.seed": (0, 1)})\n'
    text += 'def sweep_seeds():\n    return common.product({"tokenizer.seed": (0, 1), "gpt.seed": (0, 1)})\n'
    config = write(text)
    assert [trial.name for trial in plan(config, sweeps=("size",)).trials] == ["seed=0", "seed=1"]
    assert plan(config, sweeps=("seeds",)).trials[1].name == "tokenizer.seed=0 gpt.seed=1"


def test_tuples_and_texts_reach_the_command_line(write):
    text = "from configs.demo_vqgan import get_config\n"
    text += 'def sweep(): yield {"model.autoencoder.multipliers": (1, 2), "steps": "10%", "data.flip": False}\n'
    made = plan(write(text), settings=["model.autoencoder.attention_resolutions=(8,)", "hand_to_clu=true"])
    (stage,) = made.stages.values()
    assert {"--config.model.autoencoder.multipliers=(1, 2)", "--config.steps=10%", "--config.data.flip=False"} <= set(
        stage.words
    )
    assert "--config.hand_to_clu=true" in stage.words
    assert "multipliers=1x2" in stage.name and "," not in stage.name and "%" not in stage.name
    with pytest.raises(UserError, match="train.hand_to_clu: takes a value of type bool, got 'perhaps'"):
        plan(write(text), settings=["hand_to_clu=perhaps"])


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ('yield {"gpt.model.transformer.layer": 1}', "unknown key 'layer', did you mean 'layers'"),
        ('yield {"gpt.modle.transformer.layers": 1}', "unknown key 'modle', did you mean 'model'"),
        ('yield {"gpt.steps.x": 1}', "unknown key 'x'"),
        ('yield {"gpt.model.transformer.layers": 1.5}', "takes a value of type int, got 1.5"),
        ('yield {"gpt.model.transformer": 1}', "is a section"),
        ('yield {"gtp.steps": "1"}', "begins with none of the stages, did you mean 'gpt'"),
        ("yield 3", "yields dicts"),
        ("return ()", "yields no trials"),
        ('yield {"tokenizer.arg": "quantizer=x"}', "quantizer"),
    ],
)
def test_mistakes_are_named_before_anything_starts(write, sweep, said):
    with pytest.raises(UserError, match=said):
        plan(write(CHAIN + f"def sweep_wrong():\n    {sweep}\n"), sweeps=("wrong",))


def test_mistakes_of_names(write):
    config = write(CHAIN)
    for changes, said in (
        (dict(sweeps=("size",)), "no sweep_size"),
        (dict(settings=["steps"]), "--set=steps: write KEY=VALUE"),
        (dict(sweeps=("", "")), "two of the sweeps set 'gpt.model.transformer.layers'"),
    ):
        with pytest.raises(UserError, match=said):
            plan(config, **changes)
    with pytest.raises(UserError, match="no such file"):
        plan("configs/none.py")
    with pytest.raises(UserError, match=r"has no sweep\(\)"):
        plan("configs/demo_vqgan.py")
    broken = CHAIN.replace("{tokenizer}", "{tokeniser}")
    with pytest.raises(UserError, match="{tokeniser} is no earlier stage, did you mean 'tokenizer'"):
        plan(write(broken))


def test_flags_of_what_has_no_config_are_checked(write):
    """Once for each stage, before anything is planned to its end."""
    seen = []
    plan(write(CHAIN), check=seen.append)
    assert len(seen) == 4 and all(words[0] == "evaluate.py" for words in seen)

    def refuse(words):
        raise UserError("Unknown command line flag 'sampels'")

    with pytest.raises(UserError, match="sampels"):
        plan(write(CHAIN), check=refuse)


def test_the_demos_sweep_is_whole():
    made = plan("configs/demo_sweep.py")
    assert len(made.trials) == 4 and len(made.stages) == 12
    for stage in made.stages.values():
        script = stage.words[0]
        assert script == "-m" or (trials.ROOT / script).is_file()
