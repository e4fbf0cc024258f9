"""The wheel works away from the checkout, recipes included."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_recipes_travel_with_the_package(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "sinkpretrain/configs/pythia-160m.yaml" in names
    assert "sinkpretrain/configs/sinks/one-sink-token.yaml" in names
    assert "sinkpretrain/comparison/page.html.jinja" in names
    assert "data_prep/prepare.py" in names
    assert not any(n.startswith(("tests/", "configs/", "results/")) for n in names)
    done = subprocess.run(
        [sys.executable, "-m", "sinkpretrain", "train", "--config", "pythia-160m,one-sink-token"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.returncode == 2
    assert "data.path is not set" in done.stderr


def test_every_module_is_on_the_map() -> None:
    """Whoever looks for the place of a change finds each module in CONTRIBUTING's table."""
    named = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = {p.stem for p in (ROOT / "sinkpretrain").glob("[!_]*.py")}
    assert {m for m in modules if f"`{m}`" not in named} == set()
