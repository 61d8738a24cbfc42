#!/usr/bin/env bash
# Makes what vm.toml names and `launcher up` does not make: vmlinuz (Debian's cloud kernel), initrd.img (busybox and
# `init`) and base.img. No root needed.
#
#   ./prepare.sh [--fresh]      --fresh: throws the disks away
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../scripts/lib.sh"
[[ ${1-} == --fresh ]] && rm -f "$here"/{thin,full,direct,queues,base,unlocked,external}.img "$here"/*.qcow2
"$repository/scripts/kernel"
ln -sfn ../../.work/kernel/vmlinuz "$here/vmlinuz"
[[ -e $here/base.img ]] || truncate --size 16M "$here/base.img"
up_to_date "$here/initrd.img" "$here"/{init,prepare.sh} "$kernel/version" && exit 0

part=$(mktemp -d "$work/blocklab.XXXXXX")
trap 'rm -rf "$part"' EXIT
copy_busybox "$part"
copy_modules "$part" virtio_pci virtio_blk
install "$here/init" "$part/init"
pack_initramfs "$part" "$here/initrd.img"
