"""The model card (README.md) of a repository: metadata, text, and the facts that a person has to state.

The text is in `card.md.jinja`. Facts of a training run are collected in `hub_card/training_run.py`, and the inputs of
the snippets in `hub_card/examples.py`.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, Union

import jinja2
from huggingface_hub import ModelCardData
from transformers import PreTrainedConfig, ProcessorMixin

from btok_hf.backbones import family_of
from btok_hf.hub_names import is_hub_id
from btok_hf.stock_pipeline import with_defaults

PLACEHOLDER = "path-of-this-repository"
# Packages that the snippets need, with the versions that this package requires.
SNIPPET_REQUIREMENTS = ("sentence-transformers", "transformers", "torch", "torchvision", "pillow")
ADAPTER_RELEASE = "5.18"  # of transformers, that loads adapters
OF_CARD = ("assets/loss.png", "assets/example_[0-9]*.png", ".eval_results/*.yaml")  # what `card_files` writes beside
# An input of a snippet: paths of images in the repository, and text.
Example = tuple[list[str], str | None]
# Inputs of the snippets if there is no evaluation data.
EXAMPLES: dict[str, list[Example]] = {
    "queries": [([], "a cat with hearts for eyes"), ([], "frozen water")],
    "documents": [([], "a smiling cat face"), ([], "ice"), ([], "a receipt from a bakery")],
}


@dataclass
class CardArguments:
    """Card facts that cannot be read from the run. The card shows omitted facts as unknown.

    Args:
        model_license (`str`, *optional*): Licence id of the weights, from hf.co/docs/hub/repositories-licenses. For
            `apache-2.0` the LICENSE file is written. `other` needs `license_name` and `license_link`.
        license_name, license_link (`str`, *optional*): Name and address of a licence that has no id.
        base_license (`str`, *optional*): Licence of the base model, as its publisher states it.
        data_licenses (`str` or `dict[str, str]`, *optional*): Licence of all data, or licences by dataset name. The
            evaluation data is included.
        languages (`list[str]`): ISO 639 codes of the languages in the training data.
        eval_task (`str`, *optional*): Task id from the `eval.yaml` of a benchmark on the Hub that the evaluation data
            comes from. The main metric is written to `.eval_results/`, which the benchmark's leaderboard reads.

    Raises:
        ValueError: A licence `other` without name and link (or these with another licence), what cannot be a licence's
            id or a link, or an invalid language code.
    """

    model_license: str | None = field(default=None, metadata={"help": "Id of the weights' licence."})
    license_name: str | None = field(default=None, metadata={"help": "Name, if model_license is other."})
    license_link: str | None = field(default=None, metadata={"help": "Address, if model_license is other."})
    base_license: str | None = field(default=None, metadata={"help": "Licence of the base model."})
    data_licenses: Union[str, None, dict[str, str]] = field(  # noqa: UP007, RUF036 (what HfArgumentParser can read)
        default=None,
        metadata={"help": "Licence of all data, or a mapping (JSON) from dataset name to licence."},
    )
    languages: list[str] = field(
        default_factory=list, metadata={"help": "ISO 639 codes of the languages in the training data."}
    )
    eval_task: str | None = field(
        default=None,
        metadata={"help": "Task id if eval_file is a benchmark on the Hub; adds the result to its leaderboard."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.data_licenses, str) and self.data_licenses.lstrip().startswith("{"):
            self.data_licenses = json.loads(self.data_licenses)
        if self.model_license is not None and not re.fullmatch(r"[a-z0-9.+-]+", self.model_license):
            raise ValueError(
                "model_license must be an id of hf.co/docs/hub/repositories-licenses, in small letters, got "
                f"{self.model_license!r}. Use e.g. apache-2.0, or other with license_name and license_link."
            )
        named = [self.license_name is not None, self.license_link is not None]
        if named != [self.model_license == "other"] * 2:
            raise ValueError(
                "A licence without an id needs model_license='other', license_name and license_link together, got "
                f"{self.model_license!r}, {self.license_name!r} and {self.license_link!r}. Set all three, or use the "
                "id of a licence alone."
            )
        if all(named) and not (str(self.license_name).strip() and re.fullmatch(r"[^\s<>]+", str(self.license_link))):
            raise ValueError(
                "license_name must be a name and license_link an address or the name of a file, without spaces, got "
                f"{self.license_name!r} and {self.license_link!r}. State both."
            )
        for code in self.languages:
            if not re.fullmatch(r"[a-z]{2,3}|multilingual", code):
                raise ValueError(f"languages must be ISO 639 codes (en, de, …) or multilingual, got {code!r}.")

    def check(self, datasets: Collection[str], eval_source: str | None = None) -> None:
        """Raise `ValueError` if a fact does not fit the run. Called before training, so that no work is lost.

        Args:
            datasets (`Collection[str]`): Names of the datasets, including the evaluation data.
            eval_source (`str`, *optional*): File or Hub id of the evaluation data.
        """
        unknown = sorted(set(self.data_licenses) - set(datasets)) if isinstance(self.data_licenses, dict) else []
        if unknown:
            raise ValueError(
                f"data_licenses must name the datasets {sorted(datasets)}, got {unknown}. Use the names of the "
                "datasets."
            )
        if self.eval_task and not hub_id(eval_source):
            raise ValueError(
                f"eval_task is {self.eval_task!r}, but the evaluation data is {eval_source!r}. Only benchmarks on the "
                "Hub accept results: evaluate on the Hub id of the benchmark, or leave eval_task out."
            )

    def data_license(self, name: str) -> str | None:
        """The licence of a dataset; `None` if it is unknown."""
        return self.data_licenses.get(name) if isinstance(self.data_licenses, dict) else self.data_licenses


def hub_id(source: str | None) -> str | None:
    """The source of a dataset, if it is a Hub id; `None` for files and unknown sources."""
    return source if source is not None and is_hub_id(source) else None


def apache_license() -> str:
    """The text of Apache-2.0: the licence of this package, from the checkout or the installed distribution."""
    checkout = Path(__file__).parents[1] / "LICENSE"
    if checkout.is_file():
        return checkout.read_text("utf-8")
    installed = metadata.distribution("btok-hf").read_text("licenses/LICENSE")
    assert installed is not None  # pyproject.toml lists it in license-files
    return installed


def files_of_card(folder: Path) -> list[Path]:
    """Files beside the card in a folder that `card_files` wrote: licence, scores, pictures.

    The licence is listed if it is the text of Apache-2.0; another one was put there by somebody.
    """
    found = [path for pattern in OF_CARD for path in folder.glob(pattern)]
    licence = folder / "LICENSE"
    return found + [licence] * (licence.is_file() and licence.read_bytes() == apache_license().encode())


# The repository that a card's first snippet loads.
OWN_NAME = re.compile(
    r'^(?:folder = snapshot_download\("([^"\n]+)"\)\nmodel = SentenceTransformer\(folder\)'
    r'|model = SentenceTransformer\("([^"\n]+)"\))  # stock modules, no trust_remote_code$',
    re.M,
)
# What snippets begin with if they load files from the Hub.
IMPORT, BEFORE = (
    "from huggingface_hub import snapshot_download\n",
    ("from sentence_transformers import SentenceTransformer\n\nfolder", "from transformers import AutoModel,"),
)


def for_hub(card: str, repo_id: str) -> str:
    """A card whose snippets load the repository from the Hub, in place of a path that the reader has to fill in.

    Args:
        card (`str`): As `render_card` writes it, for a folder or for another repository. Other texts stay as they are.
        repo_id (`str`): Hub id.
    """
    if own := OWN_NAME.search(card):
        card = for_folder(card, own[1] or own[2])
    if f'folder = "{PLACEHOLDER}"' in card:
        card = card.replace(f'folder = "{PLACEHOLDER}"', f'folder = snapshot_download("{repo_id}")')
        for first in BEFORE:
            card = card.replace(first, f"{IMPORT}{first}")
    return card.replace(PLACEHOLDER, repo_id)


def for_folder(card: str, repo_id: str) -> str:
    """A card of a repository on the Hub as it was before `for_hub`, so that it can be pushed to another.

    Args:
        card (`str`): A card. Only its snippets change: what names the base or the data stays.
        repo_id (`str`): Hub id of its repository.
    """
    if f'snapshot_download("{repo_id}")' in card:
        for first in BEFORE:
            card = card.replace(f"{IMPORT}{first}", first)
    card = card.replace(f'snapshot_download("{repo_id}")', f'"{PLACEHOLDER}"')
    return card.replace(f'"{repo_id}"', f'"{PLACEHOLDER}"').replace(
        f"btok verify {repo_id}`", f"btok verify {PLACEHOLDER}`"
    )


def render_card(
    config: PreTrainedConfig,
    processor: ProcessorMixin,
    prompts: Mapping[str, str | None],
    arguments: CardArguments | None = None,
    *,
    repo_id: str | None = None,
    examples: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    data: Sequence[Mapping[str, Any]] = (),
    evaluation: Mapping[str, Any] | None = None,
    truncate_dim: int | None = None,
    trained: bool = False,
    of_adapters: bool = False,
    adapter_base: str | None = None,
) -> str:
    """Render the README.md of a repository. Without `training` and `trained`, it warns that the model is untrained.

    Args:
        config (`PreTrainedConfig`): Configuration of the model with Bottleneck Tokens.
        processor (`ProcessorMixin`): Source of the pixel limits.
        prompts (`dict[str, str]`): Instructions by name.
        arguments (`CardArguments`, *optional*): Licences and languages.
        repo_id (`str`, *optional*): Hub id for the snippets, which a push replaces. Default: a placeholder.
        examples (`dict`, *optional*): Inputs and outputs of the snippets, from `measured_examples`. Default: fixed
            texts without similarities.
        truncate_dim (`int`, *optional*): Dimensions that loaders of Sentence-Transformers cut embeddings to.
        trained (`bool`): Whether the weights were trained, although there are no facts of it.
        training, data, evaluation (*optional*): Facts of a run, from `training_run.card_files`.
        of_adapters (`bool`): Whether the repository holds only adapters.
        adapter_base (`str`, *optional*): Hub id of the repository that they were trained on.

    Returns:
        `str`
    """
    arguments = arguments or CardArguments()
    shown: dict[str, Any] = {"similarities": None, **(examples or EXAMPLES)}
    text_config, prompts = config.get_text_config(), with_defaults(prompts)
    base = adapter_base if of_adapters else getattr(config, "btok_base_model", None)
    facts = {
        "training": training,
        "trained": trained and not training,
        "data": data,
        "evaluation": evaluation,
        "arguments": arguments,
        "base": base,
        "base_revision": None if of_adapters else getattr(config, "btok_base_revision", None),
        "of_adapters": of_adapters,
        "converted": getattr(config, "btok_converted_from", None),
        "model_type": config.model_type,
        "num_tokens": config.btok_num_tokens,
        "order": getattr(config, "btok_order", "media_first"),
        "suffix": getattr(config, "btok_suffix", None),
        "hidden_size": text_config.hidden_size,
        "truncate_dim": truncate_dim if truncate_dim and truncate_dim < text_config.hidden_size else None,
        "num_layers": text_config.num_hidden_layers,
        "max_length": processor.tokenizer.model_max_length,
        "costs": family_of(config).image_costs(processor),
        "takes_video": family_of(config).video is not None,
        "prompts": {name: text for name, text in prompts.items() if text},
        "install": " ".join(f'"{requirement}"' for requirement in _snippet_requirements(of_adapters)),
        "repository": json.dumps(PLACEHOLDER),
        "has_images": any(images for images, _ in shown["queries"] + shown["documents"]),
        "queries": [_as_input(*row) for row in shown["queries"]],
        "documents": [_as_input(*row) for row in shown["documents"]],
        "conversations": [
            _as_messages(shown["queries"][0], prompts.get("query")),
            _as_messages(shown["documents"][0], prompts.get("document")),
        ],
        "similarities": shown["similarities"],
    }
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(text=_as_text, fence=_as_fence)
    template = environment.from_string(files(__package__).joinpath("card.md.jinja").read_text("utf-8"))
    relation = "adapter" if of_adapters else "finetune"
    header = _metadata(config, arguments, base, base and relation, data, evaluation)
    card = f"---\n{header.to_yaml()}\n---\n\n{template.render(facts)}"
    return card if repo_id is None else for_hub(card, repo_id)


def _metadata(
    config: PreTrainedConfig,
    arguments: CardArguments,
    base: str | None,
    relation: str | None,
    data: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any] | None,
) -> ModelCardData:
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "bottleneck-tokens", "multimodal", config.model_type],
        license=arguments.model_license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        language=arguments.languages or None,
        base_model=base,
        base_model_relation=relation,
        datasets=sorted({part["hub_id"] for part in data if part["hub_id"] and part["trained"]}) or None,
        metrics=[metric for metric, *_ in evaluation["rows"]] if evaluation else None,
    )


def _snippet_requirements(of_adapters: bool) -> list[str]:
    required = [line for line in metadata.requires("btok-hf") or () if "extra ==" not in line]
    by_name = {re.split(r"[^\w.-]", line)[0]: line for line in required}
    if of_adapters:  # older releases leave them random
        by_name["transformers"] = f"transformers>={ADAPTER_RELEASE},<6"
    return [by_name[name] for name in SNIPPET_REQUIREMENTS] + (["peft"] if of_adapters else [])


def _as_input(images: Sequence[str], text: str | None) -> str:
    """Python source of an input for Sentence-Transformers."""
    if not images:
        return _quoted(text or "")
    paths = [f'f"{{folder}}/{path}"' for path in images]
    image = paths[0] if len(paths) == 1 else f"[{', '.join(paths)}]"
    return f'{{"image": {image}, "text": {_quoted(text)}}}' if text else f'{{"image": {image}}}'


def _as_messages(example: Example, prompt: str | None) -> list[str]:
    """Python source of the chat messages of an input, with the prompt as system message."""
    images, text = example
    parts = [f'{{"type": "image", "image": f"{{folder}}/{path}"}}' for path in images]
    if text:
        parts.append(f'{{"type": "text", "text": {_quoted(text)}}}')
    system = [f'{{"role": "system", "content": {_quoted(prompt)}}}'] if prompt else []
    return [*system, f'{{"role": "user", "content": [{", ".join(parts)}]}}']


def _quoted(text: str) -> str:
    """Python source of a string, in double quotes unless they need an escape."""
    source = repr(text)
    return source if '"' in source else f'"{source[1:-1]}"'


def _as_text(value: Any) -> str:
    """A value as one line of Markdown text, escaped for use in tables too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(str(value).split()))


def _as_fence(text: str, language: str) -> str:
    """A fenced code block with more backticks than the text contains."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"
