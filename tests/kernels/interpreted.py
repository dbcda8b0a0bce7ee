"""The kernels run in Triton's interpreter where there is no GPU; `tests/conftest.py` decides it before any import."""

from __future__ import annotations

import inspect

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _patch_the_language_once() -> None:
    """Keep the interpreter's patches of triton.language in place: it renews them at every call, most of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    class Kept:
        def restore(self) -> None:
            pass

    patch, done = interpreter._patch_lang, set()

    def patch_once(fn):
        found = {id(value) for value in fn.__globals__.values() if inspect.ismodule(value) and value in [tl, tl.core]}
        if not found <= done:
            patch(fn)
            done.update(found)
        return Kept()

    interpreter._patch_lang = patch_once


def _round_bfloat16_to_nearest() -> None:
    """Let the interpreter round float32 to bfloat16 as a GPU does; it truncates, which doubles the error."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        rounded = torch.tensor(source.data).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast


if DEVICE == "cpu":
    _patch_the_language_once()
    _round_bfloat16_to_nearest()
