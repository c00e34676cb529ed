"""Rules that the code keeps, each a function of a file's name and text: it returns what breaks them.

A finding is a sentence with "file:line" in front. tests/test_contracts.py applies the rules.
"""

import argparse
import ast
import sys

import pytest

NAMESPACES = {"args", "flags"}  # what the parsed command line may be called
PARSERS = ("parse_args", "parse_known_args", "finish")  # what returns it
MUTATORS = {"update", "pop", "popitem", "setdefault", "clear", "__setitem__", "__delitem__"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def last_name(node):
    """The last name of an expression: `c` of a.b.c, `f` of f(x); None of others."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return getattr(node, "attr", getattr(node, "id", None))


def at(name, node, sentence):
    return f"{name}:{node.lineno}: {sentence}"


def fmt_off_regions(text):
    """[(first line, last line)] between `# fmt: off` and `# fmt: on`."""
    regions, start = [], None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() == "# fmt: off":
            start = number
        elif line.strip() == "# fmt: on" and start:
            regions.append((start, number))
            start = None
    return regions


# ---------------------------------------------------------------- sizes


def is_table_of_flags(function, regions):
    """Tell whether a function declares one group of flags between `# fmt: off` and `# fmt: on`."""
    if not any(first < function.lineno and function.end_lineno < last for first, last in regions):
        return False
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return sum(last_name(call) == "add_argument_group" for call in calls) == 1


def long_functions(name, text, limit=40):
    """Functions of more lines than `limit`, decorators included; tables of flags aside."""
    found, regions = [], fmt_off_regions(text)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, FUNCTIONS) or is_table_of_flags(node, regions):
            continue
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        lines = node.end_lineno - first + 1
        if lines > limit:
            found.append(at(name, node, f"{node.name} has {lines} lines, {limit} are the limit"))
    return found


def tall_flags(name, text):
    """Flags of a table that take more than two lines."""
    found, regions = [], fmt_off_regions(text)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or last_name(node) not in ("add", "add_switch"):
            continue
        inside = any(first < node.lineno < last for first, last in regions)
        if inside and node.end_lineno - node.lineno > 1:
            found.append(at(name, node, "a flag takes one or two lines"))
    return found


def long_lines(name, text, limit=100):
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > limit:
            found.append(f"{name}:{number}: {len(line)} columns, {limit} are the limit")
    return found


def too_tall(name, text, limit=400):
    lines = len(text.splitlines())
    return [f"{name}:{lines}: a room has at most {limit} lines"] if lines > limit else []


def unpacked_generators(name, text):
    """Assignments that unpack a generator into names."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.GeneratorExp):
            continue
        if any(isinstance(target, ast.Tuple | ast.List) for target in node.targets):
            found.append(at(name, node, "a generator is unpacked into names"))
    return found


# ---------------------------------------------------------------- arrows


def imports_of(text, module_level=False):
    """[(line, module)] in the order of the file; `from parts import rows` is parts.rows."""
    tree = ast.parse(text)
    found = []
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module == "parts" or node.level):
            found += [(node.lineno, f"parts.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module))
    return sorted(found, key=lambda entry: entry[0])


def belongs(module, packages):
    """Tell whether a module is one of `packages`, or in one: torch.nn in torch."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def forbidden_imports(name, text, packages, reason):
    """Imports of `packages`, those inside of functions included."""
    found = []
    for line, module in imports_of(text):
        if belongs(module, packages):
            found.append(f"{name}:{line}: imports {module}, but {reason}")
    return found


def circles(texts):
    """Circles of imports among {module: text}, imports inside of functions included."""
    arrows = {}
    for module, text in texts.items():
        arrows[module] = {other for _, other in imports_of(text) if other in texts}
    found = []

    def follow(path):
        for other in sorted(arrows[path[-1]]):
            if other == path[0]:
                found.append(" -> ".join([*path, other]))
            elif other not in path and other > path[0]:  # a circle is found from its first room
                follow([*path, other])

    for module in sorted(arrows):
        follow([module])
    return found


def first_reached(module, texts):
    """What importing a module reaches first, utils or a third party's package: (name, line).

    merge.py is neither: it stands alone, and quiets by itself what it imports.
    """
    for line, other in imports_of(texts[module], module_level=True):
        if other == "utils":
            return other, line
        if other in texts:
            reached = first_reached(other, texts)
            if reached:
                return reached[0], line
        elif other.split(".")[0] not in {*sys.stdlib_module_names, "merge"}:
            return other, line
    return None


def unquieted(texts):
    """Rooms of {module: text} that import a third party's package before utils quiets it."""
    found = []
    for module in texts:
        reached = first_reached(module, texts)
        if reached and reached[0] != "utils":
            found.append(f"{module}:{reached[1]}: imports {reached[0]} before utils")
    return found


# ---------------------------------------------------------------- the parsed command line


def assigned_from(scope, is_source):
    """Names that a scope binds to what `is_source` accepts, in a tuple or alone."""
    found = set()
    for node in ast.walk(scope):
        if isinstance(node, ast.NamedExpr):
            targets, value = [node.target], node.value
        elif isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        else:
            continue
        for target in targets:
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=False))
            for one, source in pairs:
                if isinstance(one, ast.Name) and is_source(source):
                    found.add(one.id)
    return found


class Writes:
    """Finds what one function, or a module outside of functions, writes into the namespace."""

    def __init__(self, scope, names=NAMESPACES):
        self.scope, self.names = scope, set(names)
        while more := assigned_from(scope, self.is_namespace) - self.names:  # other = args
            self.names |= more
        self.dicts = assigned_from(scope, self.is_dict)

    def is_namespace(self, node):
        if isinstance(node, ast.Call):
            return last_name(node) in PARSERS
        if isinstance(node, ast.Attribute):  # self.args and trainer.args are Trainer's own
            owned = node.attr == "args" and last_name(node.value) in ("self", "trainer")
            return node.attr in NAMESPACES and not owned
        return isinstance(node, ast.Name) and node.id in self.names

    def is_dict(self, node):
        """Tell whether an expression is the dict behind a namespace: vars(args), args.__dict__."""
        if isinstance(node, ast.Attribute):
            return node.attr == "__dict__" and self.is_namespace(node.value)
        if isinstance(node, ast.Name):
            return node.id in getattr(self, "dicts", ())
        called = isinstance(node, ast.Call) and last_name(node) == "vars"
        return called and any(map(self.is_namespace, node.args))

    def found(self):
        for node in ast.walk(self.scope):
            if isinstance(node, ast.Call):
                writes = self.call_writes(node)
            elif isinstance(node, ast.AugAssign):
                writes = self.is_namespace(node.target) or self.is_dict(node.target)
            else:
                writes = self.stores(node)
            if writes:
                yield node

    def stores(self, node):
        if not isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            return False
        if isinstance(node, ast.Attribute):
            return self.is_namespace(node.value)
        return isinstance(node, ast.Subscript) and self.is_dict(node.value)

    def call_writes(self, node):
        name, owner = last_name(node), getattr(node.func, "value", None)
        if name in ("setattr", "delattr", "__setattr__", "__delattr__"):
            return any(map(self.is_namespace, [owner, *node.args[:1]]))
        return name in MUTATORS and owner is not None and self.is_dict(owner)


def is_child_of(node, kind):
    """Tell whether a class is a child of a class whose name ends in `kind`."""
    return any((last_name(base) or "").endswith(kind) for base in node.bases)


def scopes_of(tree):
    """[(scope, what the command line may be called in it)]: functions, classes, what is neither.

    In the on_* methods of a callback `args` are Trainer's own, which calls them.
    """
    scopes, others = [], []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and is_child_of(node, "Callback"):
            methods = [each for each in node.body if getattr(each, "name", "").startswith("on_")]
            scopes += [(method, NAMESPACES - {"args"}) for method in methods]
            node.body = [each for each in node.body if each not in methods]
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            scopes.append((node, NAMESPACES))
        else:
            others.append(node)
    return [*scopes, (ast.Module(others, []), NAMESPACES)]


def namespace_writes(name, text, exempt=("parse_args",)):
    """Writes into the parsed command line, outside of functions called as in `exempt`."""
    tree = ast.parse(text)
    for node in ast.walk(tree):  # emptied, so that the rest can be walked as it is
        if isinstance(node, FUNCTIONS) and node.name in exempt:
            node.body, node.args.defaults, node.decorator_list = [ast.Pass()], [], []
    found = []
    for scope, names in scopes_of(tree):
        for node in Writes(scope, names).found():
            found.append(at(name, node, "writes into the parsed command line"))
    return found


class Holders(ast.NodeVisitor):
    """Finds parameters, attributes and, if asked for, variables that are called args or flags.

    What is Trainer's is left aside, and nothing else is: `*args`; the parameter `args` of a
    callback's on_* methods; reading self.args in a child of Trainer, and trainer.args; handing
    args= to a Trainer, or a tuple of arguments to a thread.
    """

    def __init__(self, name, exempt, variables):
        self.name, self.exempt, self.variables = name, exempt, variables
        self.found, self.classes, self.allowed = [], [], [set()]

    def add(self, node, what):
        self.found.append(at(self.name, node, f"{what} holds, or is called as, the command line"))

    def is_in_child_of(self, kind):
        return bool(self.classes) and is_child_of(self.classes[-1], kind)

    def visit_ClassDef(self, node):
        self.classes.append(node)
        self.generic_visit(node)
        self.classes.pop()

    def visit_FunctionDef(self, node):
        if node.name in self.exempt:
            return
        spec = node.args
        own = {spec.vararg.arg} & {"args"} if spec.vararg else set()
        if node.name.startswith("on_") and self.is_in_child_of("Callback"):
            own.add("args")
        self.visit_parameters(node, own)
        self.allowed.append(own | self.allowed[-1])
        self.generic_visit(node)
        self.allowed.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node):
        self.visit_parameters(node, set())
        self.generic_visit(node)

    def visit_parameters(self, node, own):
        spec = node.args
        named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
        named += [each for each in (spec.vararg, spec.kwarg) if each]
        for parameter in named:
            if (
                parameter.arg in NAMESPACES - own
                or parameter is spec.kwarg
                and parameter.arg in own
            ):
                self.add(parameter, f"parameter {parameter.arg}")

    def visit_Name(self, node):
        in_class = self.classes and node in [
            getattr(statement, "target", None) for statement in self.classes[-1].body
        ]  # a dataclass' field is an attribute
        if node.id not in NAMESPACES - self.allowed[-1]:
            return
        if self.variables or in_class:
            self.add(node, f"variable {node.id}")

    def visit_Attribute(self, node):
        if node.attr in NAMESPACES and not self.is_trainers(node):
            self.add(node, f"attribute {node.attr}")
        self.generic_visit(node)

    def is_trainers(self, node):
        """Tell whether an attribute is the TrainingArguments of a Trainer, and is only read."""
        if node.attr != "args" or not isinstance(node.ctx, ast.Load):
            return False
        owner = last_name(node.value)
        return owner == "trainer" or owner == "self" and self.is_in_child_of("Trainer")

    def visit_Call(self, node):
        called = last_name(node.func) or ""
        trains = called.endswith("Trainer") or called in ("trainer_class", "__init__")
        for keyword in node.keywords:
            if keyword.arg == "args" and not trains and not isinstance(keyword.value, ast.Tuple):
                self.add(keyword.value, "keyword args")
        if called in ("setattr", "getattr", "hasattr", "delattr"):
            for value in node.args[1:2]:
                if getattr(value, "value", None) in NAMESPACES:
                    self.add(value, f"attribute {value.value}")
        self.generic_visit(node)


def namespace_holders(name, text, exempt=(), variables=True):
    """Parameters, attributes and variables called args or flags, functions in `exempt` aside."""
    visitor = Holders(name, exempt, variables)
    visitor.visit(ast.parse(text))
    return visitor.found


def flags_read(text):
    """Names that are read as attributes of `args`, or named in a call that is given `args`.

    The latter is getattr(args, "name"), or a function's that does that. `args.lr = args.lr or 2e-4`
    reads nothing: it fills in a default that somebody else must read.
    """
    tree, filled, found = ast.parse(text), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            own = node.targets[0].attr
            reads = [each for each in ast.walk(node.value) if getattr(each, "attr", None) == own]
            filled |= set(map(id, reads))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if last_name(node.value) == "args" and id(node) not in filled:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and "args" in map(last_name, node.args):
            found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return found


def parser_of(module):
    """Return the parser that a script's parse_args makes."""

    class Caught(Exception):
        pass

    def catch(parser, *_):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        module.parse_args([])
    return caught.value.args[0]


def options_of(module):
    """Return the options that a script declares: [argparse.Action], without --help."""
    return [each for each in parser_of(module)._actions if each.dest != "help"]
