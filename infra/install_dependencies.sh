#!/bin/sh
# install_dependencies.sh cuda|cpu: makes .venv here with what uv.lock names, without the project itself.
#
# Our own code is put into /app/code later, and a .pth file lets Python find it there.
set -eu
variant=$1
if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca; fi
python3 -m venv /uv
/uv/bin/pip install --no-cache-dir --disable-pip-version-check "uv>=0.9"
PATH=/uv/bin:$PATH
locked="--frozen --no-dev --extra models"

case "$variant" in
cuda)
    uv sync $locked --no-install-project --python python3
    ;;
cpu)
    # The lock file names PyPI's torch with its CUDA libraries. Everything else is installed from it, by its hashes.
    version_of() { uv export $locked --no-hashes --no-annotate --no-header | sed -n "s/^$1==\([^ ;]*\).*/\1/p"; }
    uv export $locked --no-emit-project --prune torch --no-emit-package torchvision --output-file others.txt --quiet
    uv venv --python python3 .venv
    uv pip install --require-hashes --requirement others.txt
    uv pip install --index https://download.pytorch.org/whl/cpu \
        "torch==$(version_of torch)" "torchvision==$(version_of torchvision)"
    ;;
*)
    echo "install_dependencies.sh: $variant: expected cuda or cpu" >&2
    exit 2
    ;;
esac
echo /app/code >"$(echo .venv/lib/python3.*/site-packages)/maskfleet.pth"
