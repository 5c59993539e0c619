"""Triton's interpreter, made exact: what the tests of its kernels run on where there is no GPU.

As it comes it computes bfloat16 on the raw bits, truncates float32 to bfloat16, multiplies as if
tf32 were float32, and rounds a multiply-add twice. `install` replaces these operations of its
builder. What bfloat16 still cannot do here (math functions, reductions, atomics) raises: kernels
widen it to float32 first.

`DEVICE` is where the kernels' tests put their tensors: a GPU where there is one, and there the same
tests run compiled; else the CPU, interpreted. Triton reads TRITON_INTERPRET when a kernel is
decorated, its own library's among them, so conftest.py sets it before anything imports Triton.
"""

from __future__ import annotations

import inspect
import os
import warnings
from typing import Any

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose() -> None:
    """Interpret where there is no GPU, whatever the environment says."""
    os.environ["TRITON_INTERPRET"] = "0" if DEVICE.type == "cuda" else "1"


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as the interpreter holds it (uint16), to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """To bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def tf32(values: np.ndarray) -> np.ndarray:
    """float32 with 10 bits of mantissa, to nearest."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 13) & 1) + np.uint32(0xFFF))) & np.uint32(0xFFFFE000)
    return np.where((bits & 0x7F800000) == 0x7F800000, bits, rounded).view(np.float32)


def product(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    """A float32 product as tensor cores form it, but for the order of its sums."""
    if precision == "IEEE":
        return np.matmul(a, b)
    high_a, high_b = tf32(a), tf32(b)
    if precision == "TF32":
        return np.matmul(high_a, high_b)
    if precision == "TF32x3":
        low_a, low_b = tf32(a - high_a), tf32(b - high_b)
        small = np.matmul(low_a, high_b) + np.matmul(high_a, low_b)
        # Triton leaves the correction out where it is NaN, as inf - inf makes it.
        return np.matmul(high_a, high_b) + np.where(np.isnan(small), 0, small)
    raise NotImplementedError(f"no kernel multiplies in {precision}")


def remember() -> None:
    """Make each type and each shape once: that is most of what the interpreter does for an
    operation, which is the same few thousands of times."""
    import triton.language as tl
    from triton.runtime import interpreter

    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, dict[str, Any]] = {}
    numbers: dict[Any, np.dtype] = {}
    in_numpy = interpreter._get_np_dtype

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [s.value if isinstance(s, tl.constexpr) else s for s in shape]
        key = (element_ty.name, *sizes)
        known = blocks.get(key)
        if known is None:
            make_block(self, element_ty, shape)
            blocks[key] = {k: v for k, v in vars(self).items() if k != "element_ty"}
            return
        self.element_ty = element_ty
        vars(self).update(known)

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        key = kind.name if kind.is_block() else ""
        known = tensors.get(key)
        if known is None:
            make_tensor(self, handle, kind)
            own = ("handle", "type", "dtype")
            tensors[key] = {k: v for k, v in vars(self).items() if k not in own}
            return
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        vars(self).update(known)

    def np_dtype(wanted: Any) -> np.dtype:
        known = numbers.get(wanted.name)
        if known is None:
            known = numbers[wanted.name] = in_numpy(wanted)
        return known

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
    interpreter._get_np_dtype = np_dtype
    semantic = type(interpreter.interpreter_semantic)
    to_one_shape = semantic.broadcast_impl_value

    def broadcast(self: Any, left: Any, right: Any) -> Any:
        a, b = left.type, right.type
        if a.is_block() and b.is_block() and [*a.shape] == [*b.shape]:
            return left, right
        return to_one_shape(self, left, right)

    def check_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
        """Triton forms every sum and product of integers a second time, in 64 bits, and looks at it
        in debug mode only. Here it is looked at, in one step; but for differences, of which one is
        meant to overflow (m & -m is the lowest bit of a mask)."""
        wide = {"add": np.add, "mul": np.multiply}.get(operation.__name__)
        if wide is None or left.type.scalar.int_bitwidth >= 64:
            return
        value = wide(left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
        bounds = np.iinfo(interpreter._get_np_dtype(left.type.scalar))
        if value.size and not (bounds.min <= value.min() and value.max() <= bounds.max):
            raise OverflowError(f"{left.type.scalar} overflows in a kernel's {operation.__name__}")

    meet, unwrap = semantic.binary_op_type_checking_impl, tl.core._unwrap_if_constexpr
    handle = interpreter.TensorHandle
    kept: dict[Any, Any] = {}

    def stretched(value: Any, wanted: Any) -> Any:
        if wanted is None:
            return value
        kind, shape = wanted
        data = np.broadcast_to(value.handle.data, shape)
        return tl.tensor(handle(data, value.handle.dtype), kind)

    def stretch(before: Any, after: Any) -> Any:
        """How a value becomes what Triton made of it: None where it stays. No cast is among it."""
        if before is after:
            return None
        if before.dtype.name != after.dtype.name:
            raise LookupError
        return after.type, tuple(after.handle.data.shape)

    def operands(self: Any, left: Any, right: Any, *rules: Any, **named: Any) -> Any:
        """What Triton makes of two operands, found once for each pair of types."""
        if type(left) is not tl.tensor or type(right) is not tl.tensor:
            number, block = (right, left) if type(left) is tl.tensor else (left, right)
            if type(number) not in (int, float) or type(block) is not tl.tensor or number != number:
                return meet(self, left, right, *rules, **named)
            key = (block.type.name, number is left, type(number), number, *rules, *named.items())
            known = kept.get(key)
            if known is None:
                pair = meet(self, left, right, *rules, **named)
                same, known = pair if block is left else pair[::-1]
                if same is block:
                    known.handle.data.flags.writeable = False
                    kept[key] = known
                return pair
            return (known, right) if number is left else (left, known)
        key = (left.type.name, right.type.name, *rules, *named.items())
        plan = kept.get(key)
        if plan:
            return stretched(left, plan[0]), stretched(right, plan[1])
        a, b = meet(self, left, right, *rules, **named)
        if plan is None:
            try:
                kept[key] = stretch(left, a), stretch(right, b)
            except LookupError:
                kept[key] = False
        return a, b

    as_they_are = (tl.tensor, int, float, type(None))

    def without_constexpr(value: Any) -> Any:
        return value if type(value) in as_they_are else unwrap(value)

    builtins: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        """Each launch replaces Triton's functions by those that interpret: which ones stays."""
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [(k, v) for k, v in members if tl.core.is_builtin(v)]
        for name, member in builtins[package]:
            if getattr(package, name) is member:
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
    semantic.binary_op_type_checking_impl = operands
    tl.core._unwrap_if_constexpr = without_constexpr
    semantic.broadcast_impl_value = broadcast
    semantic.binary_op_sanitize_overflow_impl = check_overflow


def install() -> None:
    """Replace the operations, once; Triton must be there and interpreting."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "exact", False):
        return
    remember()
    binary, cast, dot = builder.binary_op, builder.cast_impl, builder.create_dot
    unary, fused, convert = builder.unary_op, builder.create_fma, builder.create_fp_to_fp

    bfloat16 = tl.bfloat16.name

    def is_short(*values: Any) -> bool:
        for v in values:  # noqa: SIM110  # a generator would take as long as the operation
            if v.dtype.scalar.name == bfloat16:
                return True
        return False

    def plain(value: Any) -> np.ndarray:
        return widen(value.data) if is_short(value) else value.data

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not is_short(left, right):
            made = binary(self, left, right, op)
            # It names a comparison by its operands' type, which broadcasting then makes numbers of.
            return handle(made.data, tl.int1) if made.data.dtype == np.bool_ else made
        out = op(plain(left), plain(right))
        return handle(out if out.dtype == np.bool_ else narrow(out), tl.bfloat16)

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        kind = wanted.scalar
        if not is_short(source) and kind != tl.bfloat16:
            return cast(self, source, wanted)
        values = plain(source)
        if kind == tl.bfloat16:
            return handle(narrow(values.astype(np.float32)), kind)
        return handle(values.astype(interpreter._get_np_dtype(wanted)), kind)

    def create_fp_to_fp(self: Any, source: Any, wanted: Any, rounding: Any) -> Any:
        # Of float8 there is none here, and to nearest is the only rounding: casts do it.
        if rounding is not None and str(rounding).rpartition(".")[2] != "RTNE":
            return convert(self, source, wanted, rounding)
        return cast_impl(self, source, wanted)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        if a.data.dtype == np.float32 and b.data.dtype == np.float32:
            out = product(a.data, b.data, str(precision).rpartition(".")[2])
            return handle(out + acc.data, acc.dtype.scalar)
        if is_short(a, b):
            return handle(np.matmul(plain(a), plain(b)) + acc.data, acc.dtype.scalar)
        return dot(self, a, b, acc, precision, imprecise)

    def refuse(old: Any) -> Any:
        def call(self: Any, *args: Any) -> Any:
            if is_short(*(v for v in args if isinstance(v, handle))):
                raise NotImplementedError("bfloat16 must be widened to float32 first")
            return old(self, *args)

        return call

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if a.data.dtype != np.float32:
            return fused(self, a, b, c)
        # Rounded once: the product of two float32 fits a float64.
        out = a.data.astype(np.float64) * b.data + c.data
        return handle(out.astype(np.float32), c.dtype.scalar)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patched(tensor, scope)
        # Triton 3.6 makes a number of an array of one in a way that numpy 2.4 has taken out.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def check(self: Any, values: Any) -> None:
        if any(v.dtype.scalar == tl.bfloat16 for v in values):
            raise NotImplementedError("bfloat16 must be widened to float32 first")
        checked(self, values)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        # Every function of Triton's own library that a kernel calls would patch the language anew,
        # which takes most of the time: once for all of them is enough.
        scope = interpreter._patch_lang(tl.standard.zeros.fn)
        # What overflows or is NaN on a GPU is so without a word.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            try:
                run(self, *args, **kwargs)
            finally:
                scope.restore()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    run = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call
    reductions = interpreter.ReduceScanOpInterface
    checked = reductions.check_tensor
    reductions.check_tensor = check
    builder.binary_op, builder.cast_impl, builder.create_dot = binary_op, cast_impl, create_dot
    builder.create_fp_to_fp = create_fp_to_fp
    builder.unary_op, builder.create_fma = refuse(unary), refuse(create_fma)
    patched = interpreter._patch_lang_tensor
    interpreter._patch_lang_tensor = patch_tensor
    builder.exact = True
