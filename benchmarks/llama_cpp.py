"""A repository in llama.cpp: conversion of the small model, and its vectors against the golden ones.

    python -m benchmarks.llama_cpp convert SOURCE benchmarks/unified/models/btok-small OUT
    llama-server -m OUT/model.gguf --mmproj OUT/mmproj.gguf --embeddings --pooling none -ub 2048 -fa off \
        -ctk f32 -ctv f32 --image-min-tokens 4 --image-max-tokens 56 --port 8080
    python -m benchmarks.llama_cpp verify benchmarks/unified/models/btok-small --url http://127.0.0.1:8080

SOURCE is a checkout of llama.cpp. First it is shown that the converter refuses the repository as it is.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import urllib.request
from pathlib import Path

import numpy as np

from btok_hf.golden import read_golden
from btok_hf.serving.verify_url import request_body

# The converter knows tokenizers of published models by a hash, and takes a tower of two layers to have a projector of
# two. Models with 2B parameters need neither line.
RUN = """
import runpy, sys
import gguf
from conversion import base
plain = gguf.get_tensor_name_map
gguf.get_tensor_name_map = lambda kind, blocks: plain(kind, max(blocks, 4))
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv[:2] = [sys.argv[1] + "/convert_hf_to_gguf.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(source, repo, output):
    """Write `model.gguf` and `mmproj.gguf` of a repository, after the converter has refused it under its own name."""
    output.mkdir(parents=True, exist_ok=True)
    flags = ["--outtype", "f32"]
    config = json.loads((repo / "config.json").read_text())
    own, stock = config["architectures"], config["architectures"][0].replace("BTok", "")
    config["architectures"] = [stock.replace("ForEmbedding", "ForConditionalGeneration")]
    refused = _converted(source, repo, output / "refused.gguf", flags)
    print(f"{own[0]}: status {refused.returncode}, {refused.stderr.strip().splitlines()[-1]}")
    assert refused.returncode and not (output / "refused.gguf").exists()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(repo, copy)
        (copy / "config.json").write_text(json.dumps(config))
        for name, more in (("model", []), ("mmproj", ["--mmproj"])):
            done = _converted(source, copy, output / f"{name}.gguf", flags + more)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            print(f"{config['architectures'][0]}: {output / name}.gguf")


def _converted(source, repo, output, flags):
    command = [sys.executable, "-c", RUN, str(source), str(repo), "--outfile", str(output), *flags]
    modules = os.pathsep.join([str(source), f"{source}/gguf-py"])
    environment = {**os.environ, "NO_LOCAL_GGUF": "1", "PYTHONPATH": modules}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def embed(url, text, images=(), tokens=4):
    """The embedding of one row; a text may begin with an instruction."""
    text = unicodedata.normalize("NFC", text)  # as the tokenizer does, but not llama.cpp's
    # llama.cpp puts images where they stand and adds no space.
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    parts += [{"type": "text", "text": f" {text}" if images and text else text}]
    body = {"messages": [{"role": "user", "content": parts}], "add_generation_prompt": False}
    prompt = post(url, "/apply-template", body)["prompt"]
    content = {"prompt_string": prompt, "multimodal_data": [image.partition(",")[2] for image in images]}
    rows = post(url, "/embeddings", {"content": content if images else prompt})[0]["embedding"]
    mean = np.mean(rows[-tokens:], 0, dtype=np.float32)
    return mean / np.linalg.norm(mean)


def verify(repo, url):
    """Print the largest difference of a component for each golden input."""
    golden = read_golden(repo / "golden.json")["inputs"]
    tokens = json.loads((repo / "config.json").read_text())["btok_num_tokens"]
    given = json.loads((repo / "golden.json").read_text())["inputs"]
    for row, right in zip(given, golden):
        messages = request_body(row)["messages"]
        parts = [part for message in messages for part in _parts(message["content"])]
        images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        if any(part["type"] == "video_url" for part in parts):
            print(f"{row['name']:18} not reached: a video")
            continue
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        found = embed(url, text, images, tokens)
        difference = np.abs(found - right["embedding"]).max()
        print(f"{row['name']:18}{difference:9.1e}  cosine {found @ right['embedding']:.6f}")


def _parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("convert", "verify"))
    parser.add_argument("paths", nargs="+", type=Path, help="convert: SOURCE REPO OUT; verify: REPO")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of llama-server (default: %(default)s)")
    options = parser.parse_args()
    if options.command == "convert":
        convert(*options.paths)
    else:
        verify(*options.paths, options.url)


if __name__ == "__main__":
    main()
