"""The installed package: `structured` alone, in an environment that has PyTorch and nothing else of this repository."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a clean copy: a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "structured", "pyproject.toml", "README.md", "LICENSE"],
                           cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    if files.returncode:
        pytest.skip("the package is built from the files that git knows, and this is no checkout")
    for name in files.stdout.split():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", folder, folder / "source"], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of an empty environment that holds the wheel and sees this one's PyTorch."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)
    return python


def run(python, code, cwd):
    done = subprocess.run([python, "-I", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_library_alone(wheel):
    names = {Path(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"structured", "structured_attention-0.1.0.dist-info"}
    metadata = zipfile.ZipFile(wheel).read("structured_attention-0.1.0.dist-info/METADATA").decode()
    assert re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) == ["torch>=2.11"]


def test_the_snippet_of_the_readme_runs(installed, tmp_path):
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    said = run(installed, f"{code}\nprint(tuple(y.shape), M(q.flatten(2)[..., :768]).shape[-1])", tmp_path)
    assert said == "(2, 12, 8, 64) 768\n"


def test_no_name_hides_a_module(installed, tmp_path):
    """import structured.NAME gives the module for every file of the package."""
    code = """
import importlib.util, pkgutil, structured, types
for found in pkgutil.walk_packages(structured.__path__, "structured."):
    if ".kernels." in found.name or (found.name == "structured.hf" and not importlib.util.find_spec("transformers")):
        continue  # they need Triton and transformers
    module = importlib.import_module(found.name)
    owner, name = found.name.rsplit(".", 1)
    assert getattr(importlib.import_module(owner), name) is module, found.name
print(structured.__file__)
"""
    assert str(installed.parents[1]) in run(installed, code, tmp_path)


def test_help_says_what_goes_in_and_comes_out(installed, tmp_path):
    said = run(installed, "import structured; help(structured.mlr_attention)", tmp_path)
    for word in ("q: ", "(B, H, Tq, r)", "Returns", "Raises", "BadInput", "DESIGN 3", "weighting: ", "-> torch.Tensor"):
        assert word in said, word
