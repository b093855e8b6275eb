#!/bin/sh
# One virtual environment a peer: sh benchmarks/peers/install.sh [FOLDER] [PEER ...]
#
# torch comes first and pinned, from whatever index pip is set up for; then what a peer needs, at the versions that finetrace
# itself is locked to, so that transformers, PEFT and numpy are the same everywhere; then the peer without its dependencies.
# Left out of these, because they would bring another build of torch and nothing here imports them: torchvision, torchaudio,
# bitsandbytes. The peers are read as wheels from the package index, unchanged.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${1:-$root/build/peers}
[ $# -gt 0 ] && shift
peers=${*:-kronfluence dattri bergson}
python=${PYTHON:-python3}
minor=$("$python" -c 'import sys; print(sys.version_info.minor)')
lock=$root/requirements/lock.txt
[ "$minor" = 10 ] && lock=$root/requirements/lock-3.10.txt

for peer in $peers; do
    case $peer in
    kronfluence)
        needs="transformers peft accelerate safetensors tqdm numpy scipy opt-einsum==3.4.0"
        bare="kronfluence==1.0.1 einops==0.8.2 einconv==0.1.0"
        ;;
    dattri)
        needs="transformers peft accelerate tqdm numpy scipy pyyaml"
        bare="dattri==0.3.0 dattri-llm==0.1.0"
        ;;
    bergson)
        needs="transformers peft accelerate datasets jinja2 numpy pandas scipy pyarrow pyyaml huggingface-hub natsort
            jaxtyping>=0.3.3 ml_dtypes petname simple-parsing optree graphviz"
        bare="bergson==2.5.1 torchopt"
        ;;
    *)
        echo "$peer: no such peer; there are kronfluence, dattri and bergson." >&2
        exit 2
        ;;
    esac
    [ -x "$folder/$peer/bin/python" ] || "$python" -m venv "$folder/$peer"
    pip="$folder/$peer/bin/python -m pip install --quiet"
    $pip torch==2.13.0
    $pip --constraint "$lock" $needs
    $pip --no-deps $bare
    "$folder/$peer/bin/python" -c 'import torch; print(torch.__version__)'
    echo "$peer: $folder/$peer"
done
