"""Repositories on the test server, and a script that loads one with every loader."""

import shlex

from support.repositories import TEXTS, contents

# Loads a repository with every loader and prints {what: vectors of TEXTS}. Arguments: Hub id, further revisions.
LOAD = f"""
import json, sys, torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
repo, *revisions = sys.argv[1:]
vectors = {{}}
for revision in (None, *revisions):
    stock = SentenceTransformer(repo, revision=revision, device="cpu")
    assert type(stock[0].model).__module__.startswith("transformers.")
    vectors["stock", revision] = stock.encode({TEXTS!r})
    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo, revision=revision)
    inputs = processor.apply_chat_template(
        [[{{"role": "user", "content": text}}] for text in {TEXTS!r}],
        tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={{"padding": True}},
    )
    with torch.no_grad():
        vectors["auto", revision] = model(**inputs).pooler_output
print("\\n" + json.dumps([[loader, revision, array.tolist()] for (loader, revision), array in vectors.items()]))
"""


def served(hub, repo_id, branch="main"):
    """Every file of a repository on the server but .gitattributes."""
    repository = hub.repositories[repo_id]
    files = {path: content for path, (content, _) in repository.commits[repository.branches[branch]].items()}
    del files[".gitattributes"]
    return files


def as_pushed(folder, repo_id):
    """The files of a folder as a push uploads them: snippets of the card name the repository."""
    files = contents(folder)
    card = files["README.md"].replace(b"path-of-this-repository", repo_id.encode())
    assert card != files["README.md"]
    return files | {"README.md": card}


def head(hub, repo_id, branch="main"):
    return hub.repositories[repo_id].branches[branch]


def retry_command(stderr):
    """Arguments of the interpreter in the command that an error names."""
    command, *arguments = shlex.split(stderr.rsplit("Retry with: ", 1)[1].splitlines()[0])
    assert command == "btok"
    arguments = ["-m", "btok_hf", *arguments]
    return arguments
