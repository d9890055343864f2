#!/usr/bin/env bash
# The recipe for several hosts, on two that are network namespaces of this machine: each has its own address and nothing
# else of the network, so the ranks meet over that wire or not at all. Needs root and iproute2.
#   tests/bench/two_hosts.sh RUN_FOLDER [OPTION OF leap-prune ...]
set -euo pipefail
output=$(realpath -m "${1:?a run folder}")
shift

scratch=$(mktemp -d)
pids=()
cleanup() {
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
    for host in 0 1; do ip netns delete "leap$host" 2> /dev/null || true; done
    rm -rf "$scratch"
}
trap cleanup EXIT

for host in 0 1; do
    ip netns add "leap$host"
    ip -n "leap$host" link set lo up
done
ip link add wire netns leap0 type veth peer name wire netns leap1
for host in 0 1; do
    address=10.0.0.$((host + 1))
    ip -n "leap$host" address add "$address/24" dev wire
    ip -n "leap$host" link set wire up
    echo "$address slots=1" >> "$scratch/hosts"
done

for host in 0 1; do
    GLOO_SOCKET_IFNAME=wire ip netns exec "leap$host" \
        deepspeed --quiet --hostfile "$scratch/hosts" --no_ssh --node_rank "$host" --master_addr 10.0.0.1 \
        --no_python leap-prune --config ds_leap.json --output "$output" "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
for host in 0 1; do
    echo "host $host: $(ip netns exec "leap$host" cat /sys/class/net/wire/statistics/tx_bytes) bytes sent over the wire"
done
