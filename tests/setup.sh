#!/usr/bin/env bash
# Prepares a Debian-like machine for the cluster tests: system packages first, then the Go programs
# of tests/cluster, each built once into a cache folder outside the clone under a name that holds a
# hash of its sources. What is already there is skipped; a second run takes well under a second.
#
#   tests/setup.sh            install and build what is missing
#   tests/setup.sh --check    say what is missing and change nothing (exit status 1 if anything is)
#   tests/setup.sh --fleet    also build kwok, which `make soak-fleet` alone needs
set -euo pipefail
cd "$(dirname "$0")"

cache="${XDG_CACHE_HOME:-$HOME/.cache}/plimsoll/cluster"
only_check=false
[ "${1:-}" = --check ] && only_check=true
missing=0

say() { printf 'setup: %s\n' "$*"; }

# Debian package and one file it brings: the file decides, so other distributions may install theirs.
packages="
containerd:/usr/bin/containerd
runc:/usr/sbin/runc
containernetworking-plugins:/usr/lib/cni/bridge
iptables:/usr/sbin/iptables
ipset:/usr/sbin/ipset
conntrack:/usr/sbin/conntrack
iproute2:/usr/sbin/ip
util-linux:/usr/bin/nsenter
busybox-static:/bin/busybox
prometheus:/usr/bin/prometheus
curl:/usr/bin/curl
ca-certificates:/etc/ssl/certs/ca-certificates.crt
"

install_packages() {
    local wanted=() entry
    for entry in $packages; do
        [ -e "${entry#*:}" ] || wanted+=("${entry%%:*}")
    done
    if [ ${#wanted[@]} -eq 0 ]; then
        say "system packages are all there"
        return
    fi
    if $only_check; then
        say "missing packages: ${wanted[*]}"
        missing=1
        return
    fi
    local root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    say "installing ${wanted[*]}"
    # Where a service manager runs, containerd and Prometheus start; the tests run their own, apart.
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
}

# The same sixteen hex digits as `tools.rs` computes.
key_of() { (cd "cluster/$1" && { cat go.mod go.sum main.go 2>/dev/null || true; } | sha256sum | cut -c1-16); }

build() { # name, linker flags
    local name=$1 target
    target="$cache/$name-$(key_of "$name")"
    if [ -x "$target" ]; then
        say "$name is built ($target)"
        return
    fi
    if $only_check; then
        say "missing program: $name ($target)"
        missing=1
        return
    fi
    mkdir -p "$cache"
    say "building $name with $(go version | cut -d' ' -f3) (minutes, once)"
    local began=$SECONDS scratch
    scratch=$(mktemp -d "$cache/.build-XXXXXX")
    # The compiler's own cache would keep some 5 GB; it goes with the scratch folder unless GOCACHE is set.
    # An older Go fetches the one that go.mod asks for.
    (cd "cluster/$name" && CGO_ENABLED=0 GOTOOLCHAIN=auto GOCACHE="${GOCACHE:-$scratch/go}" \
        go build -trimpath -ldflags "-s -w ${2:-}" -o "$scratch/$name" .)
    mv "$scratch/$name" "$target"
    rm -rf "$scratch"
    say "built $name in $((SECONDS - began)) s, $(du -h "$target" | cut -f1)"
}

install_packages
version=k8s.io/component-base/version
build kube "-X $version.gitVersion=v1.34.4 -X $version.gitMajor=1 -X $version.gitMinor=34"
build addons
build pause
build judges
[ "${1:-}" != --fleet ] || build kwok
exit $missing
