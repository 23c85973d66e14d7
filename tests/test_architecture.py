"""The layout of DESIGN.md, read off the source: import walls, module sizes, package files."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "client", "server", "simulations")
OURS = {
    "common": {"common"},
    "client": {"common", "client"},
    "server": {"common", "server"},
    "simulations": {"common", "client", "server", "simulations"},
}
WALLS = {
    "flwr": {
        "client/app.py",
        "client/virtual_app.py",
        "client/supervise/sign_off.py",  # speaks to the coordinator as a SuperNode does
        "client/supervise/deaf_node.py",  # looks into one
        "client/supervise/in_step.py",  # keeps one in step
        "server/app.py",
        "server/strategy.py",
        "server/requests.py",
        "server/transport.py",
        "server/under_way.py",
        "server/newcomers.py",
        "server/forwarding_grid.py",
        "server/downloads.py",  # Flower's grid, a reply at a time
        "server/federation.py",
        "server/coordinated.py",  # the ServerApp's work on a coordinator's run
        "server/steering.py",
        "server/control/steered.py",
        "server/control/steered_grid.py",
        "common/flower_records.py",
        "simulations/grid.py",
        "simulations/flower_internals.py",
        "simulations/engines/app_handler.py",  # calls the ClientApp, as a SuperNode would
        "simulations/benchmarks/idle.py",  # a ClientApp that sends back what it gets
        "simulations/benchmarks/flower_client.py",  # the ClientApp we are measured against
        "simulations/benchmarks/flower_ray.py",  # and Flower's own simulation runtime, which runs it
        "simulations/faults/around.py",
        "simulations/faults/faulty_grid.py",
    },
    "opacus": {"client/dp/step.py", "common/privacy/accounting.py", "simulations/benchmarks/ghost.py"},
    "peft": {"common/models/adapter.py"},
    "grpc": {
        "client/agent/channel.py",
        "client/agent/server.py",
        "common/control/control_pb2_grpc.py",
        "server/control/client.py",
        "server/control/service.py",
    },
    "grpc_health": {"client/agent/server.py", "server/control/service.py"},
}
FLWR_INTERNALS = {
    "simulations/flower_internals.py", "client/supervise/sign_off.py", "client/supervise/deaf_node.py",
    "client/supervise/in_step.py", "server/downloads.py",
}  # fmt: skip
MODULES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(module: str) -> set[str]:
    """Every module name that ``module`` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_package_may(module: str) -> None:
    ours = {name.split(".")[0] for name in imported(module)} & set(PACKAGES)
    assert ours <= OURS[module.split("/")[0]]


@pytest.mark.parametrize("library", sorted(WALLS))
def test_library_stays_behind_its_wall(library: str) -> None:
    users = {module for module in MODULES if library in {name.split(".")[0] for name in imported(module)}}
    assert users == WALLS[library]


def test_flwr_internals_are_wrapped_in_few_places() -> None:
    public = {"flwr.app", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.clientapp", "flwr.simulation"}
    users = {m for m in MODULES if any(n.split(".")[0] == "flwr" and n not in public for n in imported(m))}
    assert users == FLWR_INTERNALS


def test_modules_and_tests_are_at_most_350_lines() -> None:
    tests = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    long = {name: n for name in [*MODULES, *tests] if (n := len((ROOT / name).read_text().splitlines())) > 350}
    assert not long


def test_package_files_hold_a_docstring_only() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1, path
            assert isinstance(body[0], ast.Expr), path


def test_every_folder_with_modules_is_a_package() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


@pytest.mark.parametrize("package", PACKAGES)
def test_imported_packages_are_ours(package: str) -> None:
    assert Path(str(importlib.import_module(package).__file__)).parent == ROOT / package


@pytest.mark.parametrize(
    "unsafe", ["torch.load(", "pickle.load", "trust_remote_code=True", "yaml.load(", "except Exception:", "except:"]
)
def test_unsafe_call_is_nowhere(unsafe: str) -> None:
    assert not [module for module in MODULES if unsafe in (ROOT / module).read_text(encoding="utf-8")]
