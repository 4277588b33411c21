"""A machine with nothing on its PATH but stand-ins for the tools of the cloud, and the few real
tools that the launch scripts need."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[2]
_REAL = ("bash", "env", "dirname", "mktemp", "mkdir", "rm", "cat", "cp")
_STAND_INS = ("gcloud", "kubectl", "docker", "git", "sleep")

# Writes down its words and, where it is told to read from it, its input; then does what the last
# rule says whose pattern fits, each time the next thing of the rule, and the last one from then on.
_STAND_IN = """#!{bash}
tool=${{0##*/}}
printf '%s\\0' "$tool" "$@" >> "{folder}/calls"
printf '\\n\\0' >> "{folder}/calls"
case " $* " in *" - "* | *"=- "*) cat >> "{folder}/input" ;; esac
for rule in "{folder}"/rules/*; do
  [ -e "$rule" ] || break
  pattern=$(<"$rule/pattern")
  if [[ "$tool $*" == $pattern ]]; then
    count=$(<"$rule/count")
    [ ! -e "$rule/$((count + 1))" ] || echo $((count + 1)) > "$rule/count"
    source "$rule/$count"
    break
  fi
done
"""

# What slice.py says of the same words does not change, and takes seconds.
_PYTHON = """#!{bash}
known={folder}/$(printf '%s\\0' "$@" | {sha256sum} | {cut} -c 1-64)
[ -e "$known" ] || "{python}" "$@" > "$known" || {{ code=$?; rm "$known"; exit $code; }}
cat "$known"
"""


class Machine:
    """Runs the scripts; `calls` is what was called since, as lists of words."""

    def __init__(self, folder: pathlib.Path, known: pathlib.Path):
        self.folder = folder
        self.home = folder / "home"
        self._bin = folder / "bin"
        for made in (self.home, self._bin, folder / "rules", folder / "tmp"):
            made.mkdir()
        self.real(*_REAL)
        real = {tool: shutil.which(tool) for tool in ("bash", "sha256sum", "cut")}
        self.stand_in(*_STAND_INS)
        self._write("python3", _PYTHON.format(**real, folder=known, python=sys.executable))

    def real(self, *tools: str) -> None:
        for tool in tools:
            (self._bin / tool).symlink_to(shutil.which(tool))

    def stand_in(self, *tools: str) -> None:
        for tool in tools:
            self._write(tool, _STAND_IN.format(bash=shutil.which("bash"), folder=self.folder))

    def _write(self, tool: str, text: str) -> None:
        (self._bin / tool).write_text(text)
        (self._bin / tool).chmod(0o755)

    def without(self, tool: str) -> None:
        (self._bin / tool).unlink()

    def when(self, pattern: str, *snippets: str) -> None:
        """What calls that fit the pattern do, one after the other: lines of bash. Goes before what
        was said earlier."""
        rule = self.folder / "rules" / f"{999 - len(os.listdir(self.folder / 'rules'))}"
        rule.mkdir()
        (rule / "pattern").write_text(pattern)
        (rule / "count").write_text("0")
        for i, snippet in enumerate(snippets):
            (rule / str(i)).write_text(snippet)

    def run(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        """In a process group of its own, so that `kill -INT 0` in a stand-in is a ^C."""
        return subprocess.run(
            [str(self._bin / "bash"), str(REPOSITORY / "launch" / script), *words],
            env={
                "PATH": str(self._bin),
                "HOME": str(self.home),
                "TMPDIR": str(self.folder / "tmp"),
            },
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    @property
    def calls(self) -> list[list[str]]:
        if not (self.folder / "calls").exists():
            return []
        calls = (self.folder / "calls").read_text(encoding="utf-8").split("\0\n\0")
        return [call.split("\0") for call in calls[:-1]]

    def called(self) -> list[str]:
        """The calls in short: of each the first words that are no options; pauses left out."""
        short = [[word for word in call if not word.startswith("--")][:5] for call in self.calls]
        return [" ".join(words) for words in short if words[0] != "sleep"]

    @property
    def input(self) -> str:
        """What was written to the stand-ins."""
        path = self.folder / "input"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def is_clean(self) -> bool:
        """Whether no temporary file was left."""
        return not os.listdir(self.folder / "tmp")
