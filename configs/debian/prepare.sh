#!/usr/bin/env bash
# Makes what vm.toml names: a root disk of its own, copied from the Debian that the configurations share.
#
#   ./prepare.sh [--fresh]      --fresh: again, even if a root disk is there
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../scripts/lib.sh"
[[ ${1-} == --fresh ]] && rm -f "$here/root.img"
[[ -e $here/root.img ]] && exit 0
"$repository/scripts/debian"
copy_image "$work/debian/root.img" "$here/root.img"
