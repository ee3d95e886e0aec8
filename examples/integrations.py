"""Do libraries around Sentence-Transformers give the vectors of `encode`? Prints the largest difference of each.

    pip install langchain-huggingface llama-index-embeddings-huggingface haystack-ai sentence-transformers-haystack
    python examples/integrations.py benchmarks/unified/models/btok-small

With `btok serve` running, also its clients: `pip install openai langchain-openai`, and `--url http://127.0.0.1:8000`.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from btok_hf import BTokSentenceTransformer

TEXTS = ["a text", "two\nlines", "photo.png"]  # the last is also the name of a file in the current folder


def langchain(repo, texts, image):
    from langchain_huggingface import HuggingFaceEmbeddings

    return HuggingFaceEmbeddings(model_name=repo).embed_documents(texts), None


def langchain_own_class(repo, texts, image):
    from langchain_core.embeddings import Embeddings

    class BTokEmbeddings(Embeddings):
        def __init__(self, repo):
            self.model = BTokSentenceTransformer(repo)

        def embed_documents(self, texts):
            return self.model.encode_document([{"text": text} for text in texts]).tolist()

        def embed_query(self, text):
            return self.model.encode_query([{"text": text}])[0].tolist()

        def embed_images(self, paths):
            return self.model.encode_document([{"image": path} for path in paths]).tolist()

    embeddings = BTokEmbeddings(repo)
    return embeddings.embed_documents(texts), embeddings.embed_images([image])


def llama_index(repo, texts, image):
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    embedding = HuggingFaceEmbedding(model_name=repo)
    return embedding.get_text_embedding_batch(texts), [embedding.get_image_embedding(image)]


def haystack(repo, texts, image):
    from haystack import Document
    from haystack_integrations.components.embedders.sentence_transformers import (
        SentenceTransformersDocumentEmbedder,
        SentenceTransformersDocumentImageEmbedder,
    )

    of_texts = SentenceTransformersDocumentEmbedder(model=repo, progress_bar=False)
    of_images = SentenceTransformersDocumentImageEmbedder(model=repo, progress_bar=False)
    for embedder in (of_texts, of_images):
        embedder.warm_up()
    pages = of_images.run([Document(content=None, meta={"file_path": image})])["documents"]
    documents = of_texts.run([Document(content=text) for text in texts])["documents"]
    return [document.embedding for document in documents], [page.embedding for page in pages]


def openai(url, texts, image):
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    name = client.models.list().data[0].id
    return [row.embedding for row in client.embeddings.create(model=name, input=texts).data], None


def langchain_openai(url, texts, image):
    from langchain_openai import OpenAIEmbeddings

    # Without the last argument it sends token ids of another model's tokenizer, which the server refuses.
    embeddings = OpenAIEmbeddings(base_url=f"{url}/v1", api_key="none", model="m", check_embedding_ctx_length=False)
    return embeddings.embed_documents(texts), None


def shown(expected, actual):
    """The largest difference of each row, or why there is none."""
    if actual is None:
        return "not there"
    return " ".join(f"{value:8.1e}" for value in np.abs(expected - np.array(actual, np.float32)).max(1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="folder or Hub id")
    parser.add_argument("--url", help="address of a server of this repository, started with --name m")
    options = parser.parse_args()
    repo = str(Path(options.repo).resolve()) if Path(options.repo).is_dir() else options.repo
    model = BTokSentenceTransformer(repo)
    libraries = dict.fromkeys((langchain, langchain_own_class, llama_index, haystack), repo)
    libraries |= dict.fromkeys((openai, langchain_openai), options.url) if options.url else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        image = str(Path(folder, "photo.png"))
        pixels = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
        texts, images = model.encode([{"text": text} for text in TEXTS]), model.encode([{"image": image}])
        for embed, source in libraries.items():
            try:
                of_texts, of_images = embed(source, TEXTS, image)
            except ModuleNotFoundError as error:
                print(f"{embed.__name__:20} not installed: {error.name}")
                continue
            print(f"{embed.__name__:20} texts {shown(texts, of_texts)}   image {shown(images, of_images)}", flush=True)


if __name__ == "__main__":
    main()
