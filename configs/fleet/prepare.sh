#!/usr/bin/env bash
# Makes what the TOML files name: base.img, a link to the Debian that the configurations share.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../scripts/lib.sh"
"$repository/scripts/debian"
ln -sfn ../../.work/debian/root.img "$here/base.img"
