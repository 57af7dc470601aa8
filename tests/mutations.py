"""Mutated configs: each trains two steps, or is refused in one paragraph.

    python -m tests.mutations --examples=500 --seed=0

A mutation is some --config.KEY=TEXT beside a tiny run on digits. Drawn are values that are right,
that lie at a border or beyond it, of wrong types, garbage, and keys with a letter too many. It goes
through train.py's own functions in this process, with a work directory of its own. What would only
train for long is not drawn: the runs that are right make up to three steps of small networks.

Printed are the numbers of trained and refused mutations and each offender: a traceback, a message
of several paragraphs, a work directory left behind by what was refused before its run.
"""

import argparse
import contextlib
import inspect
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

from absl import flags
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import train
from cv_jax.augment import resizing
from cv_jax.augment.chain import AUGMENTATIONS
from cv_jax.config.base import base_config, flatten
from cv_jax.models import MODELS
from cv_jax.optim.optimizers import OPTIMIZERS
from cv_jax.optim.schedules import SCHEDULES
from cv_jax.optim.selection import SELECTIONS
from cv_jax.tasks import autoencoder, ssl
from cv_jax.train import command
from tests.conftest import ROOT

BASE = (
    "--config=configs/digits.py:smoke",
    "--config.model=n94(widths=(4,))",
    "--config.steps=2",
    "--config.epochs=0.2",
    "--config.log_every=1 step",
)
SECONDS = 60  # for an example

_NUMBERS = (
    "0",
    "1",
    "-1",
    "-0.0",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e30",
    "1e-30",
    "1e300",
    "5e-324",
)
_NUMBERS += (str(2**31), str(-(2**31)), str(10**30), "0x10", "1_0", "1.5", "007", "1e", "\uff11")
_GARBAGE = (
    *_NUMBERS,
    *("", " ", "two", "None", "True", "false", "()", "(1,)", "((1, 2),)", "[]", "{}", "{'a': 1}"),
    *("'", '"', "(((", "a(b(c))", "lambda: 0", "__import__('os')", "\0", "é", "\udc80", "a\nb"),
    *("(" * 300, "9" * 5000, "x" * 300, "--", "=", "=1", "|", "a||b", "a(1)(2)", "../..", "/"),
)
_DURATIONS = ("never", "", "1 step", "2 steps", "1 epoch", "0.5 epochs", "16 examples", "0 steps")
_DURATIONS += (
    "-1 steps",
    "1e999 steps",
    "1e99 steps",
    "1e-9 epochs",
    "2 hours",
    "epoch",
    "1 stepp",
)

# Calls, whose arguments are drawn from below; the last name of each has a letter wrong.
_FUNCTIONS = {
    "augment": AUGMENTATIONS,
    "model": {name: MODELS[name] for name in ("n94", "lenet")},  # others compile for long
    "select": SELECTIONS,
    "method": {**ssl.METHODS, **autoencoder.METHODS},
    "progressive_resizing": {"size": resizing.SIZES["size"]},
    "optim.name": OPTIMIZERS,
    "optim.schedule": SCHEDULES,
}
_ARGUMENTS = (
    "1",
    "2",
    "0.5",
    "4",
    "0.0",
    "True",
    "None",
    "'zero'",
    "'a'",
    "-1",
    "-0.5",
    "1.0",
    "0",
)
_ARGUMENTS += ("1e999", "1e30", "1e-30", "1e300", str(10**30), str(2**31), "1e9", "100", "{}", "1j")
_TUPLES = ("(4,)", "(4, 4)", "(0.5, 1.0)", "()", "(1, 2, 3)", "(0,)", "(-4,)", "[4]", "(1e9,)", "4")

_RIGHT = {
    "data.name": ("digits", "digit"),
    "data.dir": ("", "/nowhere"),
    "data.size": ("0", "1", "8", "-1"),
    "data.decode": ("auto", "once", "always", "never"),
    "data.crop": ("", "random_resized(0.5)", "random"),
    "data.eval_crop": ("1", "0.875", "0", "1.5"),
    "data.workers": ("0", "1", "-1"),
    "data.on_error": ("replace", "stop", "ignore"),
    "data.val_fraction": ("0", "0.1", "0.999", "1", "-0.1"),
    "data.num_val": ("0", "1", "32", "1436", "1437", "-3"),
    "data.limit": ("0", "1", "15", "16", "17", "128"),
    "data.labels_per_class": ("0", "1", "2", "1000", "-1"),
    "data.label_fraction": ("0", "0.5", "1", "1e-9", "1.5"),
    "data.label_seed": ("0", "1", "-1"),
    "data.keep_unlabelled": ("true", "false"),
    "data.sampling": ("uniform", "balanced", "balance"),
    "data.stream": ("true", "false"),
    "data.normalize": ("true", "false"),
    "data.normalize_by": ("train", "imagenet", "half", "imagenette"),
    "seeds.mode": ("auto", "in_turn", "batched", "at_once"),
    "task": ("classification", "ssl", "autoencoder", "clasification", "__init__", "os"),
    "init_from": ("", "/nowhere", "/nowhere:backbone", "configs", "a://b", ":", "gs:", "a.pth"),
    "init_allow": ("", ".*", "head/.*", "(", "a{99999999999}"),
    "init_anew": ("", ".*", "(?i)HEAD/.*", "["),
    "seed": ("0", "7", str(2**31 - 1), str(2**32)),
    "num_seeds": ("1", "2", "0", "10001"),
    "steps": ("1", "2", "3", "0"),
    "epochs": ("0.1", "0.3", "1e-9"),
    "batch_size": ("1", "2", "16", "17", "96", "128", "129", "100000"),
    "accumulate": ("1", "2", "3", "4", "16", "0"),
    "class_weights": ("", "balanced", "balance"),
    "eval_batch_size": ("1", "7", "64", "1000000"),
    "keep_checkpoints": ("1", "2", "1000000"),
    "label_smoothing": ("0.1", "0.999", "1"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "tta": ("none", "mirror", "mirror_translate", "miror"),
    "optim.lr": ("0.1", "1e-30", "1e30", "3.4e38"),
    "optim.lr_batch_size": ("0", "1", "256", str(2**31 - 1)),
    "optim.momentum": ("0", "0.9", "0.999", "1", "-0.1"),
    "optim.weight_decay": ("0", "0.1", "1e30", "-0.1"),
    "optim.clip_norm": ("0", "1", "1e-30", "-1"),
    "optim.skip_nonfinite": ("true", "false"),
    "optim.ema": ("0", "0.5", "0.999", "1e-30", "1"),
    "optim.ema_of": (".*", "head/.*", "nothing", "("),
    "optim.rules": (
        "(('.*', 'base'),)",
        "(('whiten/.*', 'frozen'), ('.*', 'base'))",
        "(('.*', 'frozen'),)",
        "(('(', 'base'),)",
        "(('a{99999999999}', 'base'),)",
        "(('nothing', 'base'), ('.*', 'base'))",
        "(('.*', 'bas'),)",
        "(('head/.*', 'base'),)",
        "('.*', 'base')",
        "((1, 2),)",
        "(('.*', 'base', 1),)",
        "{'.*': 'base'}",
    ),
    "sweep": (
        "(('optim.lr', (0.1, 0.2)),)",
        "(('optim.lr', (0.1, 1e999)),)",
        "(('optim.lr', (0.1, 10000000000000)),)",
        "(('optim.momentum', (0, 2)),)",
        "(('optim.momentum', (0, 99999999999999)),)",
        "(('optim.lr', (0.1, 'a')),)",
        "(('optim.lr', (0.1,)),)",
        "(('optim.lr', (None, None)),)",
        "(('optim.lr', ({1: 2, 'a': 3}, 0.1)),)",
        "(('optim.lr', 0.1),)",
        "(('optim.lrr', (0.1, 0.2)),)",
        "(('optim.lr', (0.1, 0.2)), ('optim.lr', (0.3, 0.4)))",
        "(('seed', (1, 2)),)",
        "(('augment', ('rotate(5)', 'rotate(10)')),)",
        "(('augment', ('rotate(5)', 'rotate(-1)')),)",
        "(('augment', ('crop(1)', 'crop(2)')),)",
        "(('model', ('n94(widths=(4,))', 'n94(widths=(8,))')),)",
        "('optim.lr', (0.1, 0.2))",
    ),
}
_RIGHT |= dict.fromkeys(("mesh.seed", "mesh.data", "mesh.fsdp"), ("0", "1", "2", "-1"))
_EVERY = ("log_every", "eval_every", "checkpoint_every", "histograms_every")
_RIGHT |= dict.fromkeys((*_EVERY, "patience", "optim.warmup"), _DURATIONS)
_KEYS = sorted(flatten(base_config()))

# Other arguments that may stand on the command line.
_OTHERS = (
    "--config.seed",
    "--config.",
    "--config",
    "seed=3",
    "--wordir=x",
    "--config.optim.groups=3",
)
_OTHERS += (
    "--config.optim.groups.a.lr=1",
    "--config.sweep.optim.lr=(0.1, 0.2)",
    "--config.optim=1",
)
_OTHERS += ("--config.sweep.optim.lr=0.1", "--config.sweep.optim.lr", "--config.sweep.=(1, 2)")
_OTHERS += ("--config.sweep.optim.lr='ab'", "--profile_steps=a", "--profile_steps=-1", "-c", "--")
_OTHERS += ("--config=configs/nothing.py", "--config=", "--config=configs", "--config=README.md")
_OTHERS += ("--config=configs/digits.py:x", "--noconfig.data.stream", "--workdir=/dev/null/x")


@st.composite
def _call(draw: st.DrawFn, functions: Mapping[str, Callable]) -> str:
    name = draw(st.sampled_from(sorted(functions)))
    arguments = []
    for parameter in inspect.signature(functions[name]).parameters.values():
        if parameter.default is parameter.empty and parameter.annotation in (int, float, str):
            chosen = draw(st.integers(0, 9)) > 0
        else:
            chosen = draw(st.integers(0, 2)) == 0
        if chosen:
            right = {int: ("1", "2", "4"), float: ("0.5", "0.1", "1.0")}.get(parameter.annotation)
            if right is None:
                right = _TUPLES if "tuple" in str(parameter.annotation) else _ARGUMENTS
            text = draw(st.sampled_from(right if draw(st.integers(0, 5)) else _ARGUMENTS))
            arguments.append(f"{parameter.name}={text}")
    if draw(st.integers(0, 19)) == 0:
        name += "s"
    return f"{name}({', '.join(arguments)})"


@st.composite
def _override(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(_KEYS))
    if not draw(st.integers(0, 5)):
        text = draw(st.one_of(st.sampled_from(_GARBAGE), st.text(max_size=8)))
    elif key in _FUNCTIONS:
        text = "|".join(draw(st.lists(_call(_FUNCTIONS[key]), min_size=1, max_size=2)))
    else:
        text = draw(st.sampled_from(_RIGHT[key]))
    if draw(st.integers(0, 19)) == 0:
        position = draw(st.integers(0, len(key)))
        key = key[:position] + draw(st.sampled_from("aes._")) + key[position:]
    return f"--config.{key}={text}"


@st.composite
def _without_labels(draw: st.DrawFn) -> list[str]:
    """A task without labels, a method that is its or nearly so, and what may stand beside it."""
    task, methods = draw(
        st.sampled_from((("ssl", ssl.METHODS), ("autoencoder", autoencoder.METHODS)))
    )
    method = draw(_call(methods))
    right = ["--config.label_smoothing=0", "--config.optim.rules=(('.*', 'base'),)"]
    more = draw(st.lists(_override(), max_size=1))
    return [*right, f"--config.task={task}", f"--config.method={method}", *more]


_overrides = st.lists(
    _override() | _override() | _override() | st.sampled_from(_OTHERS),
    min_size=1,
    max_size=3,
)


@st.composite
def _mutation(draw: st.DrawFn) -> list[str]:
    """One in four is of a task without labels."""
    return draw(_without_labels() if draw(st.integers(0, 3)) == 3 else _overrides)


mutations = _mutation()


def call_train(arguments: Sequence[str]) -> tuple[int, str]:
    """Runs train.py with these arguments in this process: its exit code and what it printed.

    Raises:
        Exception: whatever train.py would end in a traceback with.
    """
    values = flags.FLAGS
    for name in [name for name in values if name.startswith("config.")]:
        delattr(values, name)
    values.unparse_flags()
    for name in ("config", "workdir", "profile_steps"):
        values[name].unparse()
    if not values.is_parsed():
        values.mark_as_parsed()
    argv, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    output = io.StringIO()
    alone = mock.patch.object(command, "join")  # which comes before anything was computed
    try:
        with alone, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            train.main(command.parse_flags(["train.py", *arguments]))
        return 0, output.getvalue()
    except SystemExit as end:
        return end.code, output.getvalue()
    finally:
        sys.argv = argv
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def verdict(mutation: Sequence[str]) -> tuple[str, str]:
    """("trained" or "refused" or "stopped", message) of a mutation; "offender" with the reason.

    "stopped" is a run that began: its loss was not finite.
    """
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "run"
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            code, printed = call_train([*BASE, f"--workdir={workdir}", *mutation])
        except Exception:
            return "offender", traceback.format_exc()
        finally:
            signal.alarm(0)
        if code == 0:
            trained = (workdir / "result.json").exists()
            return ("trained", printed) if trained else ("offender", f"no result:\n{printed}")
        _, found, message = printed.rpartition("train.py: ")
        if code != 2 or not found or "\n" in message.strip() or "Traceback" in printed:
            return "offender", f"exit code {code}:\n{printed}"
        if "not finite" in message and (workdir / "metrics.jsonl").exists():
            return "stopped", message
        left = workdir.exists() and "--profile_steps" not in message
        return ("offender", f"left its work directory: {message}") if left else ("refused", message)


def _too_long(signum: int, frame: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def run(examples: int, chosen_seed: int, show: bool = False) -> tuple[Counter, list]:
    """Tries so many mutations: the verdicts' counts, and [(mutation, reason)] of offenders."""
    counts, offenders = Counter(), []

    @seed(chosen_seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations)
    def attempt(mutation):
        kind, message = verdict(mutation)
        counts[kind] += 1
        if kind == "offender":
            offenders.append((mutation, message))
        if show:
            line = message.strip().splitlines()[-1] if kind != "trained" else ""
            print(kind, mutation, line[:300], file=sys.stderr, flush=True)

    attempt()
    return counts, offenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print each mutation and its verdict")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")  # cannot be changed by the next example
    start = time.perf_counter()
    counts, offenders = run(arguments.examples, arguments.seed, arguments.show)
    for mutation, reason in offenders:
        print(f"\n{mutation}\n{reason}")
    print(f"{dict(counts)} in {time.perf_counter() - start:.0f} s")
    sys.exit(bool(offenders))


if __name__ == "__main__":
    main()
