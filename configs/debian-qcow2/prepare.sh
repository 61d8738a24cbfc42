#!/usr/bin/env bash
# Makes what vm.toml names: base.img, a link to the Debian that the configurations share. `launcher up` makes the
# overlay.
#
#   ./prepare.sh [--fresh]      --fresh: throws the overlay away, and all that the guest has written
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../scripts/lib.sh"
[[ ${1-} == --fresh ]] && rm -f "$here/root.qcow2"
"$repository/scripts/debian"
ln -sfn ../../.work/debian/root.img "$here/base.img"
