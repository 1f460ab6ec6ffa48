#!/usr/bin/env bash
# One process on each machine of a Cloud TPU slice, from any machine that has gcloud. `postrain launch
# --target=tpu-pod:NAME ...` fills in what stands between @s and runs it; project and zone are gcloud's own
# (CLOUDSDK_CORE_PROJECT, CLOUDSDK_COMPUTE_ZONE). Each machine needs postrain[tpu] in its python3, and the config file.
set -euo pipefail

script=$(cat <<'END'
for start in {0..100}; do
    @COMMAND@
    code=$?
    # 143: stopped by a signal, or a machine was lost; 124: hung; 134, 137, 139: crashed or killed (SIGABRT, SIGKILL,
    # as out of memory, SIGSEGV). The same command goes on from the checkpoint.
    [[ "$code" =~ ^(124|134|137|139|143)$ ]] || exit "$code"
    sleep 10
done
echo "stopped with code $code after 100 restarts: launch again to go on" >&2
exit "$code"
END
)
exec gcloud compute tpus tpu-vm ssh @NAME@ --worker=all --command="$script"
