"""Compares a native module's stub with the module: every name, every signature, in both directions.

It reads the stub as syntax and the module as it is at run time. What it cannot see is whether an annotation
is true: the module keeps no types. mypy and the tests are for that.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
STUBS = {
    "sapper._native": ROOT / "python/sapper/_native.pyi",
    "sapper_wasi._native": ROOT / "wasi/python/sapper_wasi/_native.pyi",
}

# What every class has, or what the binding gives for its own ends, and no stub needs to say.
SILENT_DUNDERS = {
    "__doc__",
    "__module__",
    "__new__",
    "__init__",
    "__dict__",
    "__weakref__",
    "__reduce__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__hash__",
    "__match_args__",
    "__text_signature__",
    "__repr__",
    "__str__",
    "__getattribute__",
}

# Those of Python and those of extension modules.
CLASS_METHODS = (classmethod, type(vars(dict)["fromkeys"]))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def literal(node: ast.expr) -> object:
    """The value of a default, or the ellipsis that stands for "some default"."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ...


def stub_parameters(function: Function) -> list[inspect.Parameter]:
    """What `inspect.signature` would give for a stub's function."""
    args = function.args
    result: list[inspect.Parameter] = []
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    defaults.extend(args.defaults)
    for index, (arg, default) in enumerate(zip(positional, defaults, strict=True)):
        only = index < len(args.posonlyargs)
        kind = inspect.Parameter.POSITIONAL_ONLY if only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        value = inspect.Parameter.empty if default is None else literal(default)
        result.append(inspect.Parameter(arg.arg, kind, default=value))
    if args.vararg:
        result.append(inspect.Parameter(args.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        value = inspect.Parameter.empty if default is None else literal(default)
        result.append(inspect.Parameter(arg.arg, inspect.Parameter.KEYWORD_ONLY, default=value))
    if args.kwarg:
        result.append(inspect.Parameter(args.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return result


def compare_parameters(where: str, stub: list[inspect.Parameter], built: object) -> list[str]:
    """The differences between a stub's parameters and those of a built callable."""
    try:
        parameters = list(inspect.signature(built).parameters.values())  # type: ignore[arg-type]
    except ValueError:
        return [f"{where}: the built one has no signature to compare"]
    stub = [p for p in stub if p.name not in ("self", "cls")]
    parameters = [p for p in parameters if p.name not in ("self", "cls", "$self")]
    if [(p.name, p.kind) for p in stub] != [(p.name, p.kind) for p in parameters]:
        return [f"{where}: the stub has {shape(stub)}, the module {shape(parameters)}"]
    problems = []
    for ours, theirs in zip(stub, parameters, strict=True):
        if ours.default is ... or theirs.default is ...:
            same = (ours.default is inspect.Parameter.empty) == (theirs.default is inspect.Parameter.empty)
        else:
            same = ours.default == theirs.default
        if not same:
            problems.append(f"{where}: {ours.name} defaults to {ours.default!r}, built {theirs.default!r}")
    return problems


def shape(parameters: list[inspect.Parameter]) -> str:
    """A signature to print; `inspect.Signature` refuses some orders that a broken stub may have."""
    return "(" + ", ".join(str(p) for p in parameters) + ")"


def decorators(function: Function) -> set[str]:
    """The names of a function's decorators, without what they are called with."""
    names = set()
    for node in function.decorator_list:
        target = node.func if isinstance(node, ast.Call) else node
        names.add(ast.unparse(target).rsplit(".", maxsplit=1)[-1])
    return names


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The names that a module's or a class's body in the stub defines; of overloads, the last."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            if isinstance(node, ast.FunctionDef) and "setter" in decorators(node):
                continue
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if ast.unparse(node.annotation).endswith("TypeAlias"):
                continue
            found[node.target.id] = node
    return found


def compare_class(node: ast.ClassDef, built: type) -> list[str]:
    """The differences between a class of the stub and the built one."""
    problems: list[str] = []
    stub = members(node.body)
    own = dict(vars(built))
    own = {n: v for n, v in own.items() if not n.startswith("_") or (n.startswith("__") and n.endswith("__"))}
    for name in sorted(own.keys() - stub.keys() - SILENT_DUNDERS):
        problems.append(f"{node.name}.{name}: built, but not in the stub")
    for name, entry in stub.items():
        where = f"{node.name}.{name}"
        if name in ("__new__", "__init__") and isinstance(entry, Function):
            problems += compare_parameters(f"{node.name}()", stub_parameters(entry), built)
            continue
        if name not in own and not (name.startswith("__") and hasattr(built, name)):
            problems.append(f"{where}: in the stub, but not built")
            continue
        value = own.get(name)
        if isinstance(entry, Function):
            marks = decorators(entry)
            is_property = inspect.isdatadescriptor(value)
            if ("property" in marks) != is_property:
                problems.append(f"{where}: {'a property' if is_property else 'no property'} in the module")
            elif ("staticmethod" in marks) != isinstance(value, staticmethod):
                problems.append(f"{where}: only one of the two is a static method")
            elif ("classmethod" in marks) != isinstance(value, CLASS_METHODS):
                problems.append(f"{where}: only one of the two is a class method")
            elif not is_property and not name.startswith("__"):
                problems += compare_parameters(where, stub_parameters(entry), getattr(built, name))
    return problems


def only_a_type(node: ast.ClassDef) -> bool:
    """Whether a class of the stub is there for annotations alone."""
    return any(ast.unparse(base).endswith(("TypedDict", "Protocol")) for base in node.bases)


def compare(stub: ast.Module, built: ModuleType) -> list[str]:
    """Every difference, in the order of the stub."""
    problems: list[str] = []
    names = members(stub.body)
    public = {name for name in vars(built) if not (name.startswith("__") and name.endswith("__"))}
    for name in sorted(public - names.keys()):
        problems.append(f"{name}: built, but not in the stub")
    for name, node in names.items():
        if name not in public:
            if name.startswith("__") or (isinstance(node, ast.ClassDef) and only_a_type(node)):
                continue
            problems.append(f"{name}: in the stub, but not built")
            continue
        value = getattr(built, name)
        if isinstance(node, ast.ClassDef):
            if not isinstance(value, type):
                problems.append(f"{name}: a class in the stub, {type(value).__name__} in the module")
            else:
                problems += compare_class(node, value)
        elif isinstance(node, Function):
            problems += compare_parameters(name, stub_parameters(node), value)
    return problems


def main() -> int:
    """Prints the differences of the module that is named (sapper's without a name); 1 when there are any."""
    name = sys.argv[1] if len(sys.argv) > 1 else "sapper._native"
    problems = compare(ast.parse(STUBS[name].read_text()), importlib.import_module(name))
    for problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
