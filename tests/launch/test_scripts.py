"""All scripts of launch/, by shellcheck."""

import pathlib
import subprocess
import sys

from stand_ins import REPOSITORY


def test_shellcheck():
    scripts = sorted(map(str, (REPOSITORY / "launch").glob("*.sh")))
    assert len(scripts) >= 6
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--shell=bash", "--external-sources", "--exclude=SC1091", *scripts],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
