"""Searches a space of settings with Optuna: each trial is one program of several seeds.

    python -m cv_jax.tools.search --config=configs/digits.py --dir=runs/search --trials=20 \\
        --seeds=4 --space "optim.lr=log(0.003, 0.1)" "label_smoothing=uniform(0, 0.3)"

--space gives a config key uniform(LOW, HIGH), log(LOW, HIGH), whole(LOW, HIGH) or choice(A, ...). A
trial is train.py in its own work directory under --dir, ranked by the mean headline on val over
the seeds. A trial that is worse than the median of the other trials at the same step is stopped
early. The study is kept in --dir/study.db. Repeat the command to resume the study and the
interrupted trial. Arguments after -- are passed to train.py. Needs requirements-search.txt.
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
from cv_jax.workdir.metric import Metric, headline_of, metric_of

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
    """Reads texts such as "KEY=log(0.1, 1)". Raises UserError for any other text."""
    space = {}
    for text in texts:
        key, equals, spec = text.partition("=")
        if not equals:
            raise UserError(f"--space {text!r}: write KEY=uniform(LOW, HIGH) or another range.")
        space[key] = build_one(spec, SPACES, f"--space {key}")
    return space


def run_trial(trial: "optuna.Trial", command: list[str], workdir: Path) -> float:
    """Runs train.py to its end; returns the rank of the mean headline on val, see `Metric.rank`.

    Raises:
        optuna.TrialPruned: the trial was stopped early, or a seed has diverged; then the user
            attribute "diverged" is True.
        UserError: train.py failed; the message has the last line of its output.
    """
    import optuna

    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "console.txt").open("a") as console:
        process = subprocess.Popen(
            command,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C then reaches train.py only through this program
        )
        try:
            reported = 0
            while process.poll() is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                new = [(step, rank) for step, rank in _val_ranks(workdir) if step > reported]
                for step, rank in new:
                    trial.report(rank, step)
                    reported = step
                if new and trial.should_prune():
                    raise optuna.TrialPruned()
        finally:
            if process.poll() is None:
                process.terminate()  # train.py saves a checkpoint
                process.wait()
    if process.returncode:
        last = (workdir / "console.txt").read_text("utf-8", "replace").strip().rpartition("\n")[2]
        raise UserError(f"trial {trial.number} ended with exit code {process.returncode}: {last}")
    result = json.loads((workdir / "result.json").read_text())
    headline, val = headline_of(result), result["val"]
    metric = metric_of(result, headline)
    if not val:
        raise UserError("a search chooses on val: hold examples out with --config.data.num_val.")
    if headline not in val:
        raise UserError(f"{workdir} has no {headline} on val, by which a search ranks trials.")
    numbers = val[headline]
    trial.set_user_attr("std", numbers["std"])
    trial.set_user_attr("headline", headline)
    trial.set_user_attr("metric", metric._asdict())
    if numbers["mean"] is None:
        trial.set_user_attr("diverged", True)
        raise optuna.TrialPruned()
    return metric.rank(numbers["mean"])


def _val_ranks(workdir: Path) -> list[tuple[int, float]]:
    """Returns (step, rank of the mean headline on val) of each evaluation up to now.

    A diverged seed counts as the worst share of a metric in "%", and makes the rank of any other
    metric -inf.
    """
    described = workdir / "task.json"
    described = json.loads(described.read_text()) if described.exists() else {}
    headline = headline_of(described)
    metric = metric_of(described, headline)
    path = workdir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that is still being written
        if record["split"] == "val":
            mean = record["values"].get(headline)  # over the seeds that did not diverge
            of_runs = record.get("runs", {}).get(headline, [mean])
            values = [_worst(metric) if value is None else value for value in of_runs]
            found.append((record["step"], metric.rank(sum(values) / len(values))))
    return found


def _worst(metric: Metric) -> float:
    if metric.unit == "%":
        return 0.0 if metric.better == "higher" else 1.0
    return math.nan


def search(
    config: str,
    directory: Path,
    space: dict[str, Suggest],
    num_trials: int,
    num_seeds: int,
    extra: Sequence[str] = (),
) -> "optuna.Study":
    """Runs trials until the study has `num_trials` complete or pruned ones.

    The study maximises the rank of the headline: the negative of a headline that is better lower.
    """
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
    metric = _metric_of_trial(trial)
    return f"val {metric.text(metric.rank(trial.value), trial.user_attrs.get('std'))}"


def _metric_of_trial(trial: "optuna.trial.FrozenTrial") -> Metric:
    """Returns the metric of the headline; its `rank` turns a trial's value into the headline."""
    known = trial.user_attrs.get("metric")  # older code did not store the metric
    return Metric(**known) if known else metric_of({}, headline_of({}))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


@command("search", results=False)
def main() -> None:
    """Reads the command line, runs the trials and prints the best trial."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", required=True, help="config file, as for train.py")
    parser.add_argument(
        "--dir", required=True, type=path_argument, help="directory of the study and its trials"
    )
    parser.add_argument("--space", required=True, nargs="+", help="such as KEY=log(LOW, HIGH)")
    parser.add_argument("--trials", type=int, default=20, help="number of trials")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of each trial")
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    arguments, extra = parser.parse_args(argv[:at]), argv[at + 1 :]
    for signum in (signal.SIGINT, signal.SIGTERM):  # SIGINT: a shell's "&" ignores it
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
        print("search: interrupted. Repeat the command to resume.", file=sys.stderr)
        sys.exit(130)
    best = study.best_trial
    flags = " ".join(f"--config.{key}={value}" for key, value in best.params.items())
    workdir = arguments.dir / best.user_attrs["workdir"]
    value = _metric_of_trial(best).rank(best.value)
    print(f"best on val, {value:.4f}, in {workdir}:\n  {flags}")


if __name__ == "__main__":
    main()
