#!/usr/bin/env bash
# One process a machine under SLURM. `postrain launch --target=slurm:HOSTS ...` fills in what stands between @s and
# gives it to sbatch, which reads what else it needs from SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, ...
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

# Before the time limit SLURM sends SIGTERM to the processes alone, which save and exit with 143. This shell gets it
# when the job is cancelled or preempted: then SLURM itself starts it again, or not, and the shell waits for the save.
told=0
trap 'told=1' TERM
srun --kill-on-bad-exit=0 @COMMAND@ &
while kill -0 $! 2>/dev/null; do
    wait $!
done
wait $!
code=$?

# 143: stopped by a signal, or a machine was lost; 124: hung; 134, 137, 139: crashed or killed (SIGABRT, SIGKILL, as
# out of memory, SIGSEGV). The same command goes on from the checkpoint.
if [[ "$code" =~ ^(124|134|137|139|143)$ && "$told" = 0 ]]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
        echo "stopped with code $code after 100 restarts: submit the job again to go on" >&2
        exit "$code"
    fi
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
