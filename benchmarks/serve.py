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
import time
from functools import cache

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


async def load(client, bodies, clients, seconds):
    """Seconds to each answer, and the number of other statuses than 200."""
    times, refused, end = [], 0, time.perf_counter() + seconds

    async def ask(number):
        nonlocal refused
        while (start := time.perf_counter()) < end:
            answer = await client.post("/v1/embeddings", json=bodies[number % len(bodies)])
            number += clients
            times.append(time.perf_counter() - start)
            refused += answer.status_code != 200

    await asyncio.gather(*map(ask, range(clients)))
    return times, refused


async def measure(client, clients, seconds):
    for kind, bodies in requests().items():
        await load(client, bodies, 8, 2)  # warm up
        for count in clients:
            times, refused = await load(client, bodies, count, seconds)
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
    parser.add_argument("--url", required=True, help="of the server, without /v1")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="clients at once")
    parser.add_argument("--seconds", type=float, default=15, help="for each number of clients")
    parser.add_argument("--fuzz", type=int, default=0, help="send so many bad requests instead")
    options = parser.parse_args()
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, timeout=120, limits=httpx.Limits(max_connections=None)
    ) as client:
        if options.fuzz:
            await fuzz(client, options.fuzz)
        else:
            await measure(client, options.clients, options.seconds)


if __name__ == "__main__":
    asyncio.run(main())
