# Sourced with the extras to install, then other arguments for pip. Makes .venv in the repository
# once, installs the project when setup.cfg changed since, and activates it. PYTHON and
# PANGU_TINY_VENV choose others.
extras=$1
shift
venv=${PANGU_TINY_VENV:-.venv}
python=${PYTHON:-python3}
"$python" - <<'CHECK' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or later is needed, {sys.executable} is {sys.version.split()[0]}")
CHECK
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
source "$venv/bin/activate"
stamp=$(printf '%s\n' "$extras" "$PWD" | cat - setup.cfg pyproject.toml | sha256sum | cut -c 1-64)
if [ "$(cat "$venv/installed-$extras" 2>/dev/null)" != "$stamp" ]; then
  echo "installing into $venv (once)"
  python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}" "$@"
  echo "$stamp" > "$venv/installed-$extras"
fi
