#!/usr/bin/env bash
# Makes what vm.toml names: a Debian 12 root disk with mmdebstrap, and from inside it the kernel and the
# initrd that Debian's own tools made. As root or, with user namespaces, as anybody.
#
#   ./prepare.sh [--fresh]      --fresh: again, even if a root disk is there
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../scripts/lib.sh"
[[ ${1-} == --fresh ]] && rm -f "$here/root.img"
[[ -e $here/root.img && -e $here/vmlinuz && -e $here/initrd.img ]] && exit 0
"$repository/scripts/kernel"

mkdir -p "$work"
part=$(mktemp -d "$work/debian.XXXXXX")
trap 'rm -rf "$part"' EXIT
# Readable for the user namespace that mmdebstrap works in when it is not root.
chmod 755 "$part"
# This machine's own Debian 12 sources; mmdebstrap's default where it has none.
apt-get indextargets --format 'deb $(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
    grep -E ' bookworm(-updates|-security)? main$' | sort -u >"$part/sources.list" || true
sources=()
[[ ! -s $part/sources.list ]] || sources=("$part/sources.list")

release=$(<"$kernel/release")
mkdir -p "$part/files/etc/systemd/system/serial-getty@ttyS0.service.d"
cat >"$part/files/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf" <<'UNIT'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --keep-baud 115200 - $TERM
UNIT
echo debian >"$part/files/etc/hostname"
echo '/dev/vda / ext4 defaults 0 1' >"$part/files/etc/fstab"
cp "$kernel/kernel.deb" "$part/kernel.deb"
chmod -R go+rX "$part"

echo "making a Debian 12 root disk (about two minutes)" >&2
mmdebstrap --quiet --variant=minbase \
    --include=systemd-sysv,udev,dbus,kmod,linux-base,initramfs-tools,zstd,e2fsprogs,iproute2 \
    --customize-hook="sync-in '$part/files' /" \
    --customize-hook="copy-in '$part/kernel.deb' /" \
    --customize-hook='chroot "$1" dpkg --install /kernel.deb >/dev/null' \
    --customize-hook='rm "$1/kernel.deb"' \
    bookworm "$part/root.tar" "${sources[@]}" >"$part/log" 2>&1 || { cat "$part/log" >&2; die "mmdebstrap failed"; }

tar -C "$part" -xf "$part/root.tar" "./boot/vmlinuz-$release" "./boot/initrd.img-$release"
# As the owners mmdebstrap gave the files, whoever runs this.
as_root=()
((EUID == 0)) || as_root=(fakeroot)
"${as_root[@]}" bash -euc '
    mkdir "$1/root"
    tar -C "$1/root" -xf "$1/root.tar" --exclude "./dev/*"
    truncate --size 2G "$1/root.img"
    /sbin/mke2fs -q -t ext4 -L root -d "$1/root" "$1/root.img"
    chmod -R u+rwX "$1/root"' _ "$part"
mv "$part/boot/vmlinuz-$release" "$here/vmlinuz"
mv "$part/boot/initrd.img-$release" "$here/initrd.img"
mv "$part/root.img" "$here/root.img"
