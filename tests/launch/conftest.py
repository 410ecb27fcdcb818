"""Programs in front of the real ones on the PATH: they record how they are called and answer as they are told."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "scancel", "squeue", "docker")
PROGRAM = f"""#!{sys.executable}
import json, os, sys
name, folder = os.path.basename(sys.argv[0]), os.environ["FAKES"]
words = sys.argv[1:]
said = "" if sys.stdin.isatty() or name != "kubectl" or "apply" not in words else sys.stdin.read()
with open(folder + "/calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
if said:
    open(folder + "/applied.yaml", "w").write(said)
rules_file = folder + "/answers.json"
rules = json.load(open(rules_file))
for rule in rules:
    if all(part in " ".join([name, *words]) for part in rule["of"]):
        output, code = rule["answers"].pop(0) if len(rule["answers"]) > 1 else rule["answers"][0]
        json.dump(rules, open(rules_file, "w"))
        for line in output.splitlines(keepends=True):  # one after the other: a reader that leaves early is noticed
            print(line, end="", flush=True, file=sys.stderr if output.startswith("ERROR") else sys.stdout)
        sys.exit(code)
"""


class Fakes:
    """What was called, and what is answered: nothing and exit code 0 unless `answer` says otherwise. Answers that begin
    with ERROR go to stderr."""

    def __init__(self, folder: Path):
        self.folder, self._rules = folder, []
        (folder / "bin").mkdir()
        for name in PROGRAMS:
            program = folder / "bin" / name
            program.write_text(PROGRAM)
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self._write()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "FAKES": str(folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }

    def answer(self, *of: str, answers: list[tuple[str, int]]) -> None:
        """Calls whose words hold all of `of` get these (output, exit code) in turn, the last one for ever."""
        self._rules.append({"of": of, "answers": answers})
        self._write()

    def _write(self) -> None:
        (self.folder / "answers.json").write_text(json.dumps(self._rules))

    @property
    def calls(self) -> list[list[str]]:
        """Every call so far: the program and its words."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def applied(self) -> str:
        """What kubectl apply was last given."""
        return (self.folder / "applied.yaml").read_text()

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs a launcher with the fakes in front."""
        line = [sys.executable, ROOT / script] if script.endswith(".py") else [ROOT / script]
        environment = {**self.environment, **environment}
        return subprocess.run([*line, *words], env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)


@pytest.fixture
def fakes(tmp_path) -> Fakes:
    folder = tmp_path / "fakes"
    folder.mkdir()
    return Fakes(folder)
