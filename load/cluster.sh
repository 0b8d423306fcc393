#!/bin/sh
# A store of three replicas on this machine: nats-server and three nodes, each on its own ports. Ctrl-C
# ends all. What they keep is under the directory given, or a new one that goes with them.
#
# SYNC=always makes the broker sync every batch before it answers; see "What a 204 promises".
set -eu
cd "$(dirname "$0")/.."

tests/install-nats.sh >/dev/null
cargo build --release --locked
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
    # The nodes first: they write a snapshot, and the broker is still there for what is under way.
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
# Out of the terminal's reach: its Ctrl-C is for this script, which ends all in order.
setsid .tools/bin/nats-server -c "$dir/nats.conf" -l "$dir/nats.log" &
nats=$!
for n in 1 2 3; do
    setsid target/release/gradestore --nats-url nats://127.0.0.1:4222 --expect-peers 3 --data-dir "$dir/$n" \
        --write-addr "127.0.0.1:${n}8080" --read-addr "127.0.0.1:${n}8081" \
        --ops-addr "127.0.0.1:${n}8082" 2>"$dir/$n.log" &
    pids="$pids $!"
done
pids="$pids $nats"

for n in 1 2 3; do
    tries=0
    until target/release/gradestore health --ops-addr "127.0.0.1:${n}8082" 2>/dev/null; do
        tries=$((tries + 1))
        if [ "$tries" -gt 100 ]; then
            cat "$dir"/*.log >&2
            exit 1
        fi
        sleep 0.1
    done
done
cat <<SAID
Three replicas, one store; logs are in $dir. Set a grade on the first, get it from the third:

  curl -i -u 'admin:$GRADESTORE_PASSWORD' -H 'content-type: application/json' -d '{"user_id":"alice","spp":5}' http://127.0.0.1:18080/set
  curl -H 'Grade-Position: 1' 'http://127.0.0.1:38081/get?user_id=alice'

Look at the first one at http://127.0.0.1:18082/. Ctrl-C ends all.
SAID
while :; do
    for pid in $pids; do
        kill -0 "$pid" 2>/dev/null || { echo "one has ended; see $dir/*.log" >&2; exit 1; }
    done
    sleep 1
done
