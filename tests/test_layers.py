"""Imports go one way: pipelines -> assets -> sae_core; and what every Dagster process loads stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import assets
import pipelines
import sae_core

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {
    "sae_core": {"dagster", "assets", "pipelines", "tests"},
    "assets": {"pipelines", "tests"},
    "pipelines": {"tests"},
}
HEAVY = ("torch", "transformers", "faiss", "umap", "sklearn", "matplotlib", "openai", "duckdb")


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", ABOVE)
def test_a_package_imports_nothing_from_above_it(package: str):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    upward = {str(file.relative_to(ROOT)): up for file in files if (up := imported(file) & ABOVE[package])}
    assert not upward


def test_all_three_packages_come_from_one_place():
    """`assets` and `pipelines` are plain names: another installed package of that name would shadow ours."""
    places = {Path(package.__file__).parents[1] for package in (sae_core, assets, pipelines)}
    assert places == {ROOT}


@pytest.mark.parametrize("module", ["pipelines.definitions", "pipelines.cli", "sae_core.studies"])
def test_what_every_process_loads_is_light(module: str):
    code = f"import {module}, sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_server_starts_without_torch():
    code = "import sae_core.serve, sys; print([m for m in ('torch', 'transformers', 'dagster') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
