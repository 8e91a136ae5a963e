# tests/xtask, tests/lab/uml, tests/lab/vm and others source this file. It installs missing packages, and runs one command in a kernel.
#
# A kernel is a group of processes on this machine. It gets a directory ($work) with the command. It writes the command's output and exit
# status to descriptors that are pipes here (guest says how). It is not shut down but killed, and all its processes end with it.
# shellcheck shell=bash

EXIT_LATE=124 # as timeout(1)
EXIT_NO_KERNEL=125
: "$EXIT_LATE" "$EXIT_NO_KERNEL"

die() {
    echo "${0##*/}: $*" >&2
    exit "$EXIT_NO_KERNEL"
}

# need PROGRAM-OR-FILE:PACKAGE..: installs the Debian packages whose program or file is missing.
need() {
    local need missing=()
    for need; do
        command -v "${need%%:*}" >/dev/null || [[ -e ${need%%:*} ]] || missing+=("${need##*:}")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    command -v apt-get >/dev/null || die "please install: ${missing[*]} (Debian's names; there is no apt-get here)"
    [[ $EUID -eq 0 ]] || die "please install: ${missing[*]} (this is not root)"
    echo "${0##*/}: installing ${missing[*]}" >&2
    # Another stage of the tests may be installing packages.
    local install=(apt-get --option DPkg::Lock::Timeout=300 install --yes --quiet --no-install-recommends "${missing[@]}")
    export DEBIAN_FRONTEND=noninteractive
    { "${install[@]}" || { apt-get update --quiet && "${install[@]}"; }; } >&2 || die "could not install ${missing[*]}"
}

# Reads [--seconds N] [--memory MB] [--] COMMAND [ARGS..] into $seconds, $memory and $command.
parse() {
    seconds=600 memory=1024
    while [[ $# -gt 0 ]]; do
        case $1 in
        --seconds) seconds=${2-} ;;
        --memory) memory=${2-} ;;
        --) shift && break ;;
        -*) usage ;;
        *) break ;;
        esac
        shift 2 || usage
    done
    [[ $seconds =~ ^[1-9][0-9]*$ && $memory =~ ^[1-9][0-9]*$ && $# -gt 0 ]] || usage
    command=("$@")
}

# Prints the comment at the top of the script.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# Makes $work, and the descriptors $out, $err and $status that the kernel writes to.
prepare_work() {
    kernel='' pumps=()
    trap clean EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    work=$(mktemp -d "${TMPDIR:-/tmp}/podshaper-lab.XXXXXX")
    {
        declare -px
        printf 'cd -- %q\nexec ' "$PWD"
        printf '%q ' "${command[@]}"
    } >"$work/command"
    exec {out}> >(exec cat)
    pumps+=($!)
    exec {err}> >(exec cat >&2)
    pumps+=($!)
    mkfifo "$work/status"
    exec {status}<>"$work/status"
}

# Kills the kernel, whose first process is $kernel, and waits until its last output is printed.
clean() {
    trap '' INT TERM HUP
    # The whole process group: a kernel has helper processes.
    [[ -z $kernel ]] || kill -KILL -- "-$kernel" 2>/dev/null || true
    [[ -z ${out-} ]] || exec {out}>&-
    [[ -z ${err-} ]] || exec {err}>&-
    wait "${pumps[@]}" 2>/dev/null || true
    [[ -z ${work-} ]] || rm -rf "$work"
}

# Waits for the command's exit status and exits with it.
finish() {
    local deadline=$((SECONDS + seconds)) line=
    # Otherwise bash reports that the kernel was killed.
    disown "$kernel"
    until [[ $line ]]; do
        if read -r -t 1 -u "$status" line; then
            :
        elif ! kill -0 "$kernel" 2>/dev/null; then
            tail -n 40 "$work/console" >&2
            die "the kernel died before the command ended; above is the end of its log"
        elif [[ $SECONDS -ge $deadline ]]; then
            tail -n 5 "$work/console" >&2
            echo "${0##*/}: killed: the command had not ended after $seconds s" >&2
            exit "$EXIT_LATE"
        fi
    done
    [[ $line =~ ^[0-9]+$ ]] || { tail -n 40 "$work/console" >&2; die "$line"; }
    exit "$line"
}
