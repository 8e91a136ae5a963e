# Sourced after lib.bash by the tests that have a whole machine to themselves: what a pod, and all of them, leave on it.
# shellcheck shell=bash
: "${driver:?}"

# pins_of UID: the owner's record of each of its interfaces that is limited.
pins_of() {
    find /sys/fs/bpf/podshaper -path "*/$1/*" -name OWNER
}

no_pins_of() {
    [[ ! $(pins_of "$1") ]]
}

# With systemd's cgroups kubelet 1.20 makes directories of the other shape, too, and leaves them; they are of no use to anybody.
pod_cgroups() {
    local shape='pod*'
    [[ $driver == cgroupfs ]] || shape='kubepods*-pod*.slice'
    find /sys/fs/cgroup -type d -name "$shape"
}

left_over() {
    ctr tasks list --quiet
    pod_cgroups
    find /sys/fs/bpf -mindepth 3
    bpftool prog list | grep -E 'cgroup_skb|sock_ops' || true
    ip -brief link show type veth | grep ^veth || true
    find /var/lib/cni/networks -name '10.*'
}

clean() {
    [[ ! $(left_over 2>&1) ]]
}
