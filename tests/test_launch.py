"""The recipes in launch/: they are what their platforms read, and run the one training command.

No platform is at hand. Programs of theirs, and what installs, are stubs; the schemas hold the keys
that the recipes use, as JobSet v1alpha2, Kubernetes' Job and SkyPilot 0.14 describe them.
"""

import json
import math
import os
import re
import signal
import stat
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
RECIPES = sorted(path.name for path in LAUNCH.iterdir() if path.name != "README.md")


def _strict(required: dict, optional: dict | None = None) -> dict:
    """The JSON schema of an object with these keys and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def _list(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


_ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
_REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]
_CODES = {
    "containerName": TEXT,
    "operator": {"enum": ["In", "NotIn"]},
    "values": _list({"type": "integer", "minimum": 1, "maximum": 255}),
}
_CONTAINER = {
    "name": TEXT,
    "image": TEXT,
    "env": _list(_strict({"name": TEXT, "value": TEXT})),
    "command": _list(TEXT),
    "args": _list(TEXT),
    "resources": _strict(
        {kind: _strict({"google.com/tpu": COUNT}) for kind in ("requests", "limits")}
    ),
}
_POD = {
    "restartPolicy": {"const": "Never"},  # podFailurePolicy allows no other
    "terminationGracePeriodSeconds": {"type": "integer", "minimum": 60},
    "serviceAccountName": TEXT,
    "nodeSelector": TEXTS,
    "containers": _list(_strict(_CONTAINER)),
}
_JOB = {
    "completions": COUNT,
    "parallelism": COUNT,
    "backoffLimit": COUNT,
    "podFailurePolicy": _strict(
        {
            "rules": _list(
                _strict(
                    {"action": {"enum": ["FailJob", "Ignore", "Count", "FailIndex"]}},
                    {
                        "onExitCodes": _strict(_CODES),
                        "onPodConditions": _list(_strict({"type": TEXT, "status": TEXT})),
                    },
                )
            )
        }
    ),
    "template": _strict({"spec": _strict(_POD)}),
}
_RULE = {
    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    "action": {"enum": _ACTIONS},
    "onJobFailureReasons": _list({"enum": _REASONS}),
}
JOBSET = _strict(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": _strict({"name": TEXT}, {"annotations": TEXTS}),
        "spec": _strict(
            {
                "failurePolicy": _strict({"maxRestarts": COUNT, "rules": _list(_strict(_RULE))}),
                "replicatedJobs": _list(
                    _strict(
                        {
                            "name": TEXT,
                            "replicas": COUNT,
                            "template": _strict({"spec": _strict(_JOB)}),
                        }
                    )
                ),
            }
        ),
    }
)
SKYPILOT = _strict(
    {
        "name": TEXT,
        "workdir": TEXT,
        "resources": _strict(
            {
                "infra": TEXT,
                "accelerators": {"type": "string", "pattern": r"^tpu-v5litepod-\d+$"},
                "accelerator_args": _strict({"runtime_version": TEXT}),
                "use_spot": {"type": "boolean"},
                "job_recovery": _strict(
                    {
                        "max_restarts_on_errors": COUNT,
                        "recover_on_exit_codes": _list(COUNT | {"maximum": 255}),
                    }
                ),
            }
        ),
        # null: has to be given with --env
        "envs": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "setup": TEXT,
        "run": TEXT,
    }
)


def _yaml(name: str) -> dict:
    return yaml.safe_load((LAUNCH / name).read_text())


@pytest.mark.parametrize(("name", "schema"), [("jobset.yaml", JOBSET), ("skypilot.yaml", SKYPILOT)])
def test_a_yaml_file_has_the_keys_that_its_platform_reads(name, schema):
    jsonschema.validate(_yaml(name), schema)


def test_the_pods_of_the_jobset_fill_its_slice():
    spec = _yaml("jobset.yaml")["spec"]
    (job,) = (one["template"]["spec"] for one in spec["replicatedJobs"])
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert chips == container["resources"]["requests"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    hosts = math.prod(map(int, topology.split("x"))) // chips
    assert hosts == job["completions"] == job["parallelism"]
    assert f"--tpu-topology={topology} --num-nodes={hosts}" in (LAUNCH / "jobset.yaml").read_text()


def test_what_sigterm_ends_starts_again():
    job = _yaml("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    rule = job["podFailurePolicy"]["rules"][0]
    container = job["template"]["spec"]["containers"][0]["name"]
    assert rule["onExitCodes"] == {"containerName": container, "operator": "In", "values": [143]}
    task = _yaml("skypilot.yaml")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    # The shell is replaced: the process that gets the signal is the one that trains.
    commands = (_script("jobset.yaml")[-1], task["run"])
    assert all(text.splitlines()[-1].startswith("exec ") for text in commands)


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch"])
def test_a_script_is_one_for_bash(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    without = {"PATH": os.environ["PATH"], "CONFIG": "configs/digits.py"}
    done = subprocess.run(["bash", LAUNCH / name], env=without, capture_output=True, text=True)
    assert done.returncode != 0
    assert "WORKDIR" in done.stderr


def test_a_placeholder_in_the_jobset_is_named(platform):
    assert platform.run(*_script("jobset.yaml"), REPO="https://github.com/YOU/cv_jax") == 2
    assert "change REPO and WORKDIR" in platform.errors
    assert platform.lines("trained") == []


def test_skypilot_asks_for_the_work_directory():
    assert _yaml("skypilot.yaml")["envs"] == {"CONFIG": "configs/cifar10.py", "WORKDIR": None}


def test_the_readme_has_a_row_for_each_recipe():
    rows = re.findall(r"^\| .*\[`([\w.]+)`\]\(([\w.]+)\)", (LAUNCH / "README.md").read_text(), re.M)
    assert sorted(name for name, _ in rows) == RECIPES
    assert all(name == target for name, target in rows)


# What the stubs do. "$HERE" holds: calls of train.py, a line each; calls of gcloud and scontrol;
# `state` of the slice; `preempted`, if the next training is.
STUBS = {
    "python": """[ "$1" != -m ] || exit 0
        echo "$*" >> "$HERE/trained"
        if [ -e "$HERE/preempted" ]; then
            rm "$HERE/preempted"; echo SUSPENDED > "$HERE/state"; exit 1
        fi
        exit "${CODE:-0}" """,
    "git": """[ "$2" != gone ] || exit 128
        [ "$1" != clone ] || { mkdir -p cv_jax; cp -r "$HERE/.venv" cv_jax; }""",
    "pip": "",
    "gcloud": """echo "$*" >> "$HERE/gcloud"
        case "$*" in
        *" create "*) echo ACTIVE > "$HERE/state" ;;
        *" delete "*) rm "$HERE/state" ;;
        *" describe "*) cat "$HERE/state" ;;
        *" ssh "*) for a; do case "$a" in --command=*) bash -c "${a#--command=}" ;; esac; done ;;
        esac""",
    "srun": 'while [[ "$1" == --* ]]; do shift; done; "$@"',
    "squeue": 'echo "${JOB_STATE:-RUNNING}"',
    "scontrol": 'echo "$*" >> "$HERE/scontrol"',
}
CONFIG = "configs/digits.py:smoke"


class _Platform:
    """A directory with the stubs on PATH, where recipes run."""

    def __init__(self, here: Path):
        self.here = here
        for name, body in STUBS.items():
            self._write(here / "bin" / name, body)
        self._write(here / ".venv/bin/python", STUBS["python"])
        (here / "bin/python3").symlink_to("python")

    def _write(self, path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, *command: object, **environment: str) -> int:
        own = {"CONFIG": CONFIG, "WORKDIR": "gs://b/it", "REPO": "repo", "POLL": "0"}
        own |= {"REVISION": "main", "SLURM_JOB_ID": "7"}
        path = f"{self.here / 'bin'}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "HERE": str(self.here), **own, **environment}
        pipes = {"capture_output": True, "text": True}
        done = subprocess.run(command, cwd=self.here, env=env, timeout=60, **pipes)
        self.errors = done.stderr
        return done.returncode

    def lines(self, name: str) -> list[str]:
        file = self.here / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def platform(tmp_path):
    return _Platform(tmp_path)


def _script(name: str) -> tuple:
    """What the platform runs."""
    if name == "jobset.yaml":
        job = _yaml(name)["spec"]["replicatedJobs"][0]["template"]["spec"]
        container = job["template"]["spec"]["containers"][0]
        return (*container["command"], *container["args"])
    if name == "skypilot.yaml":
        task = _yaml(name)
        return ("bash", "-c", f"({task['setup']})\n{task['run']}")
    return ("bash", LAUNCH / name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_the_training_command(name, platform):
    assert platform.run(*_script(name)) == 0
    assert platform.lines("trained") == [f"train.py --config={CONFIG} --workdir=gs://b/it"]


@pytest.mark.parametrize("name", ["jobset.yaml", "skypilot.yaml", "slurm.sbatch"])
def test_a_recipe_hands_on_the_exit_code(name, platform):
    assert platform.run(*_script(name), CODE="2") == 2


@pytest.mark.slow
def test_the_command_of_the_recipes_trains(train_py, platform, tmp_path):
    platform.run(*_script("skypilot.yaml"), WORKDIR=str(tmp_path / "run"))
    (command,) = platform.lines("trained")
    done = train_py(*command.split()[1:])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        ("0", "RUNNING", []),
        ("2", "RUNNING", []),
        ("143", "RUNNING", ["requeue 7"]),
        ("143", "COMPLETING", []),  # the user has cancelled it
    ],
)
def test_slurm_requeues_what_has_saved(code, state, requeued, platform):
    assert platform.run(*_script("slurm.sbatch"), CODE=code, JOB_STATE=state) == int(code)
    assert platform.lines("scontrol") == requeued


def _requests(platform):
    calls = (line.split() for line in platform.lines("gcloud") if "queued-resources" in line)
    return [call[3] for call in calls if call[3] != "describe"]


def test_a_preempted_slice_is_made_again_and_training_goes_on(platform):
    (platform.here / "preempted").touch()
    assert platform.run(*_script("tpu_vm.sh")) == 0
    assert _requests(platform) == ["create", "delete", "create", "delete"]
    assert len(set(platform.lines("trained"))) == 1
    assert len(platform.lines("trained")) == 2


def test_an_error_on_a_slice_that_is_there_is_not_repeated(platform):
    assert platform.run(*_script("tpu_vm.sh"), CODE="2") == 1
    assert len(platform.lines("trained")) == 1
    assert _requests(platform) == ["create"]  # left for the user to look at
    assert DELETE in platform.errors


DELETE = "gcloud compute tpus queued-resources delete cv-jax --zone=us-west4-a --force"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"REPO": ""}, "REPO: set the repository that the workers clone"),
        ({"REPO": "gone"}, "REPO=gone cannot be cloned"),
        ({"CONFIG": ""}, "CONFIG: set a config file"),
        ({"WORKDIR": "runs/it"}, "WORKDIR=runs/it must be gs://BUCKET/PATH"),
    ],
)
def test_no_slice_is_requested_for_a_wrong_setting(wrong, message, platform):
    assert platform.run(*_script("tpu_vm.sh"), **wrong) != 0
    assert message in platform.errors
    assert platform.lines("gcloud") == []
    assert DELETE not in platform.errors  # nothing is there


@pytest.fixture
def heeds_signals():
    """Undoes nohup and "&", below which no script sees SIGHUP and SIGINT."""
    names = (signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(name, signal.SIG_DFL) for name in names]
    yield
    for name, handler in zip(names, before, strict=True):
        signal.signal(name, handler)


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_a_stopped_script_says_how_to_delete_the_slice(name, code, platform, heeds_signals):
    # The signal comes from what the slice runs, and reaches the script alone.
    platform._write(platform.here / ".venv/bin/python", f'kill -{name} "$(cat "$HERE/pid")"')
    script = f'echo $$ > "$HERE/pid"; exec bash {LAUNCH / "tpu_vm.sh"}'
    assert platform.run("bash", "-c", script) == code
    assert _requests(platform) == ["create"]
    assert DELETE in platform.errors


def test_a_finished_training_leaves_nothing_to_delete(platform):
    assert platform.run(*_script("tpu_vm.sh")) == 0
    assert _requests(platform) == ["create", "delete"]
    assert platform.errors == ""
