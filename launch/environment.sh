# Puts the Python environment on PATH: the active one, DTRAIN_ENV, or the checkout's .venv. The
# scripts of this folder source it.
root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
python="${DTRAIN_ENV:+$DTRAIN_ENV/bin/}python"
if [[ -n "${DTRAIN_ENV:-}" ]]; then
    PATH="$DTRAIN_ENV/bin:$PATH"
elif [[ -z "${VIRTUAL_ENV:-}" && -d "$root/.venv" ]]; then
    PATH="$root/.venv/bin:$PATH"
fi
if ! "$python" -c 'import dtrain' 2>/dev/null; then
    echo "error: $python has no dtrain, or is missing (DTRAIN_ENV=${DTRAIN_ENV:-})" >&2
    echo "    → activate its environment, set DTRAIN_ENV to its folder, or: make install in $root" >&2
    exit 2
fi
