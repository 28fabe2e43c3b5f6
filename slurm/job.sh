# One attempt of a training job; every script here sources this file, and so does what
# `dtrain submit` writes. README.md lists the variables that it reads.
export DTRAIN_PREFLIGHT DTRAIN_FORCE # the script may have set them for bash alone
# Slurm's warning must neither end the supervisor before it listens, nor be lost.
trap '' USR1
source "${BASH_SOURCE[0]%/*}/python.sh"
block=(env --block-signal=USR1)
"${block[@]}" true 2>/dev/null || block=() # coreutils before 8.31
[[ -z "${DTRAIN_CONTAINER:-}" ]] || container+=(env --block-signal=USR1) # the runtime may unblock it
exec "${block[@]}" "${container[@]}" "$python" -m dtrain.supervisor "$0" "$DTRAIN_RECIPE" "$@"
