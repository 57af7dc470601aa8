"""config.init_from: what a network takes over from another run's, in numbers, and what it says."""

import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import Path
from flax.traverse_util import flatten_dict

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.learn import initial
from cv_jax.learn.initial import take_over
from cv_jax.models.ops import plain_lax
from cv_jax.optim.optimizers import ema_params
from cv_jax.optim.state import RUN_AXES
from cv_jax.tasks import build_task
from cv_jax.trained.load import load_trained
from cv_jax.workdir.adopt import adopt_workdir
from cv_jax.workdir.checkpoints import Checkpoints
from cv_jax.workdir.result import write_data
from tests.conftest import random_dataset

SPEC = random_dataset().spec
# Of n94(widths=(8, 8)): whiten 2, in each group 2 kernels, 2 biases and 4 statistics.
ARRAYS, VALUES = 2 + 2 * 8, (32 + 8) + 2 * (2 * 576 + 2 * 8 + 4 * 8)


def config_of(**leaves):
    config = base_config()
    config.batch_size = 10
    config.model = "n94(widths=(8, 8))"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in leaves.items()})
    return config.lock()


def ssl_config(**leaves):
    return config_of(**{"task": "ssl", "method": "simclr(projector=(16, 8))", **leaves})


def build(config):
    with plain_lax():
        return build_task(config, SPEC)


def leave_run(workdir, config):
    """A work directory as 7 steps of a run leave it, with random numbers; returns its state."""
    rng = np.random.default_rng(len(str(config)))

    def value(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.full(leaf.shape, 7, leaf.dtype)
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

    task = build(config)
    with plain_lax():
        state = jax.tree.map(value, jax.eval_shape(task.init, jax.random.key(0)))

    def add_axis(axis, tree):
        return tree if axis is None else jax.tree.map(lambda x: x[None], tree)

    adopt_workdir(workdir, config)
    write_data(workdir, random_dataset())
    with Checkpoints(workdir, keep=1) as checkpoints:
        of_all = jax.tree.map(add_axis, RUN_AXES, state, is_leaf=lambda axis: axis is None)
        checkpoints.save(of_all, {}, None)
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The work directory of a SimCLR run, not to be changed, and its state."""
    workdir = Path(tmp_path_factory.mktemp("initial") / "run")
    return workdir, leave_run(workdir, ssl_config())


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run[0], tmp_path / "run"))


def flat(state, subtree=""):
    """Parameters and statistics by path, those below a subtree without it."""
    arrays = flatten_dict({"params": state.params, **state.model_state}, sep="/")
    start = re.compile(f"(params|batch_stats)/{subtree and f'{subtree}/'}")
    return {start.sub(r"\1/", path): x for path, x in arrays.items() if start.match(path)}


def table(notes):
    """{row: (arrays, values, parameters)} of the table that the log shows."""
    _, *rows = notes[-1].splitlines()
    cells = [re.split(r"  +", row) for row in rows]
    return {what: (int(arrays), int(v.replace(",", "")), names) for what, arrays, v, names in cells}


def refused(config):
    """The one sentence, or two, that a config is refused with."""
    with pytest.raises(UserError) as error:
        build(config)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def starts(run):
    """A classifier's task on the backbone of `run`, and the states that it starts two seeds with.

    Last those that it would start with by itself.
    """
    config = config_of(init_from=f"{run[0]}:backbone", init_allow="head/.*")
    task, keys = build(config), jax.random.split(jax.random.key(3))
    alone = build(config_of())
    with plain_lax():
        both = jax.jit(lambda keys: [jax.vmap(t.init)(keys) for t in (task, alone)])(keys)
    return task, *([jax.tree.map(lambda x, i=i: x[i], s) for i in (0, 1)] for s in both)


def test_a_classifier_starts_with_the_backbone_and_a_head_of_its_own(run, starts):
    _, from_run, alone = starts
    backbone = flat(run[1], "backbone")
    assert len(backbone) == ARRAYS
    for start, own in zip(from_run, alone, strict=True):
        start = flat(start)
        head = start.pop("params/head/kernel")
        chex.assert_trees_all_equal(start, backbone)  # also the whitening, else of the images
        np.testing.assert_array_equal(head, own.params["head"]["kernel"])
    heads = [start.params["head"]["kernel"] for start in from_run]
    assert np.abs(heads[0] - heads[1]).min() > 0


def test_all_else_of_the_start_is_as_without(starts):
    _, (start, _), (own, _) = starts
    assert int(start.step) == 0
    chex.assert_trees_all_equal(start.opt_state, own.opt_state)


def test_the_log_says_what_was_taken(run, starts):
    notes = starts[0].notes
    assert notes[-2] == f"init    {run[0]}:backbone, seed=0 after step 7"
    rows = table(notes)
    assert {what: row[:2] for what, row in rows.items()} == {
        "loaded": (ARRAYS, VALUES),
        "missing": (1, 80),
    }
    assert rows["missing"][2] == "head/kernel"


def test_another_projector_is_loaded_skipped_and_drawn_as_the_table_says(run):
    config = ssl_config(
        method="simclr(projector=(8,))",
        init_from=str(run[0]),
        init_allow="projector/.*",
        init_anew="backbone/group2/.*",
    )
    task = build(config)
    assert {what: row[:2] for what, row in table(task.notes).items()} == {
        "loaded": (ARRAYS - 8, VALUES - 2 * 576 - 6 * 8),
        "initialised": (8, 2 * 576 + 6 * 8),
        "other shape": (1, 64),  # projector/dense1/kernel, from (8, 16)
        "missing": (1, 8),  # projector/dense1/bias
        "skipped": (6, 16 * 8 + 8 + 4 * 16),  # projector/dense2 and norm1
    }
    with plain_lax():
        start = jax.jit(task.init)(jax.random.key(0))
    there, here = flat(run[1]), flat(start)
    same = {path for path, x in here.items() if np.array_equal(x, there.get(path))}
    assert same == {path for path in here if re.search("/backbone/(whiten|group1)/", path)}


@pytest.mark.parametrize(
    ("leaves", "says"),
    [
        ({}, "1 parameter does not fit: head/kernel is missing in RUN. Choose a subtree"),
        ({"init_allow": "head"}, "head/kernel is missing in RUN"),  # the whole name has to match
        ({"init_allow": "head/.*", "model": "n94(widths=(8, 16))"}, "8 parameters do not fit"),
        ({"init_allow": "("}, r"config.init_allow='(' is not a regular expression"),
        ({"init_anew": "a{99999999999}"}, "config.init_anew='a{99999999999}' is not a regular"),
    ],
)
def test_what_does_not_fit_is_refused(run, leaves, says):
    assert says in refused(config_of(init_from=f"{run[0]}:backbone", **leaves))


def test_another_width_says_both_shapes_and_starts_fresh_where_that_is_allowed(run):
    wide = {"init_from": f"{run[0]}:backbone", "model": "n94(widths=(8, 16))"}
    assert "; .... Choose" in refused(config_of(**wide, init_allow="head/.*"))  # after five
    message = refused(config_of(**wide, init_allow="head/.*|.*/norm./.*"))
    assert "2 parameters do not fit: " in message
    assert "group2/conv1/kernel is (3, 3, 8, 8) in RUN and (3, 3, 8, 16) here; " in message
    rows = table(build(config_of(**wide, init_allow=".*")).notes)
    assert rows["loaded"][:2] == (ARRAYS - 8, VALUES - 2 * 576 - 6 * 8)
    assert rows["other shape"][0] == 8
    assert rows["missing"] == (1, 160, "head/kernel")


def test_an_unknown_run_or_part_is_named(run, tmp_path):
    message = refused(config_of(init_from=f"{run[0]}:backbon"))
    assert "has no part 'backbon'. Did you mean 'backbone'? There are: backbone, projector." in (
        message
    )
    message = refused(config_of(init_from=f"{tmp_path}/none:backbone"))
    assert f"config.init_from='{tmp_path}/none:backbone': " in message
    assert f"{tmp_path}/none/config.json is not there: choose the work directory" in (message)


def test_a_teacher_is_no_part_to_start_from(tmp_path):
    config = ssl_config(method="byol(projector=(8,), predictor=(4,))")
    state = leave_run(tmp_path / "run", config)
    message = refused(config_of(init_from=f"{tmp_path}/run:params"))
    assert "There are: backbone, predictor, projector." in message
    shapes = {"params": state.params["backbone"], "batch_stats": {}}
    taken, _ = take_over(f"{tmp_path}/run:backbone", shapes, lambda _: True, lambda _: False)
    assert len(taken) == 10
    np.testing.assert_array_equal(
        taken["params/whiten/kernel"], state.params["backbone"]["whiten"]["kernel"]
    )


@pytest.mark.parametrize(
    ("init_from", "parts"),
    [
        ("runs/a", ("runs/a", "")),
        ("runs/a:backbone/group1/", ("runs/a", "backbone/group1")),
        ("gs://bucket/a", ("gs://bucket/a", "")),
        ("gs://bucket/a:backbone", ("gs://bucket/a", "backbone")),
    ],
)
def test_a_bucket_has_a_colon_of_its_own(init_from, parts):
    assert initial._split(init_from) == parts


def test_as_many_values_in_another_shape_are_reshaped_where_that_is_allowed(monkeypatch):
    kernel = np.arange(24.0).reshape(1, 1, 4, 6)
    there = {"params/head/kernel": kernel, "batch_stats/norm/mean": np.ones(3), "cache/x": kernel}
    monkeypatch.setattr(initial, "_read", lambda init_from: ("seed=0 after step 7", there))
    shapes = {
        "params": {"head": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32)}},
        "batch_stats": {"norm": {"mean": jax.ShapeDtypeStruct((3,), jnp.float32)}},
    }
    with pytest.raises(UserError, match=r"head/kernel is \(1, 1, 4, 6\) in RUN and \(4, 6\) here"):
        take_over("run", shapes, lambda name: False, lambda name: False)
    taken, notes = take_over("run", shapes, lambda name: name == "head/kernel", lambda name: False)
    assert taken.keys() == {"params/head/kernel", "batch_stats/norm/mean"}
    np.testing.assert_array_equal(taken["params/head/kernel"], np.arange(24.0).reshape(4, 6))
    assert table(notes) == {"reshaped": (1, 24, "head/kernel"), "loaded": (1, 3, "norm/mean")}


def test_a_network_without_a_backbone_becomes_that_of_a_detector(monkeypatch):
    kernel = np.arange(9.0).reshape(3, 3)
    there = {"params/group1/kernel": kernel, "params/head/kernel": np.ones(5)}
    monkeypatch.setattr(initial, "_read", lambda init_from: ("seed=0 after step 7", there))
    shape = {"kernel": jax.ShapeDtypeStruct((3, 3), jnp.float32)}
    shapes = {"params": {"backbone": {"group1": shape}, "merge1": shape}}
    never = dict.fromkeys(("allow", "anew"), lambda name: False)
    taken, notes = take_over("run", shapes, **never)
    assert taken.keys() == {"params/backbone/group1/kernel"}
    np.testing.assert_array_equal(taken["params/backbone/group1/kernel"], kernel)
    assert table(notes) == {
        "loaded": (1, 9, "backbone/group1/kernel"),
        "missing": (1, 9, "merge1/kernel"),
        "skipped": (1, 5, "backbone/head/kernel"),
    }
    shapes["params"]["backbone"]["group2"] = shape
    with pytest.raises(UserError, match="1 parameter does not fit: backbone/group2/kernel is miss"):
        take_over("run", shapes, **never)


def test_averaged_parameters_are_taken_where_there_are_such(tmp_path):
    state = leave_run(tmp_path / "run", ssl_config(optim__ema=0.9))
    shapes = {"params": state.params, "batch_stats": state.model_state["batch_stats"]}
    taken, _ = take_over(f"{tmp_path}/run", shapes, lambda name: False, lambda name: False)
    averaged = state.replace(params=ema_params(state.opt_state))
    chex.assert_trees_all_equal(taken, flat(averaged))
    assert np.any(
        taken["params/backbone/whiten/kernel"] != flat(state)["params/backbone/whiten/kernel"]
    )


def test_a_run_stays_readable_when_the_one_it_started_from_is_gone(copy, tmp_path):
    second = tmp_path / "second"
    leaves = {"init_from": f"{copy}:backbone", "init_allow": "head/.*"}
    state = leave_run(second, config_of(**leaves))
    shutil.rmtree(copy)
    initial._read.cache_clear()
    trained = load_trained(Path(second))
    chex.assert_trees_all_equal(trained.state.params, state.params)
    assert trained.config.init_from == ""
    third = build(config_of(init_from=str(second)))
    assert table(third.notes)["loaded"][:2] == (ARRAYS + 1, VALUES + 80)
