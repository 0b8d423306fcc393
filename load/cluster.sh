#!/bin/sh
# A cluster on this machine: nats-server and three nodes, each on its own ports. Ctrl-C stops all. The
# data is in the directory of the first argument, or in a temporary one that is removed at the end.
# If a node exits, the others continue.
#
# SYNC=always makes nats-server sync every batch before it acknowledges it; see docs/guarantees.md. PROGRAM is
# a gradestore program; without it, one is built.
set -eu
cd "$(dirname "$0")/.."

tests/install-nats.sh >/dev/null
if [ -z "${PROGRAM:-}" ]; then
    cargo build --release --locked
    PROGRAM=target/release/gradestore
fi
export GRADESTORE_PASSWORD="${GRADESTORE_PASSWORD:-secret}"

dir=${1:-}
if [ -z "$dir" ]; then
    dir=$(mktemp -d)
    made=$dir
fi
mkdir -p "$dir"
pids=
end() {
    trap - INT TERM EXIT
    # The nodes first: they write a snapshot and need NATS for their last writes.
    for pid in $pids; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    if [ -n "${made:-}" ]; then rm -rf "$made"; fi
}
trap end EXIT
trap 'exit 0' INT TERM

cat >"$dir/nats.conf" <<CONF
listen: 127.0.0.1:4222
jetstream { store_dir: "$dir/nats", sync_interval: "${SYNC:-2m}" }
CONF
# In another session, so that Ctrl-C reaches only this script, which stops all in order.
setsid .tools/bin/nats-server -c "$dir/nats.conf" -l "$dir/nats.log" &
nats=$!
for n in 1 2 3; do
    setsid "$PROGRAM" --nats-url nats://127.0.0.1:4222 --expect-peers 3 --data-dir "$dir/$n" \
        --write-addr "127.0.0.1:${n}8080" --read-addr "127.0.0.1:${n}8081" \
        --ops-addr "127.0.0.1:${n}8082" 2>"$dir/$n.log" &
    pids="$pids $!"
done
nodes=$pids
pids="$pids $nats"

for n in 1 2 3; do
    tries=0
    until "$PROGRAM" health --ops-addr "127.0.0.1:${n}8082" 2>/dev/null; do
        tries=$((tries + 1))
        if [ "$tries" -gt 100 ]; then
            cat "$dir"/*.log >&2
            exit 1
        fi
        sleep 0.1
    done
done
cat <<MESSAGE
Three nodes are running; their logs are in $dir. Write on the first, read from the third:

  curl -i -u 'admin:$GRADESTORE_PASSWORD' -H 'content-type: application/json' -d '{"user_id":"alice","spp":5}' http://127.0.0.1:18080/set
  curl 'http://127.0.0.1:38081/get?user_id=alice'

The status page of the first is http://127.0.0.1:18082/. Ctrl-C stops all.
MESSAGE
ended=
while :; do
    kill -0 "$nats" 2>/dev/null || { echo "nats-server has ended; see $dir/nats.log" >&2; exit 1; }
    n=0
    for pid in $nodes; do
        n=$((n + 1))
        case " $ended " in *" $pid "*) continue ;; esac
        if ! kill -0 "$pid" 2>/dev/null; then
            echo "node $n has ended; its log is $dir/$n.log" >&2
            ended="$ended $pid"
        fi
    done
    sleep 1
done
