"""The faults of the soak test: each begins, ends, and leaves the recovery to the cluster."""

import http.client
import resource
import shutil
import signal
import socket
import threading
import time
from contextlib import suppress

from measure import AUTH

HUNG_S = 5
SILENT_S = 8
FLOOD_HELD_S = 3
# A port accepts 8,192.
FLOOD_CONNECTIONS = 9000
ABORTED_BACKUPS = 4
BACKUP_BYTES_READ = 200_000
CONNECT_S_MAX = 5
CHUNK = 256 * 1024


class Proxy:
    """A proxy between a replica and NATS. Either direction can be silenced, connections can be closed, and new ones
    rejected."""

    def __init__(self, broker_address):
        self.broker_address = broker_address
        self.open = set()
        self.rejecting = False
        self.lock = threading.Lock()
        self.flows = {"to the broker": threading.Event(), "from the broker": threading.Event()}
        self.let_through()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"nats://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            if self.rejecting:
                client.close()
                continue
            try:
                server = socket.create_connection(self.broker_address)
            except OSError:
                client.close()  # The broker is down.
                continue
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                self.open |= {client, server}
            for direction, source, sink in (("to the broker", client, server), ("from the broker", server, client)):
                threading.Thread(target=self.pump, args=(source, sink, self.flows[direction]), daemon=True).start()

    def pump(self, source, sink, flowing):
        with suppress(OSError):
            while data := source.recv(CHUNK):
                # Unread data fills the buffers of both sides, and then nothing passes.
                flowing.wait()
                sink.sendall(data)
        self.end({source, sink})

    def end(self, sockets):
        with self.lock:
            sockets &= self.open
            self.open -= sockets
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def cut(self):
        with self.lock:
            sockets = set(self.open)
        self.end(sockets)

    def reject(self):
        """Closes all connections, and rejects new ones until `accept_again`."""
        self.rejecting = True
        self.cut()

    def accept_again(self):
        self.rejecting = False

    def silence(self, *directions):
        for direction in directions:
            self.flows[direction].clear()

    def let_through(self):
        for flowing in self.flows.values():
            flowing.set()


def hang(process, for_s=HUNG_S):
    process.child.send_signal(signal.SIGSTOP)
    time.sleep(for_s)
    process.child.send_signal(signal.SIGCONT)


def crash(process):
    process.kill()
    process.start()


class Replica:
    """A node, its proxy to NATS, and its data directory."""

    def __init__(self, name, node, proxy, data):
        self.name, self.node, self.proxy, self.data = name, node, proxy, data


def flood(address):
    """Opens more connections than a port accepts."""
    connections = []
    try:
        for _ in range(FLOOD_CONNECTIONS):
            with suppress(OSError):
                connections.append(socket.create_connection(address, timeout=CONNECT_S_MAX))
        time.sleep(FLOOD_HELD_S)
    finally:
        for each in connections:
            each.close()


def abort_backup(address):
    connection = http.client.HTTPConnection(address, timeout=CONNECT_S_MAX)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/backup", headers={"Authorization": f"Basic {AUTH}"})
        connection.getresponse().read(BACKUP_BYTES_READ)
    connection.close()


def abort_backups(address):
    clients = [threading.Thread(target=abort_backup, args=(address,)) for _ in range(ABORTED_BACKUPS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


class Faults:
    """All kinds of faults and their targets. One replica is never stopped, so that a slow leak shows on it."""

    KINDS = ("kill", "empty", "hang", "cut", "silent", "backups", "flood", "broker kill", "broker hang")

    def __init__(self, replicas, broker, random):
        self.replicas, self.broker, self.random = replicas, broker, random
        self.to_come = []
        # For the flood of connections and the proxies.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def next(self):
        """Draws a kind and a target. Every kind is used before one is repeated."""
        if not self.to_come:
            self.to_come = self.random.sample(self.KINDS, len(self.KINDS))
        kind = self.to_come.pop()
        among = self.replicas[1:] if kind in ("kill", "empty") else self.replicas
        return kind, None if kind.startswith("broker") else self.random.choice(among)

    def strike(self, kind, struck):
        """Returns a description when the fault is over."""
        port = self.random.choice(("write", "read"))
        if kind == "kill":
            crash(struck.node)
        elif kind == "empty":
            struck.node.kill()
            shutil.rmtree(struck.data)
            struck.node.start()
        elif kind == "hang":
            hang(struck.node)
        elif kind == "cut":
            struck.proxy.cut()
        elif kind == "silent":
            directions = self.random.choice((["to the broker"], ["from the broker"], list(struck.proxy.flows)))
            struck.proxy.silence(*directions)
            time.sleep(SILENT_S)
            struck.proxy.let_through()
            return " and ".join(directions)
        elif kind == "backups":
            abort_backups(struck.node.urls["write"].removeprefix("http://"))
        elif kind == "flood":
            host, number = struck.node.urls[port].removeprefix("http://").split(":")
            flood((host, int(number)))
            return f"{port} port"
        elif kind == "broker kill":
            crash(self.broker)
        else:
            hang(self.broker)
        return ""
