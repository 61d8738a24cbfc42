# Sourced by the project's scripts: where things are, and how an initramfs is put together.
# shellcheck shell=bash

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$repository/.work      # everything generated; git ignores it
kernel=$work/kernel         # what scripts/kernel made: vmlinuz, vmlinux, lib/modules, package, version

die() { echo "error: $*" >&2; exit 1; }
note() { echo "note: $*" >&2; }

# Why the host's KVM does not boot an unmodified kernel; fails if it does. A paravirtual KVM (kvm_pvm) has a
# /dev/kvm that opens, but neither VMX nor SVM behind it: a stock kernel never gets past its real-mode start.
# tests/lab/outer.rs asks the same.
kvm_problem() {
    if [[ ! -e /dev/kvm ]]; then
        echo "there is no /dev/kvm"
    elif [[ ! -r /dev/kvm || ! -w /dev/kvm ]]; then
        echo "/dev/kvm is not open to you (its group: $(stat -c %G /dev/kvm))"
    elif [[ -d /sys/module/kvm_pvm ]] || ! grep -qwE 'vmx|svm' /proc/cpuinfo; then
        echo "/dev/kvm has no hardware virtualisation behind it, which an unmodified kernel needs"
    else
        return 1
    fi
}

# Whether $1 exists and is newer than every other argument.
up_to_date() {
    local target=$1 source
    shift
    [[ -e $target ]] || return 1
    for source; do
        [[ ! $source -nt $target ]] || return 1
    done
}

# copy_image FROM TO: an image of one's own, sharing blocks with the other where the file system can.
copy_image() {
    cp --reflink=auto --sparse=always "$1" "$2.part"
    chmod u+w "$2.part"
    mv "$2.part" "$2"
}

# copy_busybox ROOT: busybox and a link for every applet.
copy_busybox() {
    mkdir -p "$1"/{bin,dev,etc,proc,root,run,sys,tmp}
    cp /bin/busybox "$1/bin/busybox"
    local applet
    while read -r applet; do
        [[ $applet == busybox ]] || ln -sf busybox "$1/bin/$applet"
    done < <(/bin/busybox --list)
    ln -sfn bin "$1/sbin"
}

# copy_program ROOT PROGRAM: a program, at its own path, with the libraries it loads.
copy_program() {
    local file
    install -D "$2" "$1$2"
    while read -r file; do
        [[ -e $1$file ]] || install -D "$file" "$1$file"
    done < <(ldd "$2" 2>/dev/null | grep -oE '/[^ ]+' || true)
}

# copy_modules ROOT MODULE…: kernel modules with all they depend on, and the index modprobe reads, which
# names only those: reading the whole one takes an emulated CPU a while.
copy_modules() {
    local root=$1 release tree target file
    release=$(<"$kernel/release")
    tree=$kernel/lib/modules/$release
    target=$root/lib/modules/$release
    mkdir -p "$target"
    shift
    while read -r file; do
        install -D -m 644 "$tree/$file" "$target/$file"
        grep "^$file:" "$tree/modules.dep"
    done < <(modules_with_dependencies "$tree/modules.dep" "$@") >"$target/modules.dep"
}

# modules_with_dependencies MODULES.DEP MODULE…: paths below the module tree; - and _ are one letter.
modules_with_dependencies() {
    local index=$1
    shift
    awk -v wanted="$*" '
        BEGIN { n = split(wanted, names, " ") }
        { line = $0; sub(/:.*/, "", line); name = line; sub(/.*\//, "", name); sub(/\.ko.*/, "", name)
          gsub(/-/, "_", name); path[name] = line; needs[name] = $0 }
        END {
            for (i = 1; i <= n; i++) {
                name = names[i]; gsub(/-/, "_", name)
                if (!(name in path)) { print "error: no module " name > "/dev/stderr"; exit 1 }
                count = split(needs[name], files, /:? +|:$/)
                for (j = 1; j <= count; j++) if (files[j] != "" && !(files[j] in seen)) { seen[files[j]]; print files[j] }
            }
        }' "$index"
}

# pack_initramfs ROOT FILE: the same bytes for the same files, so that a lock file can have its digest; not
# compressed, since what unpacks it is often an emulated CPU.
pack_initramfs() {
    find "$1" -exec touch --no-dereference --date=@0 {} +
    (cd "$1" && find . -print0 | LC_ALL=C sort -z |
        cpio --null --create --format=newc --reproducible --owner=0:0 --quiet) >"$2.part"
    mv "$2.part" "$2"
}
