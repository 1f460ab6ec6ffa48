#!/usr/bin/env bash
# One process on each machine of a Cloud TPU slice, from any machine that has gcloud. `postrain launch
# --target=tpu-pod:NAME ...` fills in the names between @s and runs it; project and zone are gcloud's own
# (CLOUDSDK_CORE_PROJECT, CLOUDSDK_COMPUTE_ZONE). Each machine needs postrain[tpu] in its python3, and the config file.
set -euo pipefail

# The secret of the run's control channel goes by a file: `ps` would show it on a command line.
file=$(mktemp)
trap 'rm -f "$file"' EXIT
head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' > "$file"
gcloud compute tpus tpu-vm scp "$file" @NAME@:.postrain-secret --worker=all

script=$(cat <<'END'
export POSTRAIN_SECRET="$(cat ~/.postrain-secret)"
rm -f ~/.postrain-secret
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
gcloud compute tpus tpu-vm ssh @NAME@ --worker=all --command="$script"
