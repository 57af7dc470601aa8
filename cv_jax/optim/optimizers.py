"""Builds the optimizer of a config: an optax transformation, learning rates, parameter groups."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.typing import ArrayLike

from cv_jax.config.calls import build_one, require
from cv_jax.config.errors import UserError, nearest
from cv_jax.config.tables import align
from cv_jax.optim.muon import from_normalized_weights, scale_by_orthogonalization
from cv_jax.optim.schedules import make_schedule
from cv_jax.optim.state import TrainState

Rate = Callable[[ArrayLike], jax.Array]  # step -> learning rate

_STEPS_AT_ONCE = 1_000_000  # steps whose rates are computed together; bounds the memory


def sgd(
    nesterov: bool = False, *, rate: Rate, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Builds stochastic gradient descent with momentum and L2 regularization, as torch.optim.SGD.

    g <- g + weight_decay p;   m <- momentum m + g;   p <- p - rate (g + momentum m, or m)
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov),
        scale_by_rate(rate),
    )


def adam(
    b2: float = 0.999, eps: float = 1e-8, *, rate: Rate, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Builds Adam (Kingma & Ba 2015), b1 = momentum, with L2 regularization, as torch.optim.Adam.

    g <- g + weight_decay p;   m, v <- the averages of g, g^2;   p <- p - rate m' / (sqrt(v') + eps)
    where m', v' are corrected for their start at zero.
    """
    _check_adam(b2, eps)
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        _scale_by_adam(momentum, b2, eps),
        scale_by_rate(rate),
    )


def adamw(
    b2: float = 0.999, eps: float = 1e-8, *, rate: Rate, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Builds Adam with decoupled weight decay (Loshchilov & Hutter 2019), b1 = momentum.

    p <- p - rate (m' / (sqrt(v') + eps) + weight_decay p)
    """
    _check_adam(b2, eps)
    return optax.chain(
        _scale_by_adam(momentum, b2, eps),
        optax.add_decayed_weights(weight_decay),
        scale_by_rate(rate),
    )


def lamb(
    b2: float = 0.999, eps: float = 1e-6, *, rate: Rate, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Builds LAMB (You et al. 2020), b1 = momentum: AdamW's step, scaled to the parameter's norm.

    u = m' / (sqrt(v') + eps) + weight_decay p;   p <- p - rate u ||p|| / ||u||
    for each array p; the ratio is 1 if either norm is 0.
    """
    _check_adam(b2, eps)
    return optax.chain(
        _scale_by_adam(momentum, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_trust_ratio(),
        scale_by_rate(rate),
    )


def muon(
    ns_steps: int = 5,
    nesterov: bool = True,
    normalize_weights: bool = False,
    *,
    rate: Rate,
    momentum: float,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Builds Muon with decoupled weight decay, for filters and matrices; see cv_jax/optim/muon.py.

    m <- momentum m + g;   p <- p - rate (orthogonalize(g + momentum m, or m) + weight_decay p)
    `normalize_weights` first scales p to norm sqrt(output channels), as in the published CIFAR-10
    recipe (github.com/KellerJordan/cifar10-airbench).
    """
    require(lambda: 1 <= ns_steps <= 100, f"ns_steps={ns_steps} must be between 1 and 100")
    tx = optax.chain(
        optax.trace(momentum, nesterov),
        scale_by_orthogonalization(ns_steps),
        optax.add_decayed_weights(weight_decay),
        scale_by_rate(rate),
    )
    return from_normalized_weights(tx) if normalize_weights else tx


def _check_adam(b2: float, eps: float) -> None:
    require(lambda: 0 <= b2 < 1, f"b2={b2} must be in [0, 1)")
    require(lambda: eps > 0, f"eps={eps} must be above 0")


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    tx = optax.scale_by_adam(b1, b2, eps)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # of the bias correction, float ** int32
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


def scale_by_rate(rate: Rate) -> optax.GradientTransformationExtraArgs:
    """Multiplies every update by -rate(step), where `update` is given the training step.

    The state holds no count of updates: all updates of one training step have the same rate.
    """

    def update(updates, state, params=None, *, step, **extra_args):
        del params, extra_args
        factor = -1 * rate(step)
        return jax.tree.map(lambda u: jnp.array(factor, dtype=u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw, "lamb": lamb, "muon": muon}

# Settings of `config.optim`, the group "base", which another group may set differently.
SETTINGS = ("name", "lr", "lr_batch_size", "momentum", "weight_decay", "schedule", "warmup")


class Optimizer(NamedTuple):
    """An optimizer for given parameters, see `make_optimizer`.

    Attributes:
        tx: the optax transformation, `tx.update(grads, opt_state, params, step=step)`. Schedules
            see the training step `step`, however often a step updates. The state is arrays only.
        lr: step -> {"lr": rate of "base", "lr/<group>": rate of each other group in use}, for logs.
        ends: steps, ascending, from which on the rate of some group stays 0; without 0 and the
            end of the training.
        stop_gradients: (params, step) -> params; stops the gradient of parameters whose rate stays
            0 from `step` (a Python int) on. This saves their backward pass and changes nothing.
        frozen: paths of the parameters that no step changes.
        report: a table of each rule, its group and its parameters.
    """

    tx: optax.GradientTransformationExtraArgs
    lr: Callable[[ArrayLike], dict[str, jax.Array]]
    ends: tuple[int, ...]
    stop_gradients: Callable[[optax.Params, int], optax.Params]
    frozen: frozenset[str]
    report: str


class Decision(NamedTuple):
    """A rule's parameters: those at the paths `names` belong to `group`."""

    pattern: str
    group: str
    names: list[str]


def make_optimizer(
    config_optim: ml_collections.ConfigDict,
    params: optax.Params,
    total_steps: int,
    batch_size: int,
    steps: Callable[[str], int],
) -> Optimizer:
    """Builds the optimizer that `config.optim` describes for these parameters.

    The gradient of all parameters that are not frozen is clipped to the global norm `clip_norm`.
    Every group then applies its own optimizer. With `ema` > 0 the state keeps an average of the
    updated parameters (`ema_params`) whose paths `ema_of` matches. The peak rate of a group is
    lr * batch_size / lr_batch_size, or lr where lr_batch_size is 0.

    Args:
        config_optim: `config.optim`.
        params: the parameters, or their ShapeDtypeStructs.
        total_steps: steps of the whole training.
        batch_size: examples in a step.
        steps: converts a duration ("2 epochs") to steps.

    Raises:
        UserError: an invalid optimizer, schedule, rule or group, or a parameter that no rule
            matches. `tx.init` raises UserError for a parameter that Muon cannot update.
    """
    sizes = {_name(path): math.prod(p.shape) for path, p in jax.tree.leaves_with_path(params)}
    settings = _settings(config_optim)
    decisions = _apply_rules(config_optim.rules, list(sizes), {*settings, "frozen"})
    group_of = {name: decision.group for decision in decisions for name in decision.names}
    labels = jax.tree.map_with_path(lambda path, _: group_of[_name(path)], params)

    rates = {g: _rate(g, s, total_steps, batch_size, steps) for g, s in settings.items()}
    transforms = {g: _transform(g, s, rates[g]) for g, s in settings.items()}
    transforms["frozen"] = optax.set_to_zero()
    used = set(group_of.values())
    ends = {
        g: _end(_rate(g, s | {"lr": 1.0}, total_steps, 1, steps), total_steps)
        for g, s in settings.items()
        if g in used
    }
    ends["frozen"] = 0

    def stop_gradients(params, step):
        def stop(p, group):
            return jax.lax.stop_gradient(p) if ends[group] <= step else p

        return jax.tree.map(stop, params, labels)

    chain = [optax.partition({g: tx for g, tx in transforms.items() if g in used}, labels)]
    if config_optim.clip_norm:
        trained = jax.tree.map(lambda group: group != "frozen", labels)
        chain.insert(0, optax.masked(optax.clip_by_global_norm(config_optim.clip_norm), trained))
    averaged = set(_match("ema_of", config_optim.ema_of, list(sizes)))
    if config_optim.ema:
        chain.append(average_params(config_optim.ema, averaged.__contains__))

    logged = {
        "lr" if g == "base" else f"lr/{g}": r for g, r in rates.items() if g in {*used, "base"}
    }
    return Optimizer(
        tx=optax.chain(*chain),
        lr=lambda step: {name: rate(step) for name, rate in logged.items()},
        ends=tuple(sorted({end for end in ends.values() if 0 < end < total_steps})),
        stop_gradients=stop_gradients,
        frozen=frozenset(name for name, group in group_of.items() if group == "frozen"),
        report=_report(decisions, sizes),
    )


def _settings(config_optim: ml_collections.ConfigDict) -> dict[str, dict[str, Any]]:
    """Returns {group: all its settings}; a group has base's settings where it sets none."""
    base = {key: config_optim[key] for key in SETTINGS}
    settings = {"base": base}
    for group, changes in config_optim.groups.items():
        if group in ("base", "frozen"):
            raise UserError(
                f"config.optim.groups.{group}: the name {group!r} is taken. Choose another."
            )
        for key in changes:
            if key not in base:
                raise UserError(
                    f"config.optim.groups.{group}.{key} is not a setting."
                    f"{nearest(key, base)} A group may set: {', '.join(SETTINGS)}."
                )
        settings[group] = base | dict(changes)
    return settings


def _apply_rules(
    rules: tuple[tuple[str, str], ...], names: list[str], groups: set[str]
) -> list[Decision]:
    """Assigns every parameter to the group of the first rule that matches its whole path.

    A rule that matches no parameter is an error, unless its group ends with "?" or its pattern is
    ".*". With "?", a config can have rules for layers that only some models have.
    """
    decisions, left = [], names
    for pattern, text in rules:
        group = text.removesuffix("?")
        if group not in groups:
            raise UserError(
                f"config.optim.rules: unknown group {group!r}.{nearest(group, groups)} "
                f"There are: {', '.join(sorted(groups))}."
            )
        matched = _match("rules", pattern, left)
        if not matched and pattern != ".*" and group == text:
            raise UserError(
                f"config.optim.rules: {pattern!r} matches no parameter. Correct or remove the "
                f"rule, or write its group {f'{group}?'!r} if only other models have such "
                f"parameters. Not matched by earlier rules: {', '.join(left) or 'none'}."
            )
        decisions.append(Decision(pattern, group, matched))
        left = [name for name in left if name not in matched]
    if left:
        raise UserError(
            f"config.optim.rules match none of these parameters: {', '.join(left)}. "
            "Add a last rule, for example ('.*', 'base')."
        )
    return decisions


def _match(key: str, pattern: str, names: list[str]) -> list[str]:
    """Returns the names that a regular expression in `config.optim` matches as a whole."""
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"config.optim.{key}: {pattern!r} is not a regular expression: {error}."
        ) from error


def _rate(
    group: str,
    settings: dict[str, Any],
    total_steps: int,
    batch_size: int,
    steps: Callable[[str], int],
) -> Rate:
    peak = settings["lr"]
    if settings["lr_batch_size"]:
        peak = peak * batch_size / settings["lr_batch_size"]
    warmup = steps(settings["warmup"])
    return make_schedule(
        settings["schedule"], peak, total_steps, warmup, f"{_prefix(group)}.schedule"
    )


def _end(rate: Rate, total_steps: int) -> int:
    """Returns the first step from which on the rate is 0 up to the end of the training."""
    for stop in range(total_steps, 0, -_STEPS_AT_ONCE):
        start = max(0, stop - _STEPS_AT_ONCE)
        try:
            with jax.ensure_compile_time_eval():  # works where a traced function builds the task
                rates = np.asarray(jax.jit(rate)(np.arange(start, stop)))
        except jax.errors.TracerArrayConversionError:  # a swept schedule: runs end at other steps
            return total_steps
        (above,) = np.nonzero(rates)
        if len(above):
            return start + int(above[-1]) + 1
    return 0


def _transform(group: str, settings: dict[str, Any], rate: Rate) -> optax.GradientTransformation:
    return build_one(
        settings["name"],
        OPTIMIZERS,
        f"{_prefix(group)}.name",
        rate=rate,
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
    )


def _prefix(group: str) -> str:
    return "config.optim" if group == "base" else f"config.optim.groups.{group}"


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _report(decisions: list[Decision], sizes: dict[str, int]) -> str:
    rows = [("rule", "group", "arrays", "values", "parameters")]
    for pattern, group, names in decisions:
        values = sum(sizes[name] for name in names)
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        rows.append((pattern, group, f"{len(names):,}", f"{values:,}", shown))
    return align(rows, right=(2, 3))


class EmaState(NamedTuple):
    """The state of `average_params`.

    Attributes:
        ema_params: average of the parameters.
        count: () int32, number of updates in the average.
    """

    ema_params: optax.Params
    count: jax.Array


def average_params(
    decay: float, averaged: Callable[[str], bool] = lambda name: True
) -> optax.GradientTransformation:
    """Keeps an average of the updated parameters; comes last in a chain and changes no update.

    After T updates, with p_t the parameters after update t,

        ema_T = sum_t decay^(T-t) p_t / sum_t decay^(T-t),   t = 1 .. T

    This is the usual ema <- decay ema + (1 - decay) p without its bias towards the start: the
    initial parameters have weight 0, however short the training. Before the first update, the
    average is the initial parameters.

    Args:
        decay: in (0, 1).
        averaged: path -> whether this parameter is averaged; else `ema_params` holds its last
            value.
    """

    def init(params):
        # A copy: a donated state must not hold one buffer twice.
        return EmaState(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        count = state.count + 1
        # (1 - decay) / (1 - decay^count), written so that float32 keeps its digits.
        weight = (1 - decay) / -jnp.expm1(count.astype(jnp.float32) * math.log(decay))
        new = optax.apply_updates(params, updates)

        def average(path, old, p):
            # The difference form keeps the bits of a parameter that never changes.
            return old + weight * (p - old) if averaged(_name(path)) else p

        return updates, EmaState(jax.tree.map_with_path(average, state.ema_params, new), count)

    return optax.GradientTransformation(init, update)


def evaluated_params(config_optim: ml_collections.ConfigDict, state: TrainState) -> optax.Params:
    """Returns the parameters for evaluation: the averaged ones where `config.optim.ema` > 0."""
    return ema_params(state.opt_state) if config_optim.ema > 0 else state.params


def ema_params(opt_state: optax.OptState) -> optax.Params:
    """Returns the averaged parameters from the state of an optimizer with `ema` > 0."""
    return optax.tree.get(opt_state, "ema_params")
