# tests/lab/kernels, tests/node/parts and others source this file after common.bash. It fetches packages of other Debian suites than
# this machine's, and unpacks them in the cache without installing them.
# shellcheck shell=bash

cache=${PODSHAPER_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/podshaper-lab}
suites=(bullseye bookworm trixie trixie-backports sid)
# The suites whose source packages are fetched, too (Kubernetes).
source_suites=(bookworm)

# Locks the cache until the caller exits: two scripts that start together must not fetch the same packages.
lock_cache() {
    mkdir -p "$cache"
    exec {lock}>"$cache/lock"
    flock "$lock"
}

# Runs an apt tool on those suites, with state apart from this machine's own, from the mirror that this machine uses.
apt() {
    local tool=$1 state=$cache/apt
    shift
    "$tool" -o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$state/lists" \
        -o "Dir::State::status=$state/status" -o "Dir::Cache=$state/cache" -o Acquire::Languages=none -o APT::Sandbox::User=root \
        -o Acquire::Check-Valid-Until=false "$@" # the signature of an old suite has expired
}

# Reads the package lists of the suites, once a day.
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
    # Without --error-on=any apt-get succeeds even if it reached no mirror.
    apt apt-get --quiet=2 --error-on=any update >&2 || die "could not read $mirror"
    touch "$cache/apt/updated"
}

# unpack DIRECTORY PACKAGE..: unpacks the packages into the directory. A package may name its suite, as in containerd/trixie.
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
