"""Defining an operator once for every backend.

An operator ``name`` becomes one overload per backend, ``sanm_kernels::name.reference``,
``sanm_kernels::name.cpu`` and so on, all with one schema, one fake and one autograd formula. The
reference overload runs plain torch on any device; the others get their kernels from a compiled
library or from Triton when their backend is loaded. Which overload a call uses is the registry's
choice (`sanm_kernels.backends`), made once, above the dispatcher: a compiled graph names it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sanm_kernels.ops import internals

NAMESPACE = "sanm_kernels"
BACKENDS = ("reference", "cpu", "triton", "cuda")

library = torch.library.Library(NAMESPACE, "DEF")
operators: dict[str, str] = {}  # name → schema, in order of definition
value_checks: dict[str, Callable[..., None]] = {}  # name → what `define` was given as `check`
#: (name, backend) → the differentiable operator for calls that are not traced, outside of
#: torch.func's transforms and inside of them.
functions: dict[tuple[str, str], Callable[..., Any]] = {}
transformable: dict[tuple[str, str], Callable[..., Any]] = {}


def overload_of(name: str, backend: str) -> Any:
    """The operator as `backend` has it."""
    return getattr(getattr(torch.ops.sanm_kernels, name), backend)


class Overloads:
    """The operators of one backend as attributes; handed to every backward formula."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        # Looked up once: a kernel that is loaded later is the dispatcher's, not the overload's.
        self.__dict__[name] = found = overload_of(name, self.backend)
        return found


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    wrt: tuple[int, ...] = (0,),
    results: int | None = None,
    check: Callable[..., None] | None = None,
) -> None:
    """Define operator `name` with `schema` ("(Tensor a, …) -> Tensor") on every backend.

    Args:
        reference: the plain-torch implementation; takes the schema's arguments.
        fake: the same arguments, returns empty outputs of the right shape, dtype and strides.
        setup_context, backward: as for `torch.library.register_autograd`, but `backward` is called
            as ``backward(ops, ctx, *grads)`` where ``ops.other_name`` is an operator of the backend
            that ran forward. An operator without `backward` refuses to be differentiated.
        wrt: the places of the arguments that it can be differentiated in, a list of tensors or
            tensors.
        results: how many of its outputs a call for which a gradient is recorded may be asked for,
            all by default; what comes after them is for `backward` alone.
        check: takes the schema's arguments and raises ValueError where their values are wrong and
            are to be checked; called for backends whose kernels cannot report it.
    """
    operators[name] = schema
    for function in (reference, fake, *([check] if check else [])):
        check_order(name, schema, function)
    if check is not None:
        value_checks[name] = check
    for backend in BACKENDS:
        overload = f"{name}.{backend}"
        qualified = f"{NAMESPACE}::{overload}"
        library.define(overload + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, fake, lib=library)
        if backward is not None and setup_context is not None:
            ops = Overloads(backend)
            formula = differentiable_once(name, functools.partial(backward, ops))
            torch.library.register_autograd(
                qualified, formula, setup_context=setup_context, lib=library
            )
            has_list = schema.startswith("(Tensor[]")
            functions[name, backend] = differentiable(
                ops, name, setup_context, backward, formula, wrt, results, has_list
            )
            transformable[name, backend] = transformed(ops, name, setup_context, formula, has_list)
    library.impl(f"{name}.reference", without_autocast(reference), "CompositeExplicitAutograd")


def arguments_of(schema: str) -> list[str]:
    """The names of its arguments, those that are written to without their trailing underscore."""
    return re.findall(r"[\w\])?]+ (\w+?)_?[,)]", schema.partition(" -> ")[0])


def check_order(name: str, schema: str, function: Callable[..., Any]) -> None:
    """Raise TypeError where `function` does not take the schema's arguments in their order.

    It may have ``*rest`` in the place of later ones, and parameters of its own with a default.
    """
    wanted = arguments_of(schema)
    parameters = inspect.signature(function).parameters.values()
    own = [p.name.rstrip("_") for p in parameters if p.default is p.empty]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        own = [*own[:-1], *wanted[len(own) - 1 :]]
    if own != wanted:
        raise TypeError(f"{name}: {function} takes {own}, the schema has {wanted}")


class _Refuse(torch.autograd.Function):
    """`result`, which depends on `reasons` in a way that is not known: its gradient is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, result: Tensor, *reasons: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"sanm_kernels.{ctx.name} can be differentiated once, not twice")


def differentiable_once(name: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    """`formula`, whose results raise when they are differentiated in turn.

    Kernels of backward have no derivative, which torch would take for 0. Its own
    `once_differentiable` does not refuse where the upstream gradient is a constant.
    """

    def backward(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():  # without create_graph
            return formula(ctx, *grads)
        reasons = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        with torch.no_grad():
            results = formula(ctx, *grads)

        def refuse(x: Any) -> Any:
            if isinstance(x, list):
                return [refuse(item) for item in x]
            if x is None:
                return None
            return _Refuse.apply(name, x, *reasons)  # type: ignore[no-untyped-call]

        return tuple(map(refuse, results)) if isinstance(results, tuple) else refuse(results)

    return backward


def differentiable(
    ops: Overloads,
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    formula: Callable[..., Any],
    wrt: tuple[int, ...],
    results: int | None,
    has_list: bool,
) -> Callable[..., Any]:
    """What torch.library makes of the formulas, without its layers in Python.

    They take as long as a small kernel: on small tensors a call with its backward takes 1.4 to 1.8
    times the CPU time through torch.library (`masked_loss` 151 µs for 96), and through what
    `transformed` makes as well. Traced calls keep torch's path, which costs nothing at run time.

    To autograd all arguments are one, which it does not look into, and those at `wrt` come after
    it. `formula` is `backward` for gradients that are to be differentiated.
    """
    overload = getattr(ops, name)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, arguments: tuple[Any, ...], *_: Tensor | None) -> Any:
            with internals.below_autograd():
                output = overload(*arguments)
            ctx.wrt = wrt
            setup_context(ctx, arguments, output)
            return output if results is None else output[:results]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:  # compiled autograd takes only a function
            if torch.is_grad_enabled():
                gradients = formula(ctx, *grads)
            else:
                gradients = backward(ops, ctx, *grads)
            if has_list:
                return None, *gradients[0]
            return None, *[gradients[place] for place in wrt]

    Operator.__name__ = Operator.__qualname__ = name
    apply: Callable[..., Any] = Operator.apply

    def call(*arguments: Any) -> Any:
        leaves = arguments[0] if has_list else [arguments[place] for place in wrt]
        for x in leaves:
            if x is not None and x.requires_grad:
                return apply(arguments, *leaves)
        with internals.below_autograd():
            return overload(*arguments)

    return call


def needed(ctx: Any) -> list[int]:
    """The places of the arguments to be differentiated, of an operator without a list."""
    wrt = getattr(ctx, "wrt", None)
    flags = ctx.needs_input_grad if wrt is None else ctx.needs_input_grad[1:]
    return [place for place, flag in zip(wrt or range(len(flags)), flags, strict=True) if flag]


def transformed(
    ops: Overloads,
    name: str,
    setup_context: Callable[..., None],
    formula: Callable[..., Any],
    has_list: bool,
) -> Callable[..., Any]:
    """The operator for torch.func: reverse mode and vmap work, forward mode raises.

    What `differentiable` makes is faster, but not for transforms; what torch.library makes has a
    derivative of 0 in forward mode. `has_list`: the first argument is a list of tensors, which
    autograd gets one by one, after their number.
    """

    def pack(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not has_list:
            return arguments
        end = 1 + arguments[0]
        return (list(arguments[1:end]), *arguments[end:])

    class Operator(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return getattr(ops, name)(*pack(arguments))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, pack(inputs), output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            gradients = formula(ctx, *grads)
            if not has_list:
                return gradients
            return None, *gradients[0], *gradients[1:]

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise_forward_mode(name)

    Operator.__name__ = Operator.__qualname__ = name

    apply: Callable[..., Any] = Operator.apply
    return (lambda first, *rest: apply(len(first), *first, *rest)) if has_list else apply


def raise_forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(
        f"sanm_kernels.{name} has no forward-mode derivative (jvp, jacfwd, forward_ad): use "
        "reverse mode (backward, torch.func.grad, vjp or jacrev)"
    )


def tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    """Those among an operator's arguments, lists of them included."""
    for argument in arguments:
        for x in argument if isinstance(argument, list) else (argument,):
            if isinstance(x, Tensor):
                yield x


def without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference picks its own precision: autocast must not lower its matrix products'."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        kind = next(x.device.type for x in tensors(args))
        if not torch.is_autocast_enabled(kind):
            return reference(*args)
        with torch.autocast(kind, enabled=False):
            return reference(*args)

    return run
