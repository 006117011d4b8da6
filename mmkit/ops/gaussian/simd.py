"""Eight float32 lanes as one Numba value: what LLVM's vectoriser does not find in loops over pixels is written down explicitly.

`F8` is LLVM's `<8 x float>` and `M8` its `<8 x i1>`; llvmlite lowers them to AVX, SSE or NEON, so no compiler is needed. No
operation carries fast-math flags: the forward and the backward pass of a renderer then take the same decisions, bit by bit.
Arrays are one-dimensional, contiguous and float32; an index counts floats.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import PrimitiveModel
from numba.extending import intrinsic, overload, register_model

LANES = 8
_FLOAT, _BIT, _I32 = ir.FloatType(), ir.IntType(1), ir.IntType(32)
_VECTOR, _MASK, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_BIT, LANES), ir.VectorType(_I32, LANES)


class _Lanes(types.Type):
    def __init__(self, name: str):
        super().__init__(name=name)


F8, M8 = _Lanes("F8"), _Lanes("M8")


@register_model(_Lanes)
class _LanesModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, _VECTOR if kind == F8 else _MASK)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [ir.Constant(_FLOAT, value)] * LANES)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [ir.Constant(_I32, value)] * LANES)


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    """One of LLVM's vector intrinsics, e.g. `fma`."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(arguments))
    function = builder.module.globals.get(f"llvm.{name}.v{LANES}f32")
    function = function or ir.Function(builder.module, kind, name=f"llvm.{name}.v{LANES}f32")
    return builder.call(function, arguments)


def _operation(result: Any, arguments: tuple[Any, ...], emit: Callable[..., Any]) -> Any:
    """An intrinsic with fixed argument types; `emit(builder, *values)` gives its value."""

    def typer(typingctx: Any, *given: Any) -> Any:
        if tuple(given) != arguments:
            return None

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return emit(builder, *values)

        return result(*arguments), codegen

    names = ", ".join(f"x{i}" for i in range(len(arguments)))
    scope: dict[str, Any] = {"typer": typer}
    exec(f"def operation(typingctx, {names}): return typer(typingctx, {names})", scope)  # an intrinsic needs its arity
    return intrinsic(scope["operation"])


def _splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _exp2(b: Any, x: Any) -> Any:
    """2**x for x <= 127: 2**round(x) put together from bits, times a polynomial of degree 6 in the rest (relative error 2e-7)."""
    x = _call(b, "maxnum", x, _constant(-126.0))
    whole = _call(b, "nearbyint", x)
    rest = b.fsub(x, whole)
    value = _constant(1.540353039338161e-4)
    for c in (
        1.3333558146428443e-3,
        9.618129107628477e-3,
        5.550410866482158e-2,
        0.24022650695910072,
        0.6931471805599453,
        1.0,
    ):
        value = _call(b, "fma", value, rest, _constant(c))
    exponent = b.shl(b.fptosi(whole, _INTS), _integers(23))
    return b.bitcast(b.add(b.bitcast(value, _INTS), exponent), _VECTOR)


def _total(b: Any, x: Any) -> Any:
    """The sum of all lanes, always in the same order."""
    for half in (4, 2, 1):
        order = ir.Constant(_INTS, [*range(half, 2 * half), *[0] * (LANES - half)])
        x = b.fadd(x, b.shuffle_vector(x, ir.Constant(_VECTOR, ir.Undefined), order))
    return b.extract_element(x, ir.Constant(_I32, 0))


def _bits(b: Any, mask: Any) -> Any:
    return b.zext(b.bitcast(mask, ir.IntType(8)), ir.IntType(64))


_F4, _I8, _B1 = types.float32, types.int64, types.boolean
splat = _operation(F8, (_F4,), _splat)
ramp = _operation(F8, (_F4,), lambda b, x: b.fadd(_splat(b, x), ir.Constant(_VECTOR, [float(i) for i in range(LANES)])))
fma = _operation(F8, (F8, F8, F8), lambda b, x, y, z: _call(b, "fma", x, y, z))
vmin = _operation(F8, (F8, F8), lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
vsqrt = _operation(F8, (F8,), lambda b, x: _call(b, "sqrt", _call(b, "maxnum", x, _constant(0.0))))
vabs = _operation(F8, (F8,), lambda b, x: _call(b, "fabs", x))
exp2 = _operation(F8, (F8,), _exp2)
total = _operation(_F4, (F8,), _total)
select = _operation(F8, (M8, F8, F8), lambda b, m, x, y: b.select(m, x, y))
both = _operation(M8, (M8, M8), lambda b, x, y: b.and_(x, y))
bits = _operation(_I8, (M8,), _bits)
"""The mask as a number: lane i is bit i."""

lowest_bit = _operation(_I8, (_I8,), lambda b, x: b.cttz(x, ir.Constant(_BIT, 1)))

for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):

    def _register(symbol: Any, name: str) -> None:
        run = _operation(F8, (F8, F8), lambda b, x, y: getattr(b, name)(x, y))

        @overload(symbol)
        def _(x, y):
            if x == F8 and y == F8:
                return lambda x, y: run(x, y)

    _register(_symbol, _name)

for _symbol, _sign in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">=")):

    def _register_comparison(symbol: Any, sign: str) -> None:
        run = _operation(M8, (F8, F8), lambda b, x, y: b.fcmp_ordered(sign, x, y))

        @overload(symbol)
        def _(x, y):
            if x == F8 and y == F8:
                return lambda x, y: run(x, y)

    _register_comparison(_symbol, _sign)


_ARRAY = types.Array(types.float32, 1, "C")


@intrinsic
def load(typingctx, array, index):
    """Eight floats of `array` from `index` on."""

    def codegen(context, builder, signature, values):
        return builder.load(_address(context, builder, *values), align=4)

    return F8(_ARRAY, types.int64), codegen


@intrinsic
def spread(typingctx, array, index):
    """Eight times the float of `array` at `index`, which is not negative."""

    def codegen(context, builder, signature, values):
        data = context.make_array(_ARRAY)(context, builder, values[0]).data
        return _splat(builder, builder.load(builder.gep(data, [values[1]], inbounds=True)))

    return F8(_ARRAY, types.int64), codegen


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of `array` at `index`, which may lie outside."""

    def codegen(context, builder, signature, values):
        data = context.make_array(_ARRAY)(context, builder, values[0]).data
        place = builder.bitcast(builder.gep(data, [values[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name=name)
        builder.call(function, [place, *(ir.Constant(_I32, x) for x in (0, 3, 1))])  # read, keep, data
        return context.get_dummy_value()

    return types.void(_ARRAY, types.int64), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write eight floats into `array` from `index` on."""

    def codegen(context, builder, signature, values):
        builder.store(values[2], _address(context, builder, *values[:2]), align=4)
        return context.get_dummy_value()

    return types.void(_ARRAY, types.int64, F8), codegen


def _address(context, builder, array, index):
    data = context.make_array(_ARRAY)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index], inbounds=True), _VECTOR.as_pointer())
