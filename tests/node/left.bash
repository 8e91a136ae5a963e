# The tests that have a whole machine to themselves source this file after lib.bash. It finds what one pod, or all pods, leave on the machine.
# shellcheck shell=bash
: "${driver:?}"

# pins_of UID: prints the owner record of each limited interface of the pod.
pins_of() {
    find /sys/fs/bpf/podshaper -path "*/$1/*" -name OWNER
}

no_pins_of() {
    [[ ! $(pins_of "$1") ]]
}

# With systemd's cgroups kubelet 1.20 also makes directories of cgroupfs' shape and leaves them. They are unused, and are not listed here.
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
