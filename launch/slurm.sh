#!/usr/bin/env bash
# One process a machine under SLURM. `postrain launch --target=slurm:HOSTS ...` fills in the names between @s and passes
# it to sbatch, which reads its other settings from SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, ...
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@HOSTS@
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=@GPUS@
#SBATCH --exclusive
#SBATCH --output=@LOGS@/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -uo pipefail

# The secret of the run's control channel, a new one at every start. It goes to the processes by their environment:
# `ps` would show it on a command line.
POSTRAIN_SECRET="$(head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n')"
export POSTRAIN_SECRET

# Before the time limit SLURM sends SIGTERM to the processes alone, which save and exit with 143. This shell gets it
# when the job is cancelled or preempted: then SLURM itself starts it again, or not, and the shell waits for the save.
cancelled=0
trap 'cancelled=1' TERM
srun --kill-on-bad-exit=0 --export=ALL @COMMAND@ &
while kill -0 $! 2>/dev/null; do
    wait $!
done
wait $!
code=$?

# 143: stopped by a signal, or a machine was lost; 124: hung; 134, 137, 139: crashed or killed (SIGABRT, SIGKILL, as
# out of memory, SIGSEGV). The same command goes on from the checkpoint.
if [[ "$code" =~ ^(124|134|137|139|143)$ && "$cancelled" = 0 ]]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
        echo "stopped with code $code after 100 restarts: submit the job again to go on" >&2
        exit "$code"
    fi
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
