# What a job of the lab needs from its site, read by the scripts beside this one. `lab submit` sets the variables from
# slurm/site.toml; by hand, export those that differ.

# The lab, as every node of the job sees it.
python=${LAB_PYTHON:-python}
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 # a folder called `parallel` where the job happens to start is not ours
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Environment modules, one in a line.
if [ -n "${LAB_MODULES:-}" ]; then
    for profile in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh; do
        if ! type module >/dev/null 2>&1 && [ -r "$profile" ]; then . "$profile"; fi
    done
    mapfile -t modules <<<"$LAB_MODULES"
    module load "${modules[@]}" || exit 1
fi

# A container: enroot, by the pyxis plugin of srun. `lab` starts one process of the lab on this node, in it, too.
container=()
lab() { "$python" -m "$@"; }
if [ -n "${LAB_CONTAINER:-}" ]; then
    container=(--container-image="$LAB_CONTAINER" --container-mounts="$PWD:$PWD${LAB_MOUNTS:+,$LAB_MOUNTS}")
    container+=(--container-workdir="$PWD")
    lab() { srun --overlap --nodes=1 --ntasks=1 "${container[@]}" "$python" -m "$@"; }
fi

# Where the ranks meet: on the first node, at a port that another job on it will hardly have.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
