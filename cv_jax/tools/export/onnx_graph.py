"""Converts a JAX function to an ONNX model: its jaxpr, equation by equation.

Supports the operations of image classifiers at inference. Equations with only constants, such as a
normalisation's scale, are computed; calls are inlined; unused equations are left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.interpreters import partial_eval
from onnx import helper, numpy_helper

from cv_jax.config.errors import UserError

# The oldest versions with all operators used here, so that older runtimes can read the file.
_OPSET, _IR_VERSION = 18, 8
_END = np.iinfo(np.int64).max  # the end of an axis of any length

_SAME = {
    "abs": "Abs",
    "add": "Add",
    "copy": "Identity",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "log": "Log",
    "logistic": "Sigmoid",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "sqrt": "Sqrt",
    "stop_gradient": "Identity",
    "sub": "Sub",
    "tanh": "Tanh",
}
_REDUCE = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}
_CALLS = {"closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat", "remat2"}


def to_onnx(function: Callable, batch: dict[str, jax.ShapeDtypeStruct]) -> onnx.ModelProto:
    """Converts a function: batch by field -> predictions by name.

    The model's inputs and outputs have these names; a size may be a symbol of jax.export.

    Raises:
        UserError: the function uses an operation that is not supported.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(batch)
    graph = _Graph()
    found = graph.run(closed.jaxpr, closed.consts, sorted(batch))  # the order of JAX's leaves
    outputs = []
    for name, value, out in zip(sorted(shapes), found, closed.out_avals, strict=True):
        graph.node("Identity", [value], name=name)
        outputs.append(_info(name, out))
    inputs = [_info(name, batch[name]) for name in sorted(batch)]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "network", inputs, outputs, graph.arrays),
        producer_name="cv_jax",
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _info(name: str, aval: Any) -> onnx.ValueInfoProto:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(aval.dtype), shape)


class _Graph:
    """A growing graph of nodes and arrays. A value is the name of a node, or a constant array."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: list[onnx.TensorProto] = []
        self._names: dict[tuple, str] = {}  # array's dtype, shape and bytes -> its name

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """Adds a jaxpr applied to values; returns the values of its outputs."""
        used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
        values = dict(zip(used.constvars, map(np.asarray, consts), strict=True))
        values |= zip(used.invars, inputs, strict=True)

        def value(var):
            return np.asarray(var.val, var.aval.dtype) if isinstance(var, Literal) else values[var]

        for equation in used.eqns:
            outputs = self._equation(equation, [value(var) for var in equation.invars])
            values |= zip(equation.outvars, outputs, strict=True)
        return [value(var) for var in used.outvars]

    def node(self, kind: str, inputs: Sequence[Any], name: str = "", **attributes: Any) -> str:
        """Adds a node of one output, and returns its name."""
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        names = [x if isinstance(x, str) else self._array(x) for x in inputs]
        self.nodes.append(helper.make_node(kind, names, [name], **attributes))
        return name

    def _array(self, array: Any) -> str:
        array = np.asarray(array)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._names:  # each view of an image has the same weights
            self._names[key] = f"array_{len(self._names)}"
            self.arrays.append(numpy_helper.from_array(array, self._names[key]))
        return self._names[key]

    def _equation(self, equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            inner = params["jaxpr" if "jaxpr" in params else "call_jaxpr"]
            return self.run(inner.jaxpr, inner.consts, inputs)
        out = equation.outvars[0].aval
        if not any(isinstance(x, str) for x in inputs) and _is_known(out.shape):
            computed = equation.primitive.bind(*inputs, **params)
            several = equation.primitive.multiple_results
            return [np.asarray(x) for x in (computed if several else [computed])]
        if name == "optimization_barrier":
            return inputs
        if name in _SAME:
            return [self.node(_SAME[name], inputs)]
        if name in _REDUCE:
            return [self.node(_REDUCE[name], [inputs[0], _whole(params["axes"])], keepdims=0)]
        add = getattr(self, f"_{name}", _unknown)
        shapes = [var.aval.shape for var in equation.invars]
        try:
            found = add(*inputs, shapes=shapes, out=out, **params)
            return found if isinstance(found, list) else [found]
        except NotImplementedError as error:
            raise UserError(
                f"--format=onnx does not support the operation {name!r} of this model: add it to "
                "cv_jax/tools/export/onnx_graph.py, or choose another --format."
            ) from error

    def _rsqrt(self, x, **_):
        return self.node("Reciprocal", [self.node("Sqrt", [x])])

    def _square(self, x, **_):
        return self.node("Mul", [x, x])

    def _integer_pow(self, x, out, y, **_):
        return self.node("Pow", [x, np.array(y, out.dtype)])

    def _convert_element_type(self, x, out, **_):
        return self.node("Cast", [x], to=helper.np_dtype_to_tensor_dtype(out.dtype))

    def _reshape(self, x, out, **_):
        sizes = [size if isinstance(size, int) else -1 for size in out.shape]
        _require(sizes.count(-1) <= 1)
        return self.node("Reshape", [x, _whole(sizes)])

    _squeeze = _expand_dims = _reshape

    def _broadcast_in_dim(self, x, shapes, out, broadcast_dimensions, **_):
        """Adds only the axes: ONNX repeats an axis of length 1 where another operand is longer."""
        if isinstance(x, str):
            new = [i for i in range(len(out.shape)) if i not in broadcast_dimensions]
            return self.node("Unsqueeze", [x, _whole(new)]) if new else x
        shape = np.ones(len(out.shape), int)
        shape[list(broadcast_dimensions)] = x.shape
        return x.reshape(shape)

    def _transpose(self, x, permutation, **_):
        return self.node("Transpose", [x], perm=list(permutation))

    def _concatenate(self, *parts, dimension, **_):
        return self.node("Concat", parts, axis=dimension)

    def _slice(self, x, shapes, start_indices, limit_indices, strides, **_):
        strides = strides or [1] * len(start_indices)
        cut = [
            (start, _END if limit == size else limit, axis, stride)
            for axis, (size, start, limit, stride) in enumerate(
                zip(shapes[0], start_indices, limit_indices, strides, strict=True)
            )
            if (start, limit, stride) != (0, size, 1)
        ]
        return self.node("Slice", [x, *map(_whole, zip(*cut, strict=True))]) if cut else x

    def _rev(self, x, dimensions, **_):
        count = len(dimensions)
        bounds = [[-1] * count, [-_END] * count, dimensions, [-1] * count]
        return self.node("Slice", [x, *map(_whole, bounds)])

    def _pad(self, x, value, padding_config, **_):
        below, above, inside = zip(*padding_config, strict=True)
        _require(not any(inside))
        return self.node("Pad", [x, _whole([*below, *above]), value])

    def _select_n(self, which, *cases, **_):
        no, yes = cases
        return self.node("Where", [which, yes, no])

    def _rem(self, x, y, **_):
        return self.node("Mod", [x, y], fmod=1)

    def _top_k(self, x, k, axis, out, **_):
        values, positions = (f"top_{part}_{len(self.nodes)}" for part in ("values", "positions"))
        self.nodes.append(
            helper.make_node("TopK", [x, self._array(_whole([k]))], [values, positions], axis=axis)
        )
        return [values, self.node("Cast", [positions], to=onnx.TensorProto.INT32)]

    def _gather(self, x, positions, shapes, dimension_numbers, slice_sizes, **_):
        """Takes rows of each example: (b, n, d) at positions (b, m, 1) -> (b, m, d)."""
        numbers = dimension_numbers
        _require(numbers.operand_batching_dims == numbers.start_indices_batching_dims == (0,))
        _require(numbers.start_index_map == numbers.collapsed_slice_dims == (1,))
        _require(numbers.offset_dims == (2,) and slice_sizes == (1, 1, shapes[0][2]))
        positions = self.node("Cast", [positions], to=onnx.TensorProto.INT64)
        return self.node("GatherND", [x, positions], batch_dims=1)

    def _argmax(self, x, out, axes, **_):
        positions = self.node("ArgMax", [x], axis=axes[0], keepdims=0)
        return self.node("Cast", [positions], to=helper.np_dtype_to_tensor_dtype(out.dtype))

    def _dot_general(self, x, y, shapes, dimension_numbers, **_):
        """Multiplies with a matrix: on the right, as a dense layer, or on the left, as a resize."""
        ((of_x,), (of_y,)), batch = dimension_numbers
        _require(batch == ((), ()))
        if len(shapes[1]) == 2:
            return self.node("MatMul", [self._last(x, of_x, shapes[0]), y if of_y == 0 else y.T])
        _require(len(shapes[0]) == 2 and not isinstance(x, str))
        y = self.node("MatMul", [self._last(y, of_y, shapes[1]), x if of_x == 0 else x.T])
        rank = len(shapes[1])
        return self.node("Transpose", [y], perm=[rank - 1, *range(rank - 1)])

    def _last(self, x, axis, shape):
        """Moves an axis to the end."""
        order = [*(i for i in range(len(shape)) if i != axis), axis]
        return x if order == sorted(order) else self.node("Transpose", [x], perm=order)

    def _conv_general_dilated(
        self, x, kernel, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, **p
    ):
        _require({*lhs_dilation, p["batch_group_count"]} == {1})
        numbers = dimension_numbers
        x = self.node("Transpose", [x], perm=list(numbers.lhs_spec))  # b c h w
        y = self.node(
            "Conv",
            [x, kernel.transpose(numbers.rhs_spec)],  # o c kh kw
            strides=list(window_strides),
            pads=_pads(padding),
            dilations=list(rhs_dilation),
            group=p["feature_group_count"],
        )
        return self.node("Transpose", [y], perm=np.argsort(numbers.out_spec).tolist())

    def _reduce_window_max(
        self, x, window_dimensions, window_strides, padding, base_dilation, window_dilation, **_
    ):
        (b, *size, c), (b_stride, *strides, c_stride) = window_dimensions, window_strides
        _require({b, c, b_stride, c_stride, *base_dilation, *window_dilation} == {1})
        x = self.node("Transpose", [x], perm=[0, 3, 1, 2])
        y = self.node(
            "MaxPool",
            [x],
            kernel_shape=size,
            strides=strides,
            pads=_pads(padding[1:3]),
        )
        return self.node("Transpose", [y], perm=[0, 2, 3, 1])


def _unknown(*_: Any, **__: Any) -> str:
    raise NotImplementedError


def _require(holds: bool) -> None:
    if not holds:
        raise NotImplementedError


def _is_known(shape: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in shape)


def _whole(values: Any) -> np.ndarray:
    return np.array(list(values), np.int64)


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Returns ((above, below), (left, right)) in ONNX's order."""
    return [before for before, _ in padding] + [after for _, after in padding]
