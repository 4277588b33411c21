"""An installed package, from a wheel or editable, carries all modules and the shipped gin files."""

import json
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

import pangu_tiny

REPOSITORY = pathlib.Path(__file__).parents[1]

# Stands in for a Python that has nothing of this project but what was installed below `prefix`:
# no start-up files of this environment, which may hold an editable install of its own.
PROBE = """
import json, pkgutil, site, sys
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])
import gin, pangu_tiny
from pangu_tiny import config
modules = [m.name for m in pkgutil.walk_packages(pangu_tiny.__path__, "pangu_tiny.")]
print(json.dumps({
    "package": pangu_tiny.__file__,
    "version": pangu_tiny.__version__,
    "gin": gin.__file__,
    "modules": sorted(m for m in modules if not m.startswith("pangu_tiny.shipped_gin")),
    "files": sorted(
        str(p.relative_to(config.shipped_files())) for p in config.shipped_files().rglob("*.gin")
    ),
}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packaged, since a build leaves folders beside its sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("pangu_tiny", "gin"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, copy / name, ignore=ignore)
    return copy


def install(source, prefix, *options):
    """Installs without touching a network, and asks the installed package what it finds."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    done = subprocess.run(
        [*pip, *alone, f"--prefix={prefix}", *options, str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    installed = sysconfig.get_path("purelib", vars={"base": str(prefix)})
    dependencies = sysconfig.get_path("purelib")
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROBE, installed, dependencies],
        capture_output=True,
        text=True,
        check=False,
        cwd=prefix,
    )
    assert found.returncode == 0, found.stderr
    assert (prefix / "bin" / "pangu-tiny").exists()
    return json.loads(found.stdout)


def expected_modules():
    package = REPOSITORY / "pangu_tiny"
    names = [
        ".".join(p.relative_to(REPOSITORY).with_suffix("").parts) for p in package.rglob("*.py")
    ]
    return sorted(name.removesuffix(".__init__") for name in names if name != "pangu_tiny.__init__")


def expected_files():
    return sorted(
        str(p.relative_to(REPOSITORY / "gin")) for p in (REPOSITORY / "gin").rglob("*.gin")
    )


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["wheel", "editable"])
def test_an_installed_package_is_complete(source, tmp_path, options):
    """A package or a pattern that setup.cfg forgets is missing only here. And `import gin` stays
    gin-config: a package of that name in the repository would take its place."""
    found = install(source, tmp_path, *options)
    assert found["modules"] == expected_modules()
    assert found["files"] == expected_files()
    assert found["package"].startswith(str(source if options else tmp_path))
    assert "site-packages" in found["gin"] and str(source) not in found["gin"]
    assert found["version"] == pangu_tiny.__version__


def test_gin_is_no_package_of_the_repository():
    assert not (REPOSITORY / "gin" / "__init__.py").exists()
