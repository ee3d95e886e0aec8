"""Load on an embedding server over HTTP: throughput and times to the answer; or bad requests of every kind.

    btok serve benchmarks/unified/models/btok-small &
    python -m benchmarks.serve --url http://127.0.0.1:8000              # 2 minutes
    python -m benchmarks.serve --url http://127.0.0.1:8000 --fuzz 10000

Any server with OpenAI's `/v1/embeddings` and vLLM's `messages` will do. Every client sends its next request when the
last one is answered, one row each.
"""

import argparse
import asyncio
import base64
import io
import json
import random
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


async def fuzz(client, count):
    """Good requests with bytes changed, cut and repeated. Prints how many answers had each status."""
    chance, statuses = random.Random(0), {}
    good = [json.dumps(bodies[0] | {"encoding_format": "base64"}).encode() for bodies in requests().values()]
    parts = [b"null", b"1e999", b"-1", b"[]", b"{}", b'"', b"\\ud800", b"NaN", b"input", b"\x00", b"[" * 5000]
    for _ in range(count):
        body = bytearray(chance.choice(good))
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(body))
            body[place : place + chance.choice([0, 1, 9, 200])] = chance.choice(parts)
        answer = await client.post("/v1/embeddings", content=bytes(body), headers={"Content-Type": "application/json"})
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    answer = await client.post("/v1/embeddings", json=requests()["texts"][0])
    print(f"{count} bad requests: {dict(sorted(statuses.items()))}; a good one after them: {answer.status_code}")


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", nargs="+", required=True, help="of servers, without /v1; one after another")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="clients at once")
    parser.add_argument("--seconds", type=float, default=15, help="for each number of clients")
    parser.add_argument("--fuzz", type=int, default=0, help="send so many bad requests instead")
    options = parser.parse_args()
    for url in options.url:
        print(url)
        if options.fuzz:
            async with httpx.AsyncClient(base_url=url, headers=_headers(options.key), timeout=120) as client:
                await fuzz(client, options.fuzz)
        else:
            await measure(url, options.key, options.clients, options.seconds)


if __name__ == "__main__":
    asyncio.run(main())
