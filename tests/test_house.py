"""Rules of the house that no linter knows."""

import ast
from pathlib import Path

import parallel
from parallel.mesh import JOINED, REPLICA_DIMS, WEIGHT_DIMS
from parallel.recipe import MESH_DIMS

MODULES = {
    path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for root in map(Path, parallel.__path__)
    for path in root.rglob("*.py")
}


def test_torch_is_patched_in_one_file_alone() -> None:
    patching = {
        file
        for file, tree in MODULES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and node.module == "unittest")
        or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr")
    }
    assert patching == {"torch_private.py"}


def test_no_living_object_is_given_another_class_or_another_forward() -> None:
    """Modules are replaced through their constructors, and behaviour at seams that the transformer declares."""
    given = {
        (file, target.attr)
        for file, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }
    assert [file for file, attribute in given if attribute in ("__class__", "forward")] == []
    seams = {(file, attribute) for file, attribute in given if attribute in ("attend", "run", "walk")}
    assert {file for file, _ in seams} == {"transformer.py", "strategies/context.py", "strategies/recompute.py"}


def test_strategies_measures_and_commands_name_no_dimension_that_the_mesh_does_not_have() -> None:
    joined = {member for members in JOINED.values() for member in members}
    assert joined | set(REPLICA_DIMS) <= set(MESH_DIMS) and set(WEIGHT_DIMS) <= set(MESH_DIMS) | set(JOINED)
