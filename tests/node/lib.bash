# The tests of this directory source this file. It has a node made of containerd and kubelet, the specification of its pods, the measurement of
# their rates, and the counting of tests. All files are written to the directory $run.
# shellcheck shell=bash

# Set by the scripts that source this file: their directory, the programs to test, the network interface that leads away from the node.
: "${run:?} ${podshaper:?} ${traffic:?} ${uplink:?}"
parts=${PODSHAPER_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/podshaper-lab}/node
passed=0 failed=0
# Seconds to wait for kubelet and others: a kubelet in User Mode Linux on a busy machine is slow.
PATIENCE=${PATIENCE:-120}
# The least and the largest part of the limit that a rate may have: TCP over 5 s, on a busy machine.
LOW=0.90 HIGH=1.04

# it CLAIM COMMAND..: runs a test and prints its output. The test fails when one of its commands fails.
it() {
    local claim=$1 status=0 start=$SECONDS
    shift
    # A subshell with its own -e: bash ignores -e in a function that is called as a condition.
    set +e
    (
        set -e
        "$@"
    ) >"$run/test.log" 2>&1
    status=$?
    set -e
    if [[ $status -eq 0 ]]; then
        passed=$((passed + 1))
        echo "test $claim ... ok ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1))
        echo "test $claim ... FAILED ($((SECONDS - start)) s)"
    fi
    sed 's/^/    /' "$run/test.log"
    [[ $status -eq 0 ]] || explain
}

# Prints the ends of the logs of a test that failed.
explain() {
    local log
    for log in "$run"/{podshaper,kubelet,containerd}.log; do
        [[ -s $log ]] || continue
        echo "    -- the end of ${log##*/}:"
        { grep -vE '^I[0-9]|level=info' "$log" || true; } | tail -n 8 | cut -c 1-500 | sed 's/^/    /'
    done
}

# Prints the last line of a run in the format of cargo's tests: tests/run adds up these lines.
results() {
    echo "test result: $([[ $failed -eq 0 ]] && echo ok || echo FAILED). $passed passed; $failed failed; 0 ignored"
    [[ $failed -eq 0 ]]
}

# combination RUNTIME DRIVER QOS PLUGIN SPEC RESULT: adds a combination that passed to the table at the end.
combination() {
    local IFS=$'\t'
    echo "$*" >>"$run/combinations"
}

combinations() {
    [[ -s $run/combinations ]] || return 0
    echo "what passed:"
    { printf 'runtime\tcgroup driver\tQoS class\tprimary plugin\tspec\tmeasured\n' && cat "$run/combinations"; } |
        awk -F '\t' '{ printf "  %-18s %-16s %-11s %-15s %-6s %s\n", $1, $2, $3, $4, $5, $6 }'
}

# until_true SECONDS COMMAND..: repeats the command until it succeeds. After that time it names the command and fails.
until_true() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [[ $SECONDS -lt $deadline ]] || { echo "in vain waited for: $*" && return 1; }
        sleep 0.5
    done
}

fail() {
    echo "$*"
    return 1
}

# below_systemd COMMAND..: runs the command as a service of a systemd, which is the first process of a pid namespace of its own. Exits with the
# command's status.
below_systemd() {
    local units=/run/systemd/system unit
    mkdir -p "$units" "$run"
    : >"$run/output"
    printf '%s\n' '[Unit]' DefaultDependencies=no '[Service]' Type=oneshot "Environment=PATH=$PATH HOME=/root PODSHAPER_LAB=${parts%/node}" \
        "ExecStart=/bin/bash -c '\"\$\$@\"; echo \$\$? >$run/status' bash $*" \
        "StandardOutput=append:$run/output" "StandardError=append:$run/output" Delegate=yes TimeoutStartSec=infinity >"$units/node.service"
    printf '%s\n' '[Unit]' DefaultDependencies=no Requires=node.service >"$units/node.target"
    # The machine's own services must not run here.
    for unit in systemd-{tmpfiles-setup,tmpfiles-setup-dev,sysctl,modules-load,udevd,udev-trigger,journald,journal-flush,remount-fs,update-utmp}; do
        ln -sf /dev/null "$units/$unit.service"
    done
    tail --follow --lines +1 "$run/output" &
    container=podshaper unshare --pid --fork --mount --mount-proc --propagation private --kill-child \
        /lib/systemd/systemd --system --unit=node.target >"$run/systemd.log" 2>&1 &
    until_true 600 test -s "$run/status" || tail -n 20 "$run/systemd.log"
    sleep 1
    exit "$(cat "$run/status")"
}

kubectl() {
    "$parts/kubectl/kubectl" --kubeconfig "$run/kubeconfig" "$@"
}

# start_api_server WITHOUT: starts etcd and an API server, without the admission plugin WITHOUT if that is not empty. $run/kubeconfig is the
# administrator's.
start_api_server() {
    openssl genrsa -out "$run/sa.key" 2048 2>/dev/null
    openssl rsa -in "$run/sa.key" -pubout -out "$run/sa.pub" 2>/dev/null
    echo 'secret,admin,1,"system:masters"' >"$run/tokens"
    cat >"$run/kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: cluster, cluster: {server: "https://127.0.0.1:6443", certificate-authority: "$run/certificates/apiserver.crt"}}]
users: [{name: admin, user: {token: secret}}]
contexts: [{name: cluster, context: {cluster: cluster, user: admin}}]
current-context: cluster
YAML
    "$parts/etcd/usr/bin/etcd" --data-dir "$run/etcd" --listen-client-urls http://127.0.0.1:2379 \
        --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 >"$run/etcd.log" 2>&1 &
    "$parts/kube-apiserver/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --bind-address=127.0.0.1 \
        --advertise-address=10.99.0.1 --secure-port=6443 --cert-dir="$run/certificates" --service-account-issuer=https://cluster \
        --service-account-signing-key-file="$run/sa.key" --service-account-key-file="$run/sa.pub" --token-auth-file="$run/tokens" \
        --authorization-mode=RBAC --service-cluster-ip-range=10.96.0.0/16 --allow-privileged=true \
        --kubelet-preferred-address-types=InternalIP --disable-admission-plugins="$1" >"$run/kube-apiserver.log" 2>&1 &
    until_true "$PATIENCE" kubectl get --raw /readyz
}

# Makes the node's network: the uplink with its address, and a macvlan interface by which the node reaches macvlan pods on that uplink.
make_uplink() {
    ip link set lo up
    ip link add "$uplink" type veth peer name far0
    ip link set far0 up
    ip address add 10.99.0.1/24 dev "$uplink"
    ip link set "$uplink" up
    ip route add default via 10.99.0.2 dev "$uplink"
    ip link add link "$uplink" name node0 type macvlan mode bridge
    ip address add 10.244.3.1/24 dev node0
    ip link set node0 up
    sysctl --quiet --write net.ipv4.ip_forward=1
}

# lay_out_plugins PART: puts the plugins of the part, flannel's and podshaper into a node's usual directory, and hides the machine's own plugins
# and conflists.
lay_out_plugins() {
    mkdir -p /opt/cni/bin /etc/cni/net.d
    mount -t tmpfs plugins /opt/cni/bin
    mount -t tmpfs conflists /etc/cni/net.d
    ln -s "$parts"/cni-0.9/usr/lib/cni/flannel "$parts/$1"/usr/lib/cni/* /opt/cni/bin/
    install -m 755 "$podshaper" /opt/cni/bin/podshaper
}

# conflist PLUGIN VERSION [KEYS]: writes the conflist of the node's pods. A change needs no restart. KEYS: additional keys of podshaper's entry.
conflist() {
    local plugin=$1 version=$2 ipam primary subnet=10.244.1.0/24
    # A macvlan or ipvlan pod reaches all hosts on the uplink but the node's uplink itself. The node's macvlan interface is in the same subnet.
    [[ $plugin != *vlan ]] || subnet=10.244.3.0/24
    ipam='{"type": "host-local", "ranges": [[{"subnet": "'$subnet'"}]], "routes": [{"dst": "0.0.0.0/0"}]}'
    case $plugin in
    bridge) primary='{"type": "bridge", "bridge": "podshaper0", "isGateway": true, "hairpinMode": true, "ipam": '$ipam'}' ;;
    ptp) primary='{"type": "ptp", "ipam": '$ipam'}' ;;
    macvlan | ipvlan) primary='{"type": "'$plugin'", "master": "'$uplink'", "ipam": '$ipam'}' ;;
    flannel) primary='{"type": "flannel", "subnetFile": "'$run'/subnet.env",
        "delegate": {"bridge": "flannel0", "hairpinMode": true, "isDefaultGateway": true}}' ;;
    esac
    printf '%s\n' FLANNEL_{NETWORK=10.244.0.0/16,SUBNET="${flannel_subnet:-10.244.2.1/24}",MTU=1450,IPMASQ=false} >"$run/subnet.env"
    jq --null-input --arg name "pods-$plugin" --arg version "$version" --argjson primary "$primary" --arg log "$run/podshaper.log" \
        --argjson own "${3:-"{}"}" '{
        cniVersion: $version, name: $name, plugins: [
            $primary,
            {type: "portmap", capabilities: {portMappings: true}},
            ({type: "podshaper", logFile: $log, logLevel: "debug",
              capabilities: {bandwidth: true, cgroupPath: true, "io.kubernetes.cri.pod-annotations": true}} + $own)]}' >"$run/conflist.new"
    use_conflist "$run/conflist.new"
}

use_conflist() {
    cp "$1" /etc/cni/net.d/new
    # Renamed within the directory: containerd does not notice a file that is moved in from another directory.
    mv /etc/cni/net.d/new /etc/cni/net.d/10-pods.conflist
}

# start_containerd VERSION DRIVER
start_containerd() {
    local version=$1 driver=$2 pause
    containerd=$parts/containerd-$version/usr/bin
    case $version in
    1.6) pause=registry.k8s.io/pause:3.6 ;;
    1.7) pause=registry.k8s.io/pause:3.8 ;;
    2.1) pause=registry.k8s.io/pause:3.10 ;;
    esac
    cat >"$run/containerd.toml" <<TOML
version = 2
root = "$run/containerd"
state = "$run/containerd-state"
disabled_plugins = ["io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.nri.v1.nri"]
[grpc]
  address = "$run/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$run/opt"
[ttrpc]
  address = "$run/containerd.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$pause"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "$parts/runc/usr/sbin/runc"
      SystemdCgroup = $([[ $driver == systemd ]] && echo true || echo false)
TOML
    if [[ $version == 2.1 ]]; then
        "$containerd/containerd" --config "$run/containerd.toml" config migrate >"$run/containerd-3.toml"
        sed "s#^\( *sandbox = \).*#\1'$pause'#" "$run/containerd-3.toml" >"$run/containerd.toml"
    fi
    PATH=$containerd:$PATH "$containerd/containerd" --config "$run/containerd.toml" >"$run/containerd.log" 2>&1 &
    until_true 60 ctr version || return
    ctr images import "$parts/image/image.tar" >/dev/null
    runtime="containerd $(ctr version | sed -n '/Server/,$s/.*Version: *v\?\([0-9.]*\).*/\1/p' | head -n 1)"
}

ctr() {
    # At each call ctr warns of the deprecated CRI version that this kubelet speaks.
    "$containerd/ctr" --address "$run/containerd.sock" --namespace k8s.io "$@" 2> >(grep -v DEPRECATION >&2)
}

# kubelet_configuration DRIVER [LINE..]
kubelet_configuration() {
    local driver=$1
    shift
    cat >"$run/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
readOnlyPort: 10255
cgroupDriver: $driver
failSwapOn: false
enableControllerAttachDetach: false
makeIPTablesUtilChains: false
resolvConf: ""
syncFrequency: 5s
fileCheckFrequency: 1s
evictionHard: {}
imageGCHighThresholdPercent: 100
YAML
    printf '%s\n' "$@" >>"$run/kubelet.yaml"
}

# start_kubelet ARGUMENT..: starts kubelet. With --v=3 it logs events, too.
start_kubelet() {
    local program=$parts/kubelet/kubelet
    [[ $runtime != containerd\ 2.* ]] || program=$parts/kubelet-cri-v1/kubelet
    "$program" --config="$run/kubelet.yaml" --container-runtime=remote \
        --container-runtime-endpoint="unix://$run/containerd.sock" --hostname-override=node1 --node-ip=10.99.0.1 \
        --root-dir="$run/kubelet" "$@" >"$run/kubelet.log" 2>&1 &
    until_true 60 curl --silent --fail http://127.0.0.1:10255/pods
}

# template QOS: prints the specification of a pod for these tests. The pod sends to each client that connects to port 5201, and receives on port
# 5202. It writes to its log how much it has received.
template() {
    local resources='{}'
    case $1 in
    guaranteed) resources='{limits: {cpu: 500m, memory: 100Mi}}' ;;
    burstable) resources='{requests: {cpu: 10m}}' ;;
    esac
    cat <<YAML
terminationGracePeriodSeconds: 1
dnsPolicy: Default
automountServiceAccountToken: false
volumes: [{name: traffic, hostPath: {path: "$traffic", type: File}}]
containers:
- name: main
  image: localhost/busybox:1
  imagePullPolicy: Never
  resources: $resources
  volumeMounts: [{name: traffic, mountPath: /traffic}]
  command:
  - /bin/sh
  - -c
  - |
    (while :; do /traffic serve --listen 0.0.0.0:5201 --seconds 30; done) &
    while :; do /traffic sink --listen 0.0.0.0:5202 --seconds 5 --wait 86400; done
YAML
}

# mbit MTU: prints Mbit/s on the wire by traffic's report in report.json, without the first second. 52 bytes of each packet are headers.
mbit() {
    printf '%.2f' "$(jq --argjson mtu "$1" '([.sample_us[] | select(. < 1000000)] | length) as $from |
        (.payload_bytes[-1] - .payload_bytes[$from]) * 8 / (.sample_us[-1] - .sample_us[$from]) * $mtu / ($mtu - 52)' "$run/report.json")"
}

milliseconds() { echo $(($(date +%s%N) / 1000000)); }

# rate_between FROM TO: prints Mbit/s on the wire between two times of the flow in report.json. Times are in milliseconds.
rate_between() {
    jq --argjson from "$1" --argjson to "$2" '[.sample_us, .payload_bytes] | transpose
        | map(select(.[0] >= $from * 1000 and .[0] <= $to * 1000))
        | (last[1] - first[1]) * 8 / (last[0] - first[0]) * 1500 / 1448' "$run/report.json"
}

# within RATE LIMIT
within() {
    awk -v rate="$1" -v limit="$2" -v low="$LOW" -v high="$HIGH" 'BEGIN { exit !(rate >= low * limit && rate <= high * limit) }'
}

# attempts LIMIT DIRECTION COMMAND..: fails unless the rate that the command prints is LIMIT Mbit/s. A higher rate fails at once. A lower rate is
# measured again, since the machine may have been busy.
attempts() {
    local limit=$1 direction=$2 rate
    shift 2
    for _ in {1..5}; do
        # After a failed measurement, report.json may be of an earlier one.
        rate=$("$@") || fail "$direction of $limit Mbit/s was not measured: $rate" || return
        if within "$rate" "$limit"; then
            echo "$direction $limit Mbit/s: $rate on the wire"
            return
        fi
        echo "$direction of $limit Mbit/s was $rate on the wire"
        # The payload of each 100 ms shows whether the rate was wrong in one burst or all the time.
        jq --compact-output .buckets "$run/report.json"
        awk -v rate="$rate" -v limit="$limit" 'BEGIN { exit !(rate < limit) }' || return
    done
    return 1
}

# sends ADDRESS LIMIT [MTU]: fails unless the pod at that address sends at LIMIT Mbit/s.
sends() {
    attempts "$2" egress sent_by "$1" "${3:-1500}"
}

sent_by() {
    "$traffic" fetch --from "$1:5201" --seconds 5 >"$run/report.json" || return
    mbit "$2"
}

# receives ADDRESS LIMIT LOG [MTU]: fails unless the pod receives at LIMIT Mbit/s, by the pod's own report in the log of its container.
receives() {
    attempts "$2" ingress received_by "$1" "$3" "${4:-1500}"
}

received_by() {
    local address=$1 log=$2 mtu=$3 before
    before=$(reports "$log")
    "$traffic" send --to "$address:5202" --seconds 6 --flows 2 >/dev/null
    until_true 20 more_reports "$log" "$before" || return
    grep sample_us "$log" | tail -n 1 | sed 's/^[^{]*//' >"$run/report.json"
    mbit "$mtu"
}

# Prints the rates that this test has printed so far.
measured() {
    sed -n 's/ Mbit\/s: \(.*\) on the wire/M: \1/p' "$run/test.log" | paste -sd , | sed 's/,/, /g'
}

# Without fq, and without a veth for tbf, packets above the limit are dropped. On a short path a sender then reaches less than the limit.
allow_for_drops() {
    if grep -q "$1.*ingress.*by drops" "$run/podshaper.log"; then
        echo "ingress is held by drops: half the rate is enough"
        LOW=0.5
    fi
}

# added_to PLUGIN UID: fails unless the pod was attached to that network, and not to one that the runtime knew before.
added_to() {
    grep -q "ADD of network pods-$1,.*$2" "$run/podshaper.log" || fail "there was no ADD of network pods-$1"
}

reports() {
    grep --count sample_us "$1" || true
}

more_reports() {
    [[ $(reports "$1") -gt $2 ]]
}
