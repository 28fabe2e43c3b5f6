# One attempt of a training job; every script here sources this file, and so does what
# `dtrain submit` writes. It is bash: plan → begin → preflight → train → end, and the traps.
#
# From the environment, all optional but the first:
#   DTRAIN_RECIPE        a recipe's file, or the name of a shipped one
#   DTRAIN_ENV           folder of the Python environment; the checkout's .venv, else python3
#   DTRAIN_PREFLIGHT     on (default), off, or exclude: submit anew without the nodes at fault
#   DTRAIN_GPU           kind of GPU for the plan, where the node has no nvidia-smi: h100-80g
#   DTRAIN_FORCE         1: start although it does not fit by the plan
#   DTRAIN_INTERFACE     network interface between the nodes, for example ib0
#   DTRAIN_MAX_FAILURES  tries in a row without a new checkpoint that end the job (3)
#   DTRAIN_MAX_TRIES     starts of the job, whatever ended them (100)
# Arguments of the script are recipe keys: sbatch slurm/70b-qlora.sh model.base=/models/llama

python="${DTRAIN_ENV:+$DTRAIN_ENV/bin/python}"
if [[ -z "$python" && -x "${DTRAIN_HOME:-.}/.venv/bin/python" ]]; then
    python="${DTRAIN_HOME:-.}/.venv/bin/python"
fi
python="${python:-python3}"
# What lies in the working folder must not be taken for a module; a checkout is meant to be.
[[ -e dtrain/__init__.py ]] || export PYTHONSAFEPATH=1

# A job's own script may have set them for bash alone.
export DTRAIN_PREFLIGHT DTRAIN_FORCE

warned='' signalled=0 step='' run=''
ask_to_stop() {
    warned=--warned signalled=1
    echo "dtrain $(date +%T): Slurm warned; the ranks save and stop" >&2
    [[ -n "$run" ]] && : >"$run/stop" # for workers that do not listen yet
    [[ -n "$step" ]] && kill -USR1 "$step"
}
trap ask_to_stop USR1
# Slurm ends the step by itself. Whether to go on is never decided here: it may be a scancel.
trap 'signalled=1' TERM

"$python" -m dtrain.planning.fit_gate "$DTRAIN_RECIPE" "$@" || exit
mapfile -d '' -t begun < <(exec "$python" -m dtrain.launching.attempt begin "$DTRAIN_RECIPE" "$@")
wait $! || exit
run="${begun[0]}"
if [[ "${DTRAIN_PREFLIGHT:-on}" != off && -z "$warned" ]]; then
    "$python" -m dtrain.launching.preflight job "$run" "$0" "$@" || exit
fi
status=75
if [[ -z "$warned" ]]; then
    "${begun[@]:1}" &
    step=$!
    while :; do # a signal ends `wait`, not the step
        signalled=0
        wait "$step"
        status=$?
        ((signalled)) || break
    done
    step=''
fi
exec "$python" -m dtrain.launching.attempt end "$run" "$status" $warned
