#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a machine ready for sevchaos: Debian packages, QEMU, a virtual environment, two kernels in the cache.
#
# It looks at what is there, says what it is about to install, and installs that; repeating it costs a second.
# Root is needed only for packages, so never once those are there. Nothing is asked of the person in front.
set -euo pipefail # so no pipe into `grep -q` or `head`: who writes more than they read would be a failure
cd "$(dirname "$0")/.."

# shellcheck disable=SC1090
. "${SEVCHAOS_OS_RELEASE:-/etc/os-release}" 2>/dev/null || true # the variable is for the tests
distribution="${ID:-} ${VERSION_ID:-}"

# gcc, make and binutils build the lab's two small kernel modules, and with libc6-dev the native loops; kmod has depmod.
packages=(binutils gcc kmod libc6-dev make)
# The libraries are what the tools in Debian's kernel headers are linked with, and the keyring is what apt verifies these
# kernels against: under the names of each distribution whose packages set-up may install.
case "$distribution" in
"debian 12") packages+=(libelf1 libssl3) ;;
"debian 13") packages+=(libelf1t64 libssl3t64) ;;
"ubuntu 24.04" | "ubuntu 24.10" | "ubuntu 25."* | "ubuntu 26."*) packages+=(debian-archive-keyring libelf1t64 libssl3t64) ;;
*) packages=() ;;
esac
newest_single_threaded=9 # QEMU's major version; see chaos/lab/qemu.py
state=.venv/.setup

# What installs the same elsewhere.
how_elsewhere() {
    case "${ID:-} ${ID_LIKE:-}" in
    *fedora* | *rhel*) echo "dnf install gcc make binutils kmod busybox qemu-system-x86-core python3" ;;
    *arch*) echo "pacman -S gcc make binutils kmod busybox qemu-system-x86 python" ;;
    *suse*) echo "zypper install gcc make binutils kmod busybox-static qemu-x86 python311" ;;
    *debian* | *ubuntu*)
        echo "apt-get install gcc make binutils kmod libc6-dev qemu-system-x86 python3 python3-venv debian-archive-keyring" ;;
    *) echo "your package manager has them" ;;
    esac
}

say() { printf 'setup: %s\n' "$*" >&2; }

die() {
    say "$1"
    shift
    for line in "$@"; do say "  $line"; done
    exit 69
}

may_be_root() { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null; }; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

# apt writes a page for every package; it is kept for when something goes wrong.
apt_get() {
    if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" \
        >"$state/apt.log" 2>&1 </dev/null; then
        tail -n 15 "$state/apt.log" >&2
        return 1
    fi
}

usable_python() { "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

choose_python() {
    for python in "${SEVCHAOS_PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if usable_python "$python"; then return; fi
    done
    python=
}

# The major version of the newest QEMU that sevchaos would choose, 0 when there is none.
qemu_major() {
    local newest=0 program found
    for program in ${SEVCHAOS_QEMU:-$(type -ap qemu-system-x86_64 || true)}; do
        found=$("$program" --version 2>/dev/null) || continue
        if [[ $found =~ version\ ([0-9]+)\. ]] && [ "${BASH_REMATCH[1]}" -gt "$newest" ]; then
            newest=${BASH_REMATCH[1]}
        fi
    done
    echo "$newest"
}

not_installed() {
    local name
    for name in "$@"; do
        if [ "$(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null)" != installed ]; then echo "$name"; fi
    done
}

# Packages

known_system() {
    local missing qemu want_backports=
    mapfile -t missing < <(not_installed "${packages[@]}")
    choose_python
    if [ -z "$python" ]; then mapfile -t -O "${#missing[@]}" missing < <(not_installed python3 python3-venv); fi
    qemu=$(qemu_major)
    if [ "$distribution" != "debian 12" ]; then # their own QEMU is what there is
        if [ "$qemu" = 0 ]; then missing+=(qemu-system-x86); fi
    elif [ "$qemu" = 0 ] || { [ "$qemu" -le "$newest_single_threaded" ] && newer_qemu_is_worth_a_try; }; then
        want_backports=yes
    fi
    if [ "${#missing[@]}" = 0 ] && [ -z "$want_backports" ]; then return; fi

    if [ "${#missing[@]}" != 0 ]; then say "about to install, with apt-get as root: ${missing[*]}"; fi
    if [ -n "$want_backports" ]; then
        say "about to install, with apt-get as root: qemu-system-x86 from the bookworm-backports suite"
        say "  (Debian 12's own is 7.2, which can run the lab in a single thread only)"
    fi
    if ! may_be_root; then
        die "this needs root, and there is none: you are not root, and sudo is not there or wants a password" \
            "run this as root once, or have somebody install the packages above; after that nothing needs root"
    fi
    say "fetching apt's package lists"
    apt_get update || die "apt-get update failed; is there a network?"
    if [ "${#missing[@]}" != 0 ]; then
        say "installing ${missing[*]}"
        apt_get install --no-install-recommends "${missing[@]}" || die "apt-get could not install the packages"
    fi
    if [ -n "$want_backports" ]; then install_qemu "$qemu"; fi
}

# With an older QEMU the lab works. A newer one is tried for once a day at most, and only where root is at hand.
newer_qemu_is_worth_a_try() {
    [ -z "${SEVCHAOS_QEMU:-}" ] && may_be_root && [ -z "$(find "$state/qemu-tried" -mtime -1 2>/dev/null)" ]
}

install_qemu() { # $1: the major version that is there, or 0
    touch "$state/qemu-tried"
    if add_backports; then
        say "installing qemu-system-x86 from bookworm-backports"
        if apt_get install --no-install-recommends -t bookworm-backports qemu-system-x86; then return; fi
    fi
    if [ "$1" = 0 ]; then
        say "bookworm-backports is not to be had; installing Debian 12's own qemu-system-x86 instead"
        apt_get install --no-install-recommends qemu-system-x86 || die "apt-get could not install qemu-system-x86"
    fi
    say "notice: with this QEMU the lab runs in a single thread, which is slower"
}

knows_backports() { [[ $(apt-cache madison qemu-system-x86 2>/dev/null) = *bookworm-backports* ]]; }

# Add the backports suite of the mirror that this machine already takes bookworm from.
add_backports() {
    local list=/etc/apt/sources.list.d/sevchaos-backports.list keyring mirror option=
    if knows_backports; then return; fi
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(REPO_URI)' \
        'Created-By: Packages' 'Codename: bookworm' 'Component: main')
    mirror=${mirror%%$'\n'*}
    if [ -z "$mirror" ]; then return 1; fi
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    if [ -f "$keyring" ]; then option="[signed-by=$keyring] "; fi
    say "adding $list, the backports suite of $mirror"
    echo "deb ${option}$mirror bookworm-backports main" | as_root tee "$list" >/dev/null
    if apt_get update -o "Dir::Etc::sourcelist=$list" -o Dir::Etc::sourceparts=/dev/null \
        -o APT::Get::List-Cleanup=0 && knows_backports; then
        return
    fi
    as_root rm -f "$list"
    return 1
}

# Elsewhere we say what is needed, and install nothing.
other_system() {
    local missing=() name
    for name in gcc make ld depmod; do
        if ! PATH="$PATH:/usr/sbin:/sbin" command -v "$name" >/dev/null; then missing+=("$name"); fi
    done
    # What the lab's userland is made of; with apt it is fetched with the kernels.
    if ! command -v apt-get busybox.static busybox-static busybox >/dev/null; then missing+=("a static busybox"); fi
    if [ "$(qemu_major)" = 0 ]; then missing+=("qemu-system-x86_64 (7.2 or later)"); fi
    choose_python
    if [ -z "$python" ]; then missing+=("python 3.11 or later with venv"); fi
    if [ "${#missing[@]}" = 0 ]; then return; fi
    local IFS=,
    die "set-up installs packages on Debian 12 and 13 and Ubuntu from 24.04 on, and this is ${1:-another system}. Missing here: ${missing[*]}" \
        "install these ($(how_elsewhere)) and run this again." \
        "To use a kernel that you have: --kernel running, --kernel installed:RELEASE, or --kernel PATH of a build tree"
}

# The virtual environment

virtual_environment() {
    local wanted here=$PWD/.venv shebang="#!$PWD/.venv/"
    wanted=$(cat pyproject.toml setup/constraints.txt <(echo "$here") | sha256sum)
    if [ "$(cat "$state/venv" 2>/dev/null)" = "$wanted" ] && .venv/bin/python setup/pins.py; then return; fi
    say "about to install, with pip into .venv: sevchaos and the libraries that pyproject.toml pins"
    # One that was moved, or whose Python is gone, is made anew.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || [ "$(head -c "${#shebang}" .venv/bin/pip)" != "$shebang" ]; then
        rm -rf .venv/bin .venv/lib .venv/lib64 .venv/include .venv/pyvenv.cfg
        "$python" -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --use-pep517 \
        --constraint setup/constraints.txt --editable '.[dev]' ||
        die "pip could not install; is there a network, or a mirror in pip's configuration?"
    .venv/bin/python setup/pins.py || die "pip installed other versions than those pinned"
    echo "$wanted" >"$state/venv"
}

main() {
    if [ "$(uname -m)" != x86_64 ] || [ "$(uname -s)" != Linux ]; then
        die "sevchaos needs Linux on x86-64, and this is $(uname -sm)"
    fi
    mkdir -p "$state"
    exec 9>"$state/lock" # two at once: the second waits, then finds nothing left to do
    if ! flock -n 9; then
        say "waiting for another set-up that is at work here"
        flock 9
    fi
    if [ "${#packages[@]}" != 0 ]; then known_system; else other_system "${PRETTY_NAME:-}"; fi
    choose_python
    virtual_environment
    if [ "${#packages[@]}" != 0 ] || [ "$#" != 0 ]; then .venv/bin/python setup/kernels.py "$@"; fi
}

main "$@"
