# Sets $python, the interpreter of a job, and `container`, the command that starts a process in the
# image of DTRAIN_CONTAINER; the scripts of this folder and those that `dtrain submit` writes source
# this file. Ends the job with status 2 where there is no dtrain.
container=()
# A file of the working folder must not be imported as a module; a checkout's package must.
[[ -e dtrain/__init__.py ]] || export PYTHONSAFEPATH=1
if [[ -n "${DTRAIN_CONTAINER:-}" ]]; then
    source "${BASH_SOURCE[0]%/*}/container.sh"
else
    python="${DTRAIN_ENV:+$DTRAIN_ENV/bin/python}"
    if [[ -z "$python" && -x "${DTRAIN_HOME:-.}/.venv/bin/python" ]]; then
        python="${DTRAIN_HOME:-.}/.venv/bin/python"
    fi
    python="${python:-python3}"
    if ! "$python" -c 'import dtrain' 2>/dev/null; then
        echo "error: $python has no dtrain, or is missing (DTRAIN_ENV=${DTRAIN_ENV:-}, DTRAIN_HOME=${DTRAIN_HOME:-})" >&2
        echo "    → set DTRAIN_ENV to the folder of the Python environment, or DTRAIN_HOME to a checkout with .venv" >&2
        exit 2
    fi
fi
