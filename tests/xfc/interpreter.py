"""Triton kernels on this machine: compiled where there is a GPU, interpreted elsewhere."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_kernels() -> ModuleType:
    """`renee_ray.xfc.kernels.gpu`; skips the module that asks, if triton is missing."""
    pytest.importorskip("triton", reason="needs triton, which CPU builds of torch lack")
    from renee_ray.xfc.kernels import gpu

    if DEVICE.type == "cpu":
        _mend_bf16()
        _patch_once()
    return gpu


def _mend_bf16() -> None:
    """As GPUs do: the interpreter multiplies the bits of bf16 as integers, and truncates to it."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return multiply(self, a, b, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        nearest = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(nearest, target.scalar)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _patch_once() -> None:
    """Halves the interpreter's time: each call inside a kernel would patch triton anew.

    A kernel patches `triton.language`. What it calls patches `triton.language.core`, for good.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
