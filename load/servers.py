"""Three nats-servers as one cluster, and a client for questions about its stream."""

import asyncio
import json
import time
from contextlib import suppress

from faults import Proxy
from measure import Broker, free_port

STREAM = "GRADES"
SERVERS = 3
# The minimum of nats-server. Clients are disconnected over this time.
LAME_DUCK = 'lame_duck_duration: "30s"\nlame_duck_grace_period: "1s"\n'


class Servers:
    """Three servers. With `proxied`, each route goes through a proxy, so that a server can be
    isolated from the others while its clients still reach it."""

    def __init__(self, directory, sync, stack, proxied=False):
        ports = [free_port() for _ in range(SERVERS)]
        # Gossip would bypass the proxies, so each server advertises an address without a listener.
        nowhere = free_port()
        self.links = {
            (source, target): Proxy(("127.0.0.1", ports[target]))
            for source in range(SERVERS)
            for target in range(SERVERS)
            if proxied and source != target
        }
        self.all = []
        for n in range(SERVERS):
            routes = [f"nats://127.0.0.1:{ports[other]}" for other in range(SERVERS)]
            if proxied:
                routes = [link.url for (source, _), link in self.links.items() if source == n]
            more = (
                f'server_name: "server-{n}"\n{LAME_DUCK}cluster {{\n  name: three\n  listen: 127.0.0.1:{ports[n]}\n'
                f"{f'  advertise: 127.0.0.1:{nowhere}' if proxied else ''}\n  routes: {json.dumps(routes)}\n}}\n"
            )
            self.all.append(stack.enter_context(Broker(directory / f"server-{n}", sync, more)))
        self.url = ",".join(server.url for server in self.all)

    def named(self, name):
        return self.all[int(name.removeprefix("server-"))]

    def isolate(self, server):
        for (source, target), link in self.links.items():
            if server in (self.all[source], self.all[target]):
                link.reject()

    def heal(self):
        for link in self.links.values():
            link.accept_again()


class Client:
    """One connection to one server."""

    def __init__(self, server):
        self.server = server
        self.streams = None

    async def connect(self):
        reader, writer = await asyncio.open_connection(*self.server.address)
        self.streams = reader, writer
        await reader.readline()
        writer.write(
            b'CONNECT {"verbose":false,"pedantic":false,"lang":"python3","version":"0","protocol":1}\r\n'
            b"SUB _INBOX.failover 1\r\n"
        )

    async def ask(self, subject, wait_s):
        """The response as JSON; `None` after the timeout."""
        try:
            async with asyncio.timeout(wait_s):
                if not self.streams:
                    await self.connect()
                reader, writer = self.streams
                writer.write(f"PUB {subject} _INBOX.failover 0\r\n\r\n".encode())
                while True:
                    line = await reader.readline()
                    if not line:
                        raise ConnectionError
                    if line.startswith(b"PING"):
                        writer.write(b"PONG\r\n")
                    elif line.startswith(b"MSG"):
                        return json.loads((await reader.readexactly(int(line.split()[-1]) + 2)))
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
            # A late response must not be mistaken for the response to the next request.
            self.close()
            return None

    def close(self):
        if self.streams:
            with suppress(OSError):
                self.streams[1].close()
        self.streams = None


def stream_info():
    return f"$JS.API.STREAM.INFO.{STREAM}"


def consumer_names():
    return f"$JS.API.CONSUMER.NAMES.{STREAM}"


async def settled(servers, wait_s=120):
    """The server of the stream leader, once there is one and both followers are current."""
    clients = [Client(server) for server in servers.all]
    deadline = time.monotonic() + wait_s
    try:
        while time.monotonic() < deadline:
            for client in clients:
                info = await client.ask(stream_info(), 1)
                cluster = (info or {}).get("cluster") or {}
                followers = cluster.get("replicas") or []
                current = [
                    each for each in followers if each.get("current") and not each.get("offline")
                ]
                if cluster.get("leader") and len(current) == SERVERS - 1:
                    return servers.named(cluster["leader"])
            await asyncio.sleep(0.1)
    finally:
        for client in clients:
            client.close()
    raise TimeoutError(f"stream {STREAM} has no leader with two current followers after {wait_s} s")
