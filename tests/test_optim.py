"""Optimizers against their published rules in float64 numpy; schedules, groups, clip, average."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from cv_jax.config import durations
from cv_jax.config.errors import UserError
from cv_jax.optim.optimizers import ema_params, evaluated_params, make_optimizer
from cv_jax.optim.schedules import make_schedule
from cv_jax.optim.state import init_state

TOTAL = 10
SHAPES = {
    "conv/kernel": (2, 2, 3, 4),
    "norm/bias": (4,),
    "head/kernel": (6, 3),
    "wide/kernel": (2, 5),
}
STEPS = partial(durations.steps, batch_size=64, num_train=640)


def nest(flat):
    tree = {}
    for name, value in flat.items():
        module, leaf = name.split("/")
        tree.setdefault(module, {})[leaf] = value
    return tree


def flatten(tree):
    return {f"{m}/{leaf}": np.asarray(v) for m, sub in tree.items() for leaf, v in sub.items()}


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, scale, shape) for name, shape in SHAPES.items()}


START = draw(0)
GRADS = [draw(seed) for seed in range(1, 6)]


def to_jax(flat):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), nest(flat))


def make_config(**changes):
    config = ml_collections.ConfigDict(
        {
            "name": "sgd",
            "lr": 0.1,
            "lr_batch_size": 0,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "schedule": "linear",
            "warmup": "never",
            "clip_norm": 0.0,
            "ema": 0.0,
            "ema_of": ".*",
            "rules": ((".*", "base"),),
            "groups": {},
        }
    )
    config.update(changes)
    return config.lock()


def make(batch_size=64, **changes):
    return make_optimizer(make_config(**changes), to_jax(START), TOTAL, batch_size, STEPS)


def train(optimizer, grads=GRADS):
    """Returns the parameters after every step, flat, and the last optimizer state."""
    params = to_jax(START)
    state = optimizer.tx.init(params)
    history = []
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def update(params, state, grad, step):
        updates, state = optimizer.tx.update(grad, state, params, step=step)
        return optax.apply_updates(params, updates), state

    for step, grad in enumerate(grads):
        params, state = update(params, state, to_jax(grad), jnp.int32(step))
        history.append(flatten(params))
    return history, state


def rate(t, peak=0.1):
    return peak * (1 - t / TOTAL)


def assert_same(actual, expected, rtol=2e-5, atol=1e-5):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol, atol, err_msg=name)


# The references: one parameter p, its gradients g[0], g[1], ... -> p after all of them.


def sgd_reference(p, grads, momentum=0.9, weight_decay=0.0, nesterov=False, peak=0.1):
    buffer = np.zeros_like(p)
    for t, g in enumerate(grads):
        g = g + weight_decay * p
        buffer = momentum * buffer + g
        p = p - rate(t, peak) * (g + momentum * buffer if nesterov else buffer)
    return p


def adam_direction(grads, b1, b2, eps):
    m, v = np.zeros_like(grads[0]), np.zeros_like(grads[0])
    for g in grads:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    t = len(grads)
    return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def adam_reference(p, grads, b1, b2, eps, weight_decay):
    seen = []
    for t, g in enumerate(grads):
        seen.append(g + weight_decay * p)
        p = p - rate(t) * adam_direction(seen, b1, b2, eps)
    return p


def adamw_reference(p, grads, b1, b2, eps, weight_decay):
    for t in range(len(grads)):
        direction = adam_direction(grads[: t + 1], b1, b2, eps)
        p = p - rate(t) * (direction + weight_decay * p)
    return p


def lamb_reference(p, grads, b1, b2, eps, weight_decay):
    for t in range(len(grads)):
        u = adam_direction(grads[: t + 1], b1, b2, eps) + weight_decay * p
        p = p - rate(t) * u * np.linalg.norm(p) / np.linalg.norm(u)
    return p


def muon_reference(p, grads, momentum, ns_steps, nesterov, normalize, weight_decay=0.0):
    """In PyTorch's order of axes: output channels first, the other axes flattened."""
    shape = np.moveaxis(p, -1, 0).shape
    p, *grads = (np.moveaxis(a, -1, 0).reshape(shape[0], -1) for a in (p, *grads))
    buffer = np.zeros_like(p)
    for t, g in enumerate(grads):
        buffer = momentum * buffer + g
        x = g + momentum * buffer if nesterov else buffer
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(ns_steps):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        if normalize:
            p = p * len(p) ** 0.5 / np.linalg.norm(p)
        p = p - rate(t) * (x + weight_decay * p)
    return np.moveaxis(p.reshape(shape), 0, -1)


def expected_after(reference, count=None, names=SHAPES):
    return {name: reference(START[name], [g[name] for g in GRADS[:count]]) for name in names}


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"name": "sgd", "weight_decay": 0.05}, partial(sgd_reference, weight_decay=0.05)),
        (
            {"name": "sgd(nesterov=True)", "momentum": 0.85, "weight_decay": 0.05},
            partial(sgd_reference, momentum=0.85, weight_decay=0.05, nesterov=True),
        ),
        (
            {"name": "adam(b2=0.98)", "weight_decay": 0.05, "momentum": 0.8},
            partial(adam_reference, b1=0.8, b2=0.98, eps=1e-8, weight_decay=0.05),
        ),
        (
            {"name": "adamw(eps=0.01)", "weight_decay": 0.05},
            partial(adamw_reference, b1=0.9, b2=0.999, eps=0.01, weight_decay=0.05),
        ),
        (
            {"name": "lamb", "weight_decay": 0.05},
            partial(lamb_reference, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.05),
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_optimizer_follows_its_published_rule(changes, reference):
    history, _ = train(make(**changes))
    for count in (1, 2, len(GRADS)):
        assert_same(history[count - 1], expected_after(reference, count))


MATRICES = [name for name in SHAPES if name != "norm/bias"]
MUON_RULES = (("norm/bias", "frozen"), (".*", "base"))


@pytest.mark.parametrize(
    ("name", "weight_decay", "reference"),
    [
        ("muon", 0.05, {"ns_steps": 5, "nesterov": True, "normalize": False}),
        ("muon(nesterov=False)", 0.0, {"ns_steps": 5, "nesterov": False, "normalize": False}),
        (
            "muon(ns_steps=3, normalize_weights=True)",
            0.05,
            {"ns_steps": 3, "nesterov": True, "normalize": True},
        ),
    ],
)
def test_muon_follows_its_published_rule(name, weight_decay, reference):
    optimizer = make(name=name, momentum=0.6, weight_decay=weight_decay, rules=MUON_RULES)
    history, _ = train(optimizer)
    reference = partial(muon_reference, momentum=0.6, weight_decay=weight_decay, **reference)
    for count in (1, 2, len(GRADS)):
        expected = expected_after(reference, count, MATRICES)
        assert_same({name: history[count - 1][name] for name in MATRICES}, expected, rtol=1e-4)


def test_muon_moves_every_singular_value_about_alike():
    optimizer = make(name="muon", lr=1.0, momentum=0.0, schedule="constant", rules=MUON_RULES)
    history, _ = train(optimizer, GRADS[:1])
    step = (START["conv/kernel"] - history[0]["conv/kernel"]).reshape(-1, 4)
    values = np.linalg.svd(step, compute_uv=False)
    assert np.all((values > 0.6) & (values < 1.3)), values


def test_muon_refuses_vectors():
    optimizer = make(name="muon")
    with pytest.raises(UserError, match="two or more axes, but norm/bias has 1: give it to a gr"):
        optimizer.tx.init(to_jax(START))


@pytest.mark.slow
def test_muon_leaves_a_zero_parameter_finite():
    optimizer = make(name="muon(normalize_weights=True)", rules=MUON_RULES)
    params = jax.tree.map(jnp.zeros_like, to_jax(START))
    state = optimizer.tx.init(params)
    updates, _ = optimizer.tx.update(to_jax(GRADS[0]), state, params, step=0)
    assert 0.1 < np.linalg.norm(updates["head"]["kernel"]) < 0.2  # 0.1 sqrt(3 values near 1)


def test_rate_grows_with_the_batch():
    assert make(batch_size=512, lr=0.1, lr_batch_size=256).lr(0)["lr"] == pytest.approx(0.2)
    assert make(batch_size=512, lr=0.1, lr_batch_size=0).lr(0)["lr"] == pytest.approx(0.1)
    history, _ = train(make(batch_size=512, lr=0.1, lr_batch_size=256))
    assert_same(history[-1], expected_after(partial(sgd_reference, peak=0.2)))


@pytest.mark.parametrize(
    ("spec", "warmup", "total", "expected"),
    [
        ("constant", 0, 4, [2, 2, 2, 2]),
        ("linear", 0, 4, [2, 1.5, 1, 0.5]),
        ("linear(final=0.5)", 0, 4, [2, 1.75, 1.5, 1.25]),
        ("linear(until=0.5)", 0, 8, [2, 1.5, 1, 0.5, 0, 0, 0, 0]),
        ("cosine", 0, 4, [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)]),
        ("cosine(final=0.5)", 0, 2, [2, 1.5]),
        ("step", 0, 8, [2, 2, 2, 2, 0.2, 0.2, 0.02, 0.02]),
        ("step(at=(0.3, 0.6, 0.9), factor=0.5)", 0, 10, [2] * 3 + [1] * 3 + [0.5] * 3 + [0.25]),
        ("triangular", 0, 100, np.interp(range(100), [0, 23, 100], [0.4, 2, 0])),
        ("triangular(start=0.2, peak=0.5)", 0, 4, [0.4, 1.2, 2, 1]),
        ("triangular(start=0, peak=0.25, end=0.5)", 0, 4, [0, 2, 2 - 1 / 3, 2 - 2 / 3]),
        ("constant", 2, 4, [0, 1, 2, 2]),
        ("linear", 2, 6, [0, 1, 2, 1.5, 1, 0.5]),
        ("cosine", 1, 3, [0, 2, 1]),
        ("step(at=(0.5,))", 2, 6, [0, 1, 2, 2, 0.2, 0.2]),
        ("triangular(start=0.2, peak=0.5)", 2, 6, [0, 0.2, 0.4, 1.2, 2, 1]),
        ("linear", 5, 3, [0, 0.4, 0.8]),
        ("cosine", 0, 1, [2]),
        ("linear", 1, 1, [0]),
    ],
)
def test_schedule_has_these_rates(spec, warmup, total, expected):
    schedule = make_schedule(spec, 2.0, total, warmup)
    assert [float(schedule(t)) for t in range(total)] == pytest.approx(expected, abs=1e-6)
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(total, dtype=jnp.int32))
    chex.assert_type(traced, jnp.float32)
    np.testing.assert_allclose(traced, expected, atol=1e-6)


def test_schedule_drops_on_the_very_step():
    # Compiled, t / 50 becomes t * (1 / 50), and that falls short of 0.3 at t = 15.
    schedule = jax.jit(jax.vmap(make_schedule("step(at=(0.3, 0.6))", 1.0, 50, 0)))
    expected = [1.0] * 15 + [0.1] * 15 + [0.01] * 20
    np.testing.assert_allclose(schedule(jnp.arange(50)), expected, rtol=1e-6)


def test_schedule_stays_at_its_end():
    assert float(make_schedule("cosine(final=0.1)", 1.0, 5, 0)(9)) == pytest.approx(0.1)


def test_rate_may_be_traced():
    rates = jax.vmap(lambda lr: make_schedule("linear", lr, 4, 0)(2))(jnp.array([0.1, 0.4]))
    np.testing.assert_allclose(rates, [0.05, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "Unknown config.optim.schedule 'cosin'. Did you mean 'cosine'"),
        ({"schedule": "cosine(2.0)"}, "config.optim.schedule 'cosine': 2.0 is not between 0 and"),
        ({"schedule": "linear(until=0)"}, "'linear': until must be above 0. Write it as lin"),
        ({"schedule": "step(at=0.5)"}, "config.optim.schedule 'step': .* Write it as step"),
        ({"name": "sdg"}, "Unknown config.optim.name 'sdg'. Did you mean 'sgd'"),
        ({"name": "sgd(nestorov=True)"}, r"Write it as sgd\(nesterov: bool = False\)"),
        ({"name": "sgd(momentum=0.5)"}, "config.optim.name 'sgd': got an unexpected keyword"),
        ({"name": "muon(ns_steps=101)"}, "ns_steps=101 must be between 1 and 100"),
        ({"name": "muon(ns_steps=0)"}, "ns_steps=0 must be between 1 and 100"),
        ({"warmup": "5 epoks"}, "'5 epoks' is not a duration"),
        ({"groups": {"head": {"name": "adm"}}}, "Unknown config.optim.groups.head.name 'adm'"),
        ({"groups": {"head": {"schedule": "x"}}}, "Unknown config.optim.groups.head.schedule 'x'"),
        (
            {"groups": {"head": {"momentun": 0.5}}},
            "groups.head.momentun is not .* Did you mean 'momentum'",
        ),
        ({"groups": {"frozen": {"lr": 1.0}}}, "config.optim.groups.frozen: the name 'frozen' is"),
        ({"rules": ((".*", "bas"),)}, "unknown group 'bas'. Did you mean 'base'.*: base, frozen"),
        ({"rules": (("(", "base"),)}, "config.optim.rules: '\\(' is not a regular expression"),
        ({"rules": (("kernel", "base"), (".*", "base"))}, "rules: 'kernel' matches no parameter"),
        (
            {"rules": ((".*/kernel", "base"), ("conv/.*", "frozen"), (".*", "base"))},
            "'conv/.\\*' matches no parameter. .* Not matched by earlier rules: norm/bias",
        ),
        (
            {"rules": (("(conv|wide)/.*", "base"),)},
            "config.optim.rules match none of these parameters: head/kernel, norm/bias. Add",
        ),
    ],
)
def test_wrong_setting_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_catch_all_may_be_left_with_nothing():
    make(rules=(("[chnw].*", "base"), (".*", "frozen")))


GROUPED = {
    "rules": ((".*/bias", "base"), ("head/.*", "head"), (".*", "filters")),
    "groups": {
        "head": {"lr": 0.5, "weight_decay": 0, "schedule": "constant"},
        "filters": {"name": "adamw", "lr_batch_size": 32, "warmup": "2 steps"},
    },
    "name": "sgd(nesterov=True)",
    "weight_decay": 0.05,
}


def test_first_rule_that_matches_decides():
    for first, moved in [("base", ["conv/kernel", "norm/bias"]), ("frozen", ["norm/bias"])]:
        rules = (("conv/.*", first), ("[chw].*/kernel", "frozen"), (".*", "base"))
        history, _ = train(make(rules=rules), GRADS[:1])
        changed = [n for n in SHAPES if not np.array_equal(history[0][n], np.float32(START[n]))]
        assert changed == moved


def test_rule_must_match_the_whole_path():
    optimizer = make(rules=(("(conv|head)/k.*", "frozen"), (".*", "base")))
    assert optimizer.frozen == {"conv/kernel", "head/kernel"}
    history, _ = train(optimizer, GRADS[:1])
    np.testing.assert_array_equal(history[0]["head/kernel"], np.float32(START["head/kernel"]))
    with pytest.raises(UserError, match=r"'conv' matches no parameter.*write its group 'frozen\?'"):
        make(rules=(("conv", "frozen"), (".*", "base")))
    allowed = make(rules=(("conv", "frozen?"), (".*", "base?")))
    assert [row.split()[:3] for row in allowed.report.splitlines()[1:]] == [
        ["conv", "frozen", "0"],
        [".*", "base", "4"],
    ]
    with pytest.raises(UserError, match=r"unknown group 'frosen'\. Did you mean 'frozen'"):
        make(rules=(("conv", "frosen?"), (".*", "base")))


def test_groups_differ_from_base_only_where_they_say_so():
    history, _ = train(make(**GROUPED))
    grads = {name: [g[name] for g in GRADS] for name in SHAPES}

    bias = sgd_reference(START["norm/bias"], grads["norm/bias"], 0.9, 0.05, nesterov=True)
    np.testing.assert_allclose(history[-1]["norm/bias"], bias, 2e-5)

    p, buffer = START["head/kernel"], 0.0  # no weight decay, constant rate, the rest as base
    for g in grads["head/kernel"]:
        buffer = 0.9 * buffer + g
        p = p - 0.5 * (g + 0.9 * buffer)
    np.testing.assert_allclose(history[-1]["head/kernel"], p, 2e-5, 1e-5)

    p = START["conv/kernel"]  # 0.1 * 64 / 32, after two steps of warm-up over the remaining eight
    for t, lr in enumerate([0, 0.1, 0.2, 0.2 * 7 / 8, 0.2 * 6 / 8]):
        direction = adam_direction(grads["conv/kernel"][: t + 1], 0.9, 0.999, 1e-8)
        p = p - lr * (direction + 0.05 * p)
    np.testing.assert_allclose(history[-1]["conv/kernel"], p, 2e-5, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb", "muon"])
def test_two_updates_in_a_step_have_the_same_rate(name):
    rules = ((".*/bias", "base"), (".*", "group"))
    optimizer = make(momentum=0.0, rules=rules, groups={"group": {"name": name}})
    grads, params = to_jax(GRADS[0]), to_jax(START)

    def moved(state, step):
        updates, state = optimizer.tx.update(grads, state, params, step=step)
        return flatten(updates), state

    first, state = moved(optimizer.tx.init(params), 3)
    second, state = moved(state, 3)
    later, _ = moved(state, 8)
    # Equal gradients make equal updates of all these rules, up to the bias correction of Adam.
    for path in ("norm/bias", "conv/kernel"):
        np.testing.assert_allclose(second[path], first[path], rtol=1e-4)
        np.testing.assert_allclose(later[path], first[path] * rate(8) / rate(3), rtol=1e-4)


def test_rates_to_log_are_those_of_the_groups_in_use():
    optimizer = make(**GROUPED, batch_size=64)
    rates = jax.jit(optimizer.lr)(jnp.int32(1))
    assert {name: float(r) for name, r in rates.items()} == pytest.approx(
        {"lr": 0.09, "lr/head": 0.5, "lr/filters": 0.1}
    )
    unused = make(**GROUPED | {"rules": ((".*", "base"),)})
    assert unused.lr(0).keys() == {"lr"}


def test_report_says_which_rule_took_what():
    rules = ((".*/bias", "frozen"), ("head/.*", "head"), (".*", "filters"))
    assert make(**GROUPED | {"rules": rules}).report.splitlines() == [
        "rule     group    arrays  values  parameters",
        ".*/bias  frozen        1       4  norm/bias",
        "head/.*  head          1      18  head/kernel",
        ".*       filters       2      58  conv/kernel, wide/kernel",
    ]


def test_frozen_stays_bit_for_bit():
    rules = ((".*/kernel", "frozen"), (".*", "base"))
    history, state = train(make(rules=rules, weight_decay=0.3, ema=0.9, clip_norm=1.0))
    average = flatten(ema_params(state))
    for name in MATRICES:
        np.testing.assert_array_equal(history[-1][name], np.float32(START[name]))
        np.testing.assert_array_equal(average[name], np.float32(START[name]))
    assert not np.array_equal(history[-1]["norm/bias"], np.float32(START["norm/bias"]))


def norm_of(grad, names=SHAPES):
    return math.sqrt(sum((grad[name] ** 2).sum() for name in names))


def test_clip_limits_the_global_norm_of_what_is_trained():
    def clipped(grad, names):
        return {n: grad[n] * min(1, 3.0 / norm_of(grad, names)) for n in SHAPES}

    short = {name: 0.01 * g for name, g in GRADS[0].items()}
    history, _ = train(make(clip_norm=3.0, momentum=0.0), [GRADS[0], short])
    first = {n: START[n] - rate(0) * clipped(GRADS[0], SHAPES)[n] for n in SHAPES}
    assert_same(history[0], first)
    assert_same(history[1], {n: first[n] - rate(1) * short[n] for n in SHAPES})

    trained = ["norm/bias", "wide/kernel"]
    rules = (("(conv|head)/.*", "frozen"), (".*", "base"))
    history, _ = train(make(clip_norm=3.0, rules=rules, momentum=0.0), GRADS[:1])
    for name in trained:
        expected = START[name] - rate(0) * clipped(GRADS[0], trained)[name]
        np.testing.assert_allclose(history[0][name], expected, 2e-5)


def test_ema_is_the_weighted_mean_of_the_updated_parameters():
    for decay in (0.5, 0.9999):
        optimizer = make(ema=decay, schedule="constant", lr=1.0)
        state = optimizer.tx.init(to_jax(START))
        chex.assert_trees_all_equal(ema_params(state), to_jax(START))
        for count in (1, len(GRADS)):
            history, state = train(optimizer, GRADS[:count])
            weights = [decay ** (count - 1 - t) for t in range(count)]
            expected = {
                n: np.average(np.stack([np.float64(p[n]) for p in history]), 0, weights)
                for n in SHAPES
            }
            assert_same(flatten(ema_params(state)), expected)


def test_ema_of_averages_only_the_parameters_that_it_matches():
    history, state = train(make(ema=0.5, ema_of="(conv|head)/.*", schedule="constant"))
    whole = flatten(ema_params(train(make(ema=0.5, schedule="constant"))[1]))
    average = flatten(ema_params(state))
    for name in SHAPES:
        expected = whole if name.startswith(("conv", "head")) else history[-1]
        np.testing.assert_array_equal(average[name], expected[name])
        assert not np.array_equal(whole[name], history[-1][name])
    with pytest.raises(UserError, match=r"config.optim.ema_of: '\(' is not a regular expression"):
        make(ema=0.5, ema_of="(")


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_average_is_evaluated_only_where_there_is_one(ema):
    state = init_state(to_jax(START), {}, make(ema=ema).tx)
    state = state.replace(params=jax.tree.map(lambda p: p + 1, state.params))  # the average lags
    expected = START if ema else {name: p + 1 for name, p in START.items()}
    assert_same(flatten(evaluated_params(make_config(ema=ema), state)), expected)


def test_ema_changes_no_update():
    with_average, _ = train(make(ema=0.9))
    without, _ = train(make())
    chex.assert_trees_all_equal(with_average, without)


EVERYTHING = {
    "ema": 0.9,
    "clip_norm": 2.0,
    "rules": (("norm/.*", "base"), ("conv/.*", "muon"), ("head/.*", "adam"), (".*", "frozen")),
    "groups": {"muon": {"name": "muon(normalize_weights=True)"}, "adam": {"name": "adam"}},
}


def test_state_is_arrays_that_keep_type_and_shape():
    optimizer = make(**EVERYTHING)
    before = optimizer.tx.init(to_jax(START))
    _, after = train(optimizer)
    for leaf in jax.tree.leaves(before):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == (jnp.int32 if leaf.ndim == 0 else jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


def test_no_gradient_where_the_rate_stays_zero():
    optimizer = make(
        rules=(("norm/.*", "base"), ("conv/.*", "early"), (".*", "frozen")),
        groups={"early": {"schedule": "linear(until=0.5)"}},
        warmup=f"{TOTAL // 5} steps",  # the rate of step 0 is 0, too, but does not stay so
    )
    (end,) = optimizer.ends
    assert optimizer.lr(end)["lr/early"] == 0 < optimizer.lr(end - 1)["lr/early"]

    def trained_from(step):
        def total(params):
            return sum(
                leaf.sum() for leaf in jax.tree.leaves(optimizer.stop_gradients(params, step))
            )

        gradient = jax.grad(total)(to_jax(START))
        return {name.split("/")[0] for name, g in flatten(gradient).items() if np.any(g)}

    assert trained_from(0) == trained_from(end - 1) == {"norm", "conv"}
    assert trained_from(end) == {"norm"}


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: to_jax(START))
    optimizer = make_optimizer(make_config(**EVERYTHING), shapes, TOTAL, 64, STEPS)
    expected, _ = train(make(**EVERYTHING))
    chex.assert_trees_all_equal(train(optimizer)[0], expected)


@pytest.mark.slow
def test_networks_side_by_side_train_as_one_alone():
    optimizer = make(**EVERYTHING)

    def run(params, grads):
        def update(carry, step_and_grad):
            params, state = carry
            step, grad = step_and_grad
            updates, state = optimizer.tx.update(grad, state, params, step=step)
            return (optax.apply_updates(params, updates), state), None

        steps = jnp.arange(len(GRADS))
        return jax.lax.scan(update, (params, optimizer.tx.init(params)), (steps, grads))[0][0]

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    grads = stack([to_jax(g) for g in GRADS])
    flipped = jax.tree.map(jnp.negative, grads)
    params = stack([to_jax(START), to_jax(draw(9))])
    both = jax.jit(jax.vmap(run))(params, stack([grads, flipped]))
    alone, _ = train(optimizer)
    assert_same(flatten(jax.tree.map(lambda leaf: leaf[0], both)), alone[-1])
    assert not np.allclose(both["head"]["kernel"][0], both["head"]["kernel"][1])


@pytest.mark.parametrize("ns_steps", [1, 100])
def test_the_fewest_and_the_most_iterations_of_muon_are_allowed(ns_steps):
    make(name=f"muon(ns_steps={ns_steps})")


def test_only_the_first_step_may_have_a_rate():
    optimizer = make(schedule="linear(until=0.01)")  # TOTAL is less than 100 steps
    assert optimizer.lr(0)["lr"] > 0 == optimizer.lr(1)["lr"]
    assert optimizer.ends == (1,)
