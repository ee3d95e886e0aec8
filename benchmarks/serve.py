"""Load on an embedding server over HTTP: throughput and times to the answer.

    btok serve benchmarks/unified/models/btok-small &
    python -m benchmarks.serve --url http://127.0.0.1:8000              # 2 minutes

Any server with OpenAI's `/v1/embeddings` and vLLM's `messages` will do. Every client sends its next request when the
last one is answered, one row each.
"""

import argparse
import asyncio
import base64
import io
import json
import re
import time
from functools import cache
from urllib.parse import urlsplit

import httpx
import numpy as np

from benchmarks.unified.inputs import books, emoji


@cache
def requests():
    """Bodies of requests, by kind: textbook paragraphs and drawings."""
    texts = [row["text"] for row in books("modules", "test")][:128]
    drawings = []
    for row in emoji()["train"][:128]:
        file = io.BytesIO()
        row["image"].save(file, "png")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        drawings.append([{"type": "image_url", "image_url": {"url": url}}])
    return {
        "texts": [{"messages": [{"role": "user", "content": text}]} for text in texts],
        "images": [{"messages": [{"role": "user", "content": content}]} for content in drawings],
    }


def _headers(key):
    return {"Authorization": f"Bearer {key}"} if key else {}


class Connection:
    """One client: HTTP over a connection that stays open. httpx spends more time than the server at 64 of them."""

    def __init__(self, url, key):
        self.host, self.port = url.hostname, url.port or 80
        self.head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        self.head += "".join(f"{name}: {value}\r\n" for name, value in _headers(key).items())

    async def open(self):
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)

    async def post(self, body):
        """The status of the answer."""
        self.writer.write(f"{self.head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        await self.reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
        return int(head.split()[1])


async def load(url, key, bodies, clients, seconds):
    """Seconds to each answer, and the number of other statuses than 200."""
    connections = [Connection(url, key) for _ in range(clients)]
    await asyncio.gather(*(connection.open() for connection in connections))
    times, refused, end = [], 0, time.perf_counter() + seconds

    async def ask(number):
        nonlocal refused
        connection = connections[number]
        while (start := time.perf_counter()) < end:
            status = await connection.post(bodies[number % len(bodies)])
            refused += status != 200
            number += clients
            times.append(time.perf_counter() - start)

    await asyncio.gather(*map(ask, range(clients)))
    for connection in connections:
        connection.writer.close()
    return times, refused


async def measure(address, key, clients, seconds):
    url = urlsplit(address)
    async with httpx.AsyncClient(base_url=address, headers=_headers(key)) as client:
        served = (await client.get("/v1/models")).json()["data"][0]["id"]
    for kind, bodies in requests().items():
        # What clients of OpenAI ask for.
        bodies = [json.dumps({**body, "model": served, "encoding_format": "base64"}).encode() for body in bodies]
        await load(url, key, bodies, 8, 2)  # warm up
        for count in clients:
            times, refused = await load(url, key, bodies, count, seconds)
            middle, late = (1000 * np.quantile(times, part) for part in (0.5, 0.99))
            print(
                f"{kind:8}{count:4} clients {len(times) / seconds:8.1f} requests/s   p50 {middle:7.1f} ms   "
                f"p99 {late:7.1f} ms   refused {refused}",
                flush=True,
            )


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", nargs="+", required=True, help="of servers, without /v1; one after another")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="clients at once")
    parser.add_argument("--seconds", type=float, default=15, help="for each number of clients")
    options = parser.parse_args()
    for url in options.url:
        print(url)
        await measure(url, options.key, options.clients, options.seconds)


if __name__ == "__main__":
    asyncio.run(main())
