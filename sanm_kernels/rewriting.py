"""A criterion's own call, without the statements that compute its losses."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

Losses = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

#: What an expression that is left out may be made of: it changes nothing.
_PURE = (
    ast.Name, ast.Attribute, ast.Call, ast.keyword, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Tuple,
    ast.Subscript, ast.Slice, ast.operator, ast.unaryop, ast.expr_context,
)  # fmt: skip
_GIVEN = "_sanm_kernels_losses"


def with_losses(function: Any, losses: Losses) -> Any:
    """`function` (self, four tensors, more), whose first two results `losses` gives, if it can be.

    Statements that only those two need are left out, if they do no more than call torch's functions
    and tensors' methods on the tensors. The rest is compiled anew, with the same names, cells and
    defaults. None if the source is not there, is not that of the function, says more than
    assignments and a return, or computes the other results from the tensors.
    """
    tree = _tree(function)
    if tree is None or tree.decorator_list or tree.args.vararg or tree.args.kwarg:
        return None
    *body, last = tree.body
    if not isinstance(last, ast.Return) or not isinstance(last.value, ast.Tuple):
        return None
    code = function.__code__
    arguments = [x.arg for x in (*tree.args.posonlyargs, *tree.args.args)]
    tensors = arguments[1:5]
    left_out, kept = list(last.value.elts[:2]), [ast.Return(last.value)]
    needed = _names(*last.value.elts[2:])
    for statement in reversed(body):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # its docstring
        if not isinstance(statement, ast.Assign):
            return None
        assigned = {x.id for x in statement.targets if isinstance(x, ast.Name)}
        if len(assigned) != len(statement.targets):
            return None
        if assigned & needed:
            kept.insert(0, statement)  # type: ignore[arg-type]
            needed |= _names(statement.value)
        else:
            left_out.append(statement.value)
    made = set(code.co_varnames) - needed - set(arguments)
    modules = {k for k, x in function.__globals__.items() if isinstance(x, ModuleType)
               and x.__name__.partition(".")[0] == "torch"} - set(code.co_varnames)  # fmt: skip
    if needed & set(tensors) or not all(_pure(x, {*tensors, *made}, modules) for x in left_out):
        return None
    call = ast.parse(f"(*{_GIVEN}({', '.join(tensors)}),)", mode="eval").body
    assert isinstance(call, ast.Tuple)
    last.value.elts = call.elts + last.value.elts[2:]
    tree.body = kept  # type: ignore[assignment]
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    new = _compiled(tree, (*cells, _GIVEN))
    cells[_GIVEN] = (lambda: losses).__closure__[0]  # type: ignore[index]
    closure = tuple(cells[name] for name in new.co_freevars)
    result = FunctionType(new, function.__globals__, code.co_name, function.__defaults__, closure)
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def _tree(function: Any) -> ast.FunctionDef | None:
    """The definition of `function`, if its file still has the one that was compiled."""
    code = function.__code__
    try:
        text = "".join(inspect.findsource(code)[0])
        found = [compile(text, code.co_filename, "exec", dont_inherit=True)]
    except (OSError, SyntaxError, ValueError):
        return None
    for outer in found:  # which grows
        found += filter(inspect.iscode, outer.co_consts)
    if not any(_key(x) == _key(code) for x in found):
        return None
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.lineno == code.co_firstlineno:
            return node
    return None


def _key(code: CodeType) -> tuple[Any, ...]:
    return code.co_firstlineno, code.co_name, code.co_code, code.co_names, code.co_consts


def _compiled(tree: ast.FunctionDef, cells: tuple[str, ...]) -> CodeType:
    """The code of the function, inside one whose arguments are its cells."""
    outer = ast.parse(f"def outer({', '.join(cells)}): pass")
    outer.body[0].body = [tree]  # type: ignore[attr-defined]
    code = compile(ast.fix_missing_locations(outer), "<sanm_kernels>", "exec", dont_inherit=True)
    for _ in range(2):
        code = next(filter(inspect.iscode, code.co_consts))
    return code


def _names(*nodes: ast.AST) -> set[str]:
    return {x.id for node in nodes for x in ast.walk(node) if isinstance(x, ast.Name)}


def _pure(expression: ast.expr, tensors: set[str], modules: set[str]) -> bool:
    """Whether it does nothing but call torch's functions, and tensors' methods, with tensors."""
    for node in ast.walk(expression):
        if not isinstance(node, _PURE):
            return False
        if isinstance(node, ast.Name) and node.id not in tensors | modules:
            return False
        if isinstance(node, ast.Attribute) and node.attr.endswith("_"):
            return False  # changes a tensor
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return False
    return True
