# Sourced by job.sh and prepare.sh where DTRAIN_CONTAINER names an image: `container` becomes the
# command that starts a process in it. The supervisor (dtrain/launching/container.py) starts the
# steps of the job in the same image, and reads what is exported here. README.md says more.
python=python3 # the image's
exported=(DTRAIN_CONTAINER DTRAIN_CONTAINER_RUNTIME DTRAIN_CONTAINER_MOUNTS DTRAIN_CACHE)
DTRAIN_CACHE="${DTRAIN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dtrain}"
mkdir -p "$DTRAIN_CACHE"

mount_if_there() { # adds a path to $mounts
    [[ -e "$1" && ",$mounts," != *",$1:$1,"* ]] || return 0
    if [[ "$1" == *[,:]* ]]; then
        echo "error: $1: a path with a comma or a colon cannot be mounted into a container" >&2
        exit 2
    fi
    mounts+="${mounts:+,}$1:$1"
}

mounts="${DTRAIN_CONTAINER_MOUNTS:-}"
for path in "$PWD" "${DTRAIN_HOME:-}" "$DTRAIN_CACHE" "${HF_HOME:-$HOME/.cache/huggingface}"; do
    mount_if_there "$path"
done
DTRAIN_CONTAINER_MOUNTS="$mounts"
# Beyond that, the supervisor needs this script and Slurm's commands with what they read.
plugins=$(scontrol show config 2>/dev/null | sed -n 's/^PluginDir *= *//p')
for path in "$0" "${SLURM_CONF:-/etc/slurm}" /etc/slurm /run/slurm /run/munge ${plugins//:/ } \
    "$(type -P srun)" "$(type -P scontrol)" "$(type -P sbatch)" "$(type -P squeue)"; do
    mount_if_there "$path"
done

# pyxis, where srun has it, takes everything but apptainer's own images: .sif files and folders.
if [[ "$DTRAIN_CONTAINER" != *.sif && ! -d "$DTRAIN_CONTAINER" ]] &&
    srun --help 2>/dev/null | grep -q -e --container-image; then
    DTRAIN_CONTAINER_RUNTIME=pyxis
    container=(srun --overlap --nodes=1 --ntasks=1 --kill-on-bad-exit=1
        ${SLURMD_NODENAME:+"--nodelist=$SLURMD_NODENAME"} "--container-image=$DTRAIN_CONTAINER"
        "--container-mounts=$mounts" "--container-workdir=$PWD")
elif DTRAIN_CONTAINER_RUNTIME=$(type -P apptainer || type -P singularity); then
    container=("$DTRAIN_CONTAINER_RUNTIME" exec --nv --bind "$mounts" --pwd "$PWD"
        "$DTRAIN_CONTAINER")
else
    echo "error: DTRAIN_CONTAINER: this node has neither pyxis nor apptainer for it" >&2
    echo "    → load its module in the job script, or unset DTRAIN_CONTAINER" >&2
    exit 2
fi
export "${exported[@]}"
