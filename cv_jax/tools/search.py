"""Searches a space of settings with Optuna: each trial is one program of several seeds.

    python -m cv_jax.tools.search --config=configs/digits.py --dir=runs/search --trials=20 \\
        --seeds=4 --space "optim.lr=log(0.003, 0.1)" "label_smoothing=uniform(0, 0.3)"

A key of the config gets uniform(LOW, HIGH), log(LOW, HIGH), whole(LOW, HIGH) or choice(A, B, ...).
A trial is train.py, in a work directory of its own under --dir; it is judged by the mean accuracy
on val, and stopped early where it is worse there than the median of the others at the same step.
The study lies in --dir/study.db: the same command goes on with it, and with the trial that was
under way. Arguments after -- go to train.py as they are. Needs requirements-search.txt.
"""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_jax.config.calls import build_one
from cv_jax.config.errors import UserError
from cv_jax.config.paths import path_argument
from cv_jax.tools.command import command, make_parser
from cv_jax.workdir.result import percent

if TYPE_CHECKING:
    import optuna

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
SECONDS_BETWEEN_LOOKS = 0.2

Suggest = Callable[["optuna.Trial", str], Any]

SPACES: dict[str, Callable[..., Suggest]] = {
    "uniform": lambda low, high: lambda trial, key: trial.suggest_float(key, low, high),
    "log": lambda low, high: lambda trial, key: trial.suggest_float(key, low, high, log=True),
    "whole": lambda low, high: lambda trial, key: trial.suggest_int(key, low, high),
    "choice": lambda *values: lambda trial, key: trial.suggest_categorical(key, values),
}


def read_space(texts: Sequence[str]) -> dict[str, Suggest]:
    """Reads "KEY=log(0.1, 1)" and the like. Raises UserError for what is none."""
    space = {}
    for text in texts:
        key, equals, spec = text.partition("=")
        if not equals:
            raise UserError(f"--space {text!r}: write KEY=uniform(LOW, HIGH) or the like.")
        space[key] = build_one(spec, SPACES, f"--space {key}")
    return space


def run_trial(trial: "optuna.Trial", command: list[str], workdir: Path) -> float:
    """Runs train.py to its end. Returns the mean accuracy on val.

    Raises:
        optuna.TrialPruned: it was stopped early, or a seed has diverged: then its user attribute
            "diverged" is True.
        UserError: train.py failed; what it said goes with it.
    """
    import optuna

    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "console.txt").open("a") as console:
        process = subprocess.Popen(
            command,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
        try:
            reported = 0
            while process.poll() is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                new = [(step, v) for step, v in _val_accuracies(workdir) if step > reported]
                for step, accuracy in new:
                    trial.report(accuracy, step)
                    reported = step
                if new and trial.should_prune():
                    raise optuna.TrialPruned()
        finally:
            if process.poll() is None:
                process.terminate()  # it saves
                process.wait()
    if process.returncode:
        last = (workdir / "console.txt").read_text("utf-8", "replace").strip().rpartition("\n")[2]
        raise UserError(f"trial {trial.number} ended with exit code {process.returncode}: {last}")
    val = json.loads((workdir / "result.json").read_text())["val"]
    if not val:
        raise UserError("a search chooses on val: hold images out with --config.data.num_val.")
    accuracy = val["accuracy"]
    trial.set_user_attr("std", accuracy["std"])
    if accuracy["mean"] is None:
        trial.set_user_attr("diverged", True)
        raise optuna.TrialPruned()
    return accuracy["mean"]


def _val_accuracies(workdir: Path) -> list[tuple[int, float]]:
    """Returns (step, mean accuracy on val) of each evaluation up to now.

    A seed that has diverged counts as 0.
    """
    path = workdir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that is being written
        if record["split"] == "val":
            mean = record["values"].get("accuracy", 0.0)  # over the seeds that have one
            of_runs = record.get("runs", {}).get("accuracy", [mean])
            found.append((record["step"], mean * (1 - of_runs.count(None) / len(of_runs))))
    return found


def search(
    config: str,
    directory: Path,
    space: dict[str, Suggest],
    num_trials: int,
    num_seeds: int,
    extra: Sequence[str] = (),
) -> "optuna.Study":
    """Makes trials until the study has `num_trials` that are complete or pruned."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="search",
        storage=f"sqlite:///{directory / 'study.db'}",
        direction="maximize",
        load_if_exists=True,
    )
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))

    def again(trial):
        study.enqueue_trial(trial.params, user_attrs={"workdir": trial.user_attrs["workdir"]})

    for killed in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(killed.number, state=TrialState.FAIL)
        again(killed)

    def objective(trial):
        values = {key: suggest(trial, key) for key, suggest in space.items()}
        if "workdir" not in trial.user_attrs:
            trial.set_user_attr("workdir", f"trial-{trial.number:04d}")
        workdir = directory / trial.user_attrs["workdir"]
        command = [
            sys.executable,
            str(TRAIN),
            f"--config={config}",
            f"--workdir={workdir}",
            f"--config.num_seeds={num_seeds}",
            *(f"--config.{key}={value}" for key, value in values.items()),
            *extra,
        ]
        try:
            return run_trial(trial, command, workdir)
        except KeyboardInterrupt:
            again(trial)
            raise

    done = (TrialState.COMPLETE, TrialState.PRUNED)
    while (made := len(study.get_trials(deepcopy=False, states=done))) < num_trials:
        study.optimize(objective, n_trials=1)
        trial = study.get_trials(deepcopy=False)[-1]
        values = ", ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
        print(f"{made + 1}/{num_trials} {values}: {_judgement(trial)}", flush=True)
    return study


def _judgement(trial: "optuna.trial.FrozenTrial") -> str:
    if trial.user_attrs.get("diverged"):
        return "diverged"
    if trial.value is None or trial.state.name == "PRUNED":
        return "stopped early"
    return f"val {percent(trial.value, trial.user_attrs.get('std'))}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


@command("search", results=False)
def main() -> None:
    """Reads the command line and searches."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", required=True, help="as for train.py")
    parser.add_argument(
        "--dir", required=True, type=path_argument, help="of the study and its trials"
    )
    parser.add_argument("--space", required=True, nargs="+", help="KEY=log(LOW, HIGH) and the like")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1, help="of each trial")
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    arguments, extra = parser.parse_args(argv[:at]), argv[at + 1 :]
    for signum in (signal.SIGINT, signal.SIGTERM):  # SIGINT: a shell's "&" has it ignored
        signal.signal(signum, signal.default_int_handler)
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("Optuna is missing: pip install -r requirements-search.txt") from error
    try:
        study = search(
            arguments.config,
            arguments.dir,
            read_space(arguments.space),
            arguments.trials,
            arguments.seeds,
            extra,
        )
    except KeyboardInterrupt:
        print("search: interrupted. The same command goes on.", file=sys.stderr)
        sys.exit(130)
    best = study.best_trial
    flags = " ".join(f"--config.{key}={value}" for key, value in best.params.items())
    workdir = arguments.dir / best.user_attrs["workdir"]
    print(f"best on val, {best.value:.4f}, in {workdir}:\n  {flags}")


if __name__ == "__main__":
    main()
