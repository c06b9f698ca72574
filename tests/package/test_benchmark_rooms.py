"""The benchmarks import questions -> workloads -> harness, and never back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A room imports from itself and from those behind it; the commands stand before all.
ROOMS = ("questions", "workloads", "harness")
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "benchmarks").rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in PATHS.items()}


def imports_of(module):
    """Returns the other modules of the benchmarks that one names."""
    return named_in(MODULES[module]) - {"benchmarks", module}


def named_in(path):
    """Returns the modules of the benchmarks that a file names, also in functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # As `import_module(f"benchmarks.questions.{name}")` has it.
            names = [node.value.rstrip(".")]
        found |= MODULES.keys() & set(names)
    return found


def room_of(module):
    """Returns the number of its room, -1 for the commands."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) if parts[1] in ROOMS else -1


# report -> readme -> headline -> report was a circle, held together by an import in a
# function.
@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"benchmarks"}))
def test_module_imports_nothing_from_the_rooms_before(module):
    back = {name for name in imports_of(module) if room_of(name) < room_of(module)}
    assert not back


def test_no_module_imports_itself_by_way_of_others():
    def walk(module, way):
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for name in sorted(imports_of(module)):
                walk(name, [*way, module])
        done.add(module)

    done = set()
    for module in MODULES:
        walk(module, [])


def test_questions_do_not_import_each_other():
    for module in MODULES:
        if module.startswith("benchmarks.questions."):
            others = {n for n in imports_of(module) if room_of(n) == 0}
            assert others <= {"benchmarks.questions"}


# What they share with the package's tests is how to start and kill processes.
def test_tests_of_the_package_use_the_processes_only():
    of_the_benchmarks = ("test_benchmark", "test_digits", "test_faults")
    allowed = {"benchmarks", "benchmarks.harness", "benchmarks.harness.processes"}
    for path in (ROOT / "tests").rglob("*.py"):
        if not path.stem.startswith(of_the_benchmarks):
            assert named_in(path) <= allowed, path
