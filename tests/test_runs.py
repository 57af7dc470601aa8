"""Several runs in one program: each is the run that it would be alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from cv_jax.config.base import base_config
from cv_jax.config.sweep import make_sweep, num_runs
from cv_jax.runtime.mesh import make_mesh
from cv_jax.train.runs import Own, Runs
from tests.test_resume import final_arrays


def _runs(count, mode):
    names = [f"seed={i}" for i in range(count)]
    return Runs(names, Own(None, {}), mode, make_mesh(count), make_sweep(base_config()))


@pytest.mark.parametrize("mode", ["in_turn", "batched"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_function_of_one_run_is_mapped(mode, count):
    def function(own, state, shared):
        added = shared * state["step"].astype(jnp.float32)
        total = {"step": state["step"] + 1, "x": state["x"] * own + added}
        return total, (state["x"].sum(),)

    axes = {"step": None, "x": 0}
    mapped = _runs(count, mode)(function, (0, axes, None), (axes, 0), replaces=1)
    x = np.arange(2.0 * count, dtype=np.float32).reshape(count, 2)
    state, (sums,) = jax.jit(mapped, donate_argnums=1)(
        jnp.arange(1.0, count + 1), {"step": jnp.int32(3), "x": jnp.array(x)}, jnp.float32(10)
    )
    # Each run sees the step as it was before any of them made it.
    assert state["step"] == 4
    np.testing.assert_array_equal(state["x"], x * np.arange(1, count + 1)[:, None] + 30)
    np.testing.assert_array_equal(sums, x.sum(1))


def test_runs_in_turn_take_the_memory_of_one_and_their_states():
    def function(own, x):
        return jnp.sort(own * jnp.outer(x, x), axis=1)[:, 7], x.sum()  # 4 MB between them

    temporary = {}
    for count in (2, 6):
        mapped = jax.jit(_runs(count, "in_turn")(function, (0, 0), (0, 0), 1), donate_argnums=1)
        own, x = jnp.arange(1.0, count + 1), jnp.ones((count, 1000))
        memory = mapped.lower(own, x).compile().memory_analysis()
        assert memory.alias_size_in_bytes == x.nbytes
        temporary[count] = memory.temp_size_in_bytes
    assert temporary[2] > 4e6
    assert temporary[6] < temporary[2] + x.nbytes


def _short(config, **changes):
    config = config.copy_and_resolve_references()
    config.epochs = 1.0
    config.update(changes)
    return config


def _run(config, workdir):
    result = train.run(config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return result, final_arrays(workdir), [json.loads(line) for line in lines]


@pytest.mark.slow
def test_seeds_in_turn_are_the_single_runs_to_the_bit_and_at_once_nearly(tiny_config, tmp_path):
    config = _short(tiny_config, num_seeds=2, seeds={"mode": "in_turn"})
    together, arrays, records = _run(config, tmp_path / "both")
    assert together["seeds"] == [0, 1]
    seed = 1
    config = _short(tiny_config, seed=seed, num_seeds=1)
    alone, own_arrays, own_records = _run(config, tmp_path / str(seed))
    for path, array in own_arrays.items():
        mine = arrays[path] if path.endswith("step']") else arrays[path][[seed]]
        np.testing.assert_array_equal(mine, array, err_msg=path)
    for split in ("val", "test"):
        for name in ("accuracy", "loss"):
            values = together[split][name]["values"]
            assert values[seed] == alone[split][name]["mean"]
    for record, own in zip(records, own_records, strict=True):
        assert record["runs"]["loss"][seed] == own["values"]["loss"]
    both = [together["test"]["loss"][key] for key in ("mean", "std")]
    assert both == [np.mean(values), np.std(values, ddof=1)]

    config = _short(tiny_config, num_seeds=2, seeds={"mode": "batched"})
    _, _, at_once = _run(config, tmp_path / "batched")
    np.testing.assert_allclose(at_once[0]["runs"]["loss"], records[0]["runs"]["loss"], rtol=1e-4)


@pytest.mark.slow
def test_a_sweep_is_a_run_for_each_setting(tiny_config, tmp_path):
    sweep = (("optim.lr", (0.01, 1e6)), ("augment", ("translate(1)|flip", "translate(2)|flip")))
    config = _short(tiny_config, num_seeds=2, sweep=sweep)
    assert num_runs(config) == 8
    result, _, records = _run(config, tmp_path / "sweep")
    assert [point["setting"] for point in result["sweep"]] == [
        {"optim.lr": lr, "augment": augment} for lr in sweep[0][1] for augment in sweep[1][1]
    ]
    accuracies = [point["val"]["accuracy"]["mean"] for point in result["sweep"]]
    assert np.isnan(accuracies).tolist() == [False, False, True, True]  # 1e6 has diverged
    assert result["best"] == result["sweep"][int(np.argmax(accuracies[:2]))]["setting"]
    assert result["val"]["accuracy"]["mean"] == max(accuracies[:2])
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")

    single = _short(tiny_config, num_seeds=1, seed=1, augment=sweep[1][1][1])
    _, _, alone = _run(single, tmp_path / "single")
    mine = [record["runs"]["loss"][3] for record in records]  # the second setting's second seed
    np.testing.assert_allclose(mine, [record["values"]["loss"] for record in alone], rtol=1e-3)
