#!/usr/bin/env bash
# Makes what vm.toml names: vmlinuz, a link to a kernel, and rootfs, a folder with busybox and `init`. No root needed.
#
#   [KERNEL=FILE|TREE] ./prepare.sh     KERNEL: a bzImage, a vmlinux, or a tree that one was built in; without it the
#                                       pinned Debian kernel
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../scripts/lib.sh"
if [[ ${KERNEL-} ]]; then
    [[ ! -d $KERNEL ]] || KERNEL=$KERNEL/arch/x86/boot/bzImage
    [[ -f $KERNEL ]] || die "KERNEL: there is no $KERNEL; build it first (make bzImage)"
    ln -sfn "$(realpath "$KERNEL")" "$here/vmlinuz"
else
    "$repository/scripts/kernel"
    ln -sfn ../../.work/kernel/vmlinuz "$here/vmlinuz"
fi
mkdir -p "$here"/rootfs/{bin,dev,proc,sys,tmp}
install /bin/busybox "$here/rootfs/bin/busybox"
ln -sfn busybox "$here/rootfs/bin/sh"
install "$here/init" "$here/rootfs/init"
