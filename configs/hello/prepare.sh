#!/usr/bin/env bash
# Makes what vm.toml names: vmlinuz (Debian's cloud kernel) and initrd.img (busybox and `init`). No root needed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../scripts/lib.sh"
"$repository/scripts/kernel"
ln -sfn ../../.work/kernel/vmlinuz "$here/vmlinuz"
up_to_date "$here/initrd.img" "$here"/{init,prepare.sh} && exit 0

part=$(mktemp -d "$work/hello.XXXXXX")
trap 'rm -rf "$part"' EXIT
copy_busybox "$part"
install "$here/init" "$part/init"
pack_initramfs "$part" "$here/initrd.img"
