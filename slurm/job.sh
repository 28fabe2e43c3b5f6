# One attempt of a training job; every script here sources this file, and so does what
# `dtrain submit` writes. README.md lists the variables that it reads.
python="${DTRAIN_ENV:+$DTRAIN_ENV/bin/python}"
if [[ -z "$python" && -x "${DTRAIN_HOME:-.}/.venv/bin/python" ]]; then
    python="${DTRAIN_HOME:-.}/.venv/bin/python"
fi
container=()
[[ -z "${DTRAIN_CONTAINER:-}" ]] || source "${BASH_SOURCE[0]%/*}/container.sh"
# A file of the working folder must not be imported as a module; a checkout's package must.
[[ -e dtrain/__init__.py ]] || export PYTHONSAFEPATH=1
export DTRAIN_PREFLIGHT DTRAIN_FORCE # the script may have set them for bash alone
# Slurm's warning must neither end the supervisor before it listens, nor be lost.
trap '' USR1
block=(env --block-signal=USR1)
"${block[@]}" true 2>/dev/null || block=() # coreutils before 8.31
[[ -z "${DTRAIN_CONTAINER:-}" ]] || container+=(env --block-signal=USR1) # the runtime may unblock it
exec "${block[@]}" "${container[@]}" "${python:-python3}" -m dtrain.supervisor "$0" "$DTRAIN_RECIPE" "$@"
