#!/bin/sh
# Installs the CUDA compiler that the kernels are built with, from its Python wheels, into
# ${XDG_CACHE_HOME:-~/.cache}/plimsoll/cuda. Needs no card. Safe to repeat; prints the folder.
set -eu

versions='nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86'

here=$(cd "$(dirname "$0")" && pwd)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/plimsoll/cuda
toolkit=$folder/toolkit

if [ "$(cat "$folder/versions" 2>/dev/null)" = "$versions" ] && [ -x "$toolkit/bin/nvcc" ]; then
    echo "$toolkit"
    exit 0
fi

# Root on Debian gets what is missing; everyone else is told.
need() { # package, what for
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >/dev/null
    else
        echo "install $1 first: $2" >&2
        exit 1
    fi
}
command -v g++ >/dev/null || need g++ 'nvcc compiles host code with it'
python3 -c 'import ensurepip, venv' 2>/dev/null || need python3-venv 'the wheels go into a virtual environment'

mkdir -p "$folder"
rm -rf "$folder/venv" "$folder/versions"
python3 -m venv "$folder/venv"
# $versions is a list of words.
# shellcheck disable=SC2086
"$folder/venv/bin/python" -m pip install --quiet --no-compile $versions >&2
tree=$(echo "$folder"/venv/lib/python3*/site-packages/nvidia/cu13)
ln -sfn "$tree" "$toolkit"
"$toolkit/bin/nvcc" --version | tail -2 >&2
printf '%s' "$versions" >"$folder/versions"
# The build looks for nvcc when this folder changes.
touch "$here/cuda"
echo "$toolkit"
