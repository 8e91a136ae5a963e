# Shared by tests/lab/kernels and tests/node/parts, which source it after common.bash: packages of other Debian suites than this
# machine's, unpacked in the cache and never installed.
# shellcheck shell=bash

cache=${PODSHAPER_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/podshaper-lab}
suites=(bullseye bookworm trixie trixie-backports sid)
# The suites whose sources are wanted: for Kubernetes.
source_suites=(bookworm)

# One at a time, as long as the caller lives: two that start together must not fetch the same.
lock_cache() {
    mkdir -p "$cache"
    exec {lock}>"$cache/lock"
    flock "$lock"
}

# apt over those suites, apart from this machine's own; from the mirror that this machine uses.
apt() {
    local tool=$1 state=$cache/apt
    shift
    "$tool" -o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$state/lists" \
        -o "Dir::State::status=$state/status" -o "Dir::Cache=$state/cache" -o Acquire::Languages=none -o APT::Sandbox::User=root \
        -o Acquire::Check-Valid-Until=false "$@" # an old suite is not signed anew every week
}

# Once a day.
update_apt() {
    local mirror suite keyring=signed-by=/usr/share/keyrings/debian-archive-keyring.gpg new=$cache/apt/sources.list.new
    mkdir -p "$cache"/apt/{lists/partial,cache/archives/partial}
    # shellcheck disable=SC2016 # apt's variables
    mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' | sed -n 's/^Debian //p' | head -n 1)
    [[ $mirror ]] || die "apt knows no mirror of Debian here; is this Debian, and has apt-get update been run?"
    {
        for suite in "${suites[@]}"; do
            echo "deb [$keyring] $mirror $suite main"
        done
        for suite in "${source_suites[@]}"; do
            echo "deb-src [$keyring] $mirror $suite main"
        done
    } >"$new"
    if cmp --quiet "$new" "$cache/apt/sources.list" && [[ -e $cache/apt/updated && -z $(find "$cache/apt/updated" -mtime +0) ]]; then
        return
    fi
    mv "$new" "$cache/apt/sources.list"
    : >"$cache/apt/status"
    # By itself apt calls it a success when it reached nothing.
    apt apt-get --quiet=2 --error-on=any update >&2 || die "could not read $mirror"
    touch "$cache/apt/updated"
}

# unpack DIRECTORY PACKAGE..: each may name its suite, as in containerd/trixie.
unpack() {
    local directory=$1 package packages
    shift
    packages=$(mktemp -d "$cache/packages.XXXXXX")
    (cd "$packages" && apt apt-get --quiet=2 download "$@" >&2) || die "could not fetch $*"
    mkdir -p "$directory"
    for package in "$packages"/*.deb; do
        dpkg-deb --extract "$package" "$directory"
    done
    rm -r "$packages"
}
