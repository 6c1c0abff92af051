#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Tries the README's promise: a fresh Debian 12, this checkout, `make setup` twice (or the targets given).
#
# For those who change set-up; needs root, debootstrap, and some minutes. The machine is a chroot in a directory
# of its own, with the apt and pip configuration of this one. What is mounted goes with the mount namespace.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$#" = 0 ]; then set -- setup; fi
if [ "${SEVCHAOS_FRESH:-}" = "" ]; then
    SEVCHAOS_FRESH=$(mktemp -d) exec unshare --mount --propagation private "$0" "$@"
fi
fresh=$SEVCHAOS_FRESH
trap 'umount -R "$fresh"/{proc,dev,opt} 2>/dev/null; rm -rf --one-file-system "$fresh"' EXIT

mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm')
echo "fresh: making a Debian 12 in $fresh"
debootstrap --variant=minbase bookworm "$fresh" "${mirror%%$'\n'*}" >"$fresh.log" 2>&1 || { tail "$fresh.log"; exit 1; }
rm -f "$fresh.log" "$fresh/etc/apt/sources.list"
cp -r /etc/apt/sources.list.d/debian.sources "$fresh/etc/apt/sources.list.d/" ||
    cp /etc/apt/sources.list "$fresh/etc/apt/"
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
    echo "fresh: make $target"
    start=$SECONDS
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb "${pip[@]}" \
        chroot "$fresh" make -C /src "$target" </dev/null
    echo "fresh: make $target took $((SECONDS - start)) s"
done
