"""Run by the Python of a project's .venv, in the project's folder:

    python -I -c pack.py FOLDER ENTRY

Copies what requirements.txt names, with what that needs, from .venv into
FOLDER/lib/site-packages, without machine code, and writes the module ENTRY
beside it. Prints a JSON object: native wheels, and warnings about the sources.
"""

import ast
import json
import os
import pathlib
import re
import shutil
import sys
from importlib import metadata

from pip._vendor.packaging.requirements import InvalidRequirement, Requirement

MACHINE_CODE = (".so", ".pyd", ".dylib", ".dll")
# Builds the component, and is no part of it.
TOOL = "componentize-py"
NOT_SOURCES = {"dist", "target", "node_modules", "venv", "__pycache__", "wit"}
# What gives another value each time; at the top level of a module, the build's.
CHANGING = {
    "uuid1", "uuid4", "uuid6", "uuid7", "token_hex", "token_bytes", "token_urlsafe", "urandom", "randbytes",
    "time.time", "time.time_ns", "time.monotonic", "datetime.now", "datetime.utcnow", "datetime.today",
    "datetime.datetime.now", "datetime.datetime.utcnow", "date.today", "datetime.date.today", "random.random",
    "random.randint", "random.randrange", "random.choice", "random.choices", "random.sample", "random.shuffle",
    "random.uniform", "random.getrandbits",
}
FILES = {"open", "io.open", "os.open", "read_text", "read_bytes"}


def fail(text):
    print(text)
    sys.exit(1)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(path):
    """The requirements of a file, those of the files that it includes too."""
    for line in path.read_text().replace("\\\n", "").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        included = re.match(r"(?:-r|--requirement)[ =]*(.+)", line)
        if included:
            yield from requirements(path.parent / included.group(1).strip())
        elif line and not line.startswith("-"):
            text = re.split(r"\s--", line)[0].strip()
            try:
                yield Requirement(text)
            except InvalidRequirement:
                yield text


def installed():
    return {canonical(d.metadata["Name"]): d for d in metadata.distributions() if d.metadata["Name"]}


def from_place(text, everything):
    """The distribution that was installed from a path or an address."""
    for name, distribution in everything.items():
        address = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
        if address and (text in address or pathlib.Path(text.split("[")[0]).resolve().as_uri() == address):
            return name
    fail(f"requirements.txt: {text} is not a package of .venv by its name; write NAME @ {text}")


def closure(wanted, everything):
    """Names of all that is required, by what is required first."""
    queue, found = list(wanted), {}
    while queue:
        requirement, extra = queue.pop()
        if isinstance(requirement, str):
            requirement = Requirement(from_place(requirement, everything))
        name = canonical(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        # Otherwise componentize-py's own needs would be taken for the project's.
        if name == TOOL:
            continue
        if name not in everything:
            fail(f"requirements.txt needs {requirement.name}, which .venv lacks; remove .venv and build again")
        for extra in {"", *requirement.extras}:
            if (name, extra) not in found:
                found[name, extra] = True
                queue.extend((Requirement(text), extra) for text in everything[name].requires or [])
    return sorted({name for name, _ in found})


def copy(distribution, target):
    """Copies a distribution's files; returns those of machine code."""
    native = []
    if distribution.files is None:
        fail(f"{distribution.metadata['Name']}: .venv does not say which files it has; remove .venv and build again")
    for file in distribution.files:
        if ".." in file.parts or "__pycache__" in file.parts or file.suffix == ".pth":
            continue
        if file.name.endswith(MACHINE_CODE) or ".so." in file.name:
            native.append(str(file))
            continue
        source = distribution.locate_file(file)
        if os.path.isfile(source):
            to = target / file
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)
    return native


def sources(folder):
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in NOT_SOURCES:
            continue
        if path.is_dir():
            yield from sources(path)
        elif path.suffix == ".py" and not path.name.startswith("test_") and path.name != "conftest.py":
            yield path


def dotted(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


class Source(ast.NodeVisitor):
    """What of a file runs at the build, and what in a call."""

    def __init__(self, name, package):
        self.name, self.package, self.depth = name, package, 0
        self.lazy, self.warnings = [], []

    def inside(self, node):
        for decorator in getattr(node, "decorator_list", []):
            self.visit(decorator)
        self.depth += 1
        for child in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(child)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = inside

    def visit_Import(self, node):
        if self.depth:
            self.lazy.extend(alias.name for alias in node.names)

    def visit_ImportFrom(self, node):
        if self.depth:
            base = node.module or ""
            if node.level:
                parents = self.package[: len(self.package) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            if base:
                self.lazy.extend([base, *(f"{base}.{alias.name}" for alias in node.names if alias.name != "*")])

    def visit_If(self, node):
        # `if __name__ == "__main__":` runs neither at the build nor in a call.
        if not (isinstance(node.test, ast.Compare) and dotted(node.test.left) == "__name__"):
            self.generic_visit(node)

    def visit_Call(self, node):
        called = dotted(node.func)
        last = called.rsplit(".", 1)[-1]
        if not self.depth and (called in CHANGING or last in CHANGING):
            self.warn(node, f"calls {called}() when the module is imported, which is once, at the build: every call of "
                            "the service finds that value; call it in a function")
        elif not self.depth and called == "random.seed" and node.args:
            self.warn(node, "gives random a seed when the module is imported: every call of the service draws the same "
                            "numbers; leave it out unless that is meant")
        elif self.depth and (called in FILES or last in ("read_text", "read_bytes")):
            self.warn(node, f"{called}() in a function finds no file when the service runs; read it at the top level of "
                            "the module, which runs at the build")
        elif self.depth and last == "import_module" and not (node.args and isinstance(node.args[0], ast.Constant)):
            self.warn(node, f"{called}() in a function finds only modules that were imported at the build; import them "
                            "at the top level too")
        elif self.depth and last in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
            self.lazy.append(str(node.args[0].value))
        self.generic_visit(node)

    def warn(self, node, text):
        self.warnings.append(f"{self.name}:{node.lineno} {text}")


def read(path, root):
    relative = path.relative_to(root)
    parts = list(relative.with_suffix("").parts)
    package = parts[:-1]
    name = ".".join(package if parts[-1] == "__init__" else parts)
    source = Source(str(relative), package)
    try:
        source.visit(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError, RecursionError):
        pass  # The build says so, if it is imported.
    return name, source


def main():
    folder, entry = pathlib.Path(sys.argv[1]), sys.argv[2]
    target = folder / "lib/python3/site-packages"
    shutil.rmtree(folder, ignore_errors=True)
    target.mkdir(parents=True)
    everything = installed()
    native, lazy, warnings = [], {}, []
    named = [(requirement, "") for requirement in requirements(pathlib.Path("requirements.txt"))]
    for name in closure(named, everything):
        distribution = everything[name]
        left_out = copy(distribution, target)
        if left_out:
            native.append([f"{name} {distribution.version}", left_out[0], len(left_out)])
    for root in [target, pathlib.Path(".")]:
        for path in sources(root):
            name, source = read(path, root)
            if source.lazy:
                lazy[name] = sorted(set(source.lazy))
            if root != target:
                warnings.extend(source.warnings)
    text = os.environ["MB_ENTRY_SOURCE"].replace("LAZY = {}", f"LAZY = {lazy!r}", 1)
    (target / f"{entry}.py").write_text(text)
    print(json.dumps({"native": native, "warnings": warnings}))


main()
