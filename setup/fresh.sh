#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Tries the README's promise: a bare Debian, this checkout, `make setup` twice (or the targets given).
#
#     setup/fresh.sh                    Debian 12, then Debian 13
#     setup/fresh.sh 13 demo test       Debian 13 alone, each target twice
#
# For those who change set-up; needs root, debootstrap, and some minutes. The machine is a chroot in a directory of its
# own (under TMPDIR; 4 GB for the tests), with this machine's mirror, pip configuration and network. What is mounted goes
# with the mount namespace.
set -euo pipefail
cd "$(dirname "$0")/.."

releases=()
while [[ ${1:-} =~ ^1[23]$ ]]; do
    releases+=("$1")
    shift
done
if [ "${#releases[@]}" = 0 ]; then releases=(12 13); fi
if [ "$#" = 0 ]; then set -- setup; fi
if [ "${#releases[@]}" != 1 ]; then
    for release in "${releases[@]}"; do "$0" "$release" "$@"; done
    exit
fi
release=${releases[0]}
suite=$([ "$release" = 12 ] && echo bookworm || echo trixie)

if [ "${SEVCHAOS_FRESH:-}" = "" ]; then
    SEVCHAOS_FRESH=$(mktemp -d) exec unshare --mount --propagation private "$0" "$release" "$@"
fi
fresh=$SEVCHAOS_FRESH
trap 'umount -R "$fresh"/{proc,dev,opt} 2>/dev/null; rm -rf --one-file-system "$fresh"' EXIT
say() { echo "fresh: Debian $release: $*"; }

# Where this machine takes Debian from, if it does.
place() { # $1: what is in the URI, $2: where else
    local found
    # shellcheck disable=SC2016
    found=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep "$1" || true)
    found=${found%%$'\n'*}
    echo "${found:-$2}"
}
mirror=$(place '/debian/$' http://deb.debian.org/debian/)
security=$(place '/debian-security/$' http://deb.debian.org/debian-security/)

say "making it in $fresh"
debootstrap --variant=minbase "$suite" "$fresh" "$mirror" >"$fresh.log" 2>&1 || { tail "$fresh.log"; exit 1; }
rm -f "$fresh.log"
printf 'deb %s %s main\n' "$mirror" "$suite" "$mirror" "$suite-updates" "$security" "$suite-security" \
    >"$fresh/etc/apt/sources.list"
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf; do
    if [ -f "$file" ]; then install -D -m 644 "$file" "$fresh$file"; fi
done
mapfile -t pip < <(env | grep '^PIP_' || true)
certificates=/etc/ssl/certs/ca-certificates.crt
if [ -f "$certificates" ]; then # under another name, or a package would replace it
    install -m 644 "$certificates" "$fresh/etc/pip-certificates.crt"
    pip+=(PIP_CERT=/etc/pip-certificates.crt)
fi
mount --bind /proc "$fresh/proc"
mount --rbind /dev "$fresh/dev"
mount --bind /opt "$fresh/opt"

# make has to be there, says the README.
chroot "$fresh" sh -c 'apt-get -qq update && apt-get -qq -y install make >/dev/null 2>&1'
mkdir "$fresh/src"
git ls-files -z | tar --null -T - -c | tar -x -C "$fresh/src"
for target in "$@" "$@"; do
    say "make $target"
    start=$SECONDS
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb "${pip[@]}" \
        chroot "$fresh" make -C /src "$target" </dev/null
    say "make $target took $((SECONDS - start)) s"
done
