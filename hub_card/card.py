"""The README.md of a repository: its metadata, its text, and what only a person can say about a model."""

import json
import re
from dataclasses import dataclass, field
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Union

import jinja2
from huggingface_hub import ModelCardData

PLACEHOLDER = "path-of-this-repository"
# What the snippets need on a fresh machine, in the versions that this package itself asks for.
SNIPPET_REQUIREMENTS = ("sentence-transformers", "transformers", "torch", "torchvision", "pillow")
# (paths of images in the repository, text) of each input of the snippets, where no evaluation data is known.
EXAMPLES = {
    "queries": [([], "a cat with hearts for eyes"), ([], "frozen water")],
    "documents": [([], "a smiling cat face"), ([], "ice"), ([], "a receipt from a bakery")],
}


@dataclass
class CardArguments:
    """What no run can know about its model; the card says of what is left out that it is unknown.

    Args:
        model_license (`str`, *optional*): Id of the weights' licence, from hf.co/docs/hub/repositories-licenses. The
            text of `apache-2.0` is written as LICENSE; `other` needs the next two.
        license_name, license_link (`str`, *optional*): Name and address of a licence that has no id.
        base_license (`str`, *optional*): Licence of the base model, as its publisher states it.
        data_licenses (`str` or `dict[str, str]`, *optional*): Licence of the data: one, or one per dataset by its
            name, evaluation data included.
        languages (`list[str]`): ISO 639 codes of the languages in the training data.
        eval_task (`str`, *optional*): Where the evaluation data is a benchmark on the Hub: the id of its task, from
            its `eval.yaml`. Writes the main metric to `.eval_results/`, which the benchmark's leaderboard reads.

    Raises:
        ValueError: A licence `other` without name and link (or these without it), or an odd language code.
    """

    model_license: str | None = field(default=None, metadata={"help": "Id of the weights' licence."})
    license_name: str | None = field(default=None, metadata={"help": "Name, if model_license is other."})
    license_link: str | None = field(default=None, metadata={"help": "Address, if model_license is other."})
    base_license: str | None = field(default=None, metadata={"help": "Licence of the base model."})
    data_licenses: Union[str, None, dict[str, str]] = field(  # noqa: UP007, RUF036 (what HfArgumentParser can read)
        default=None,
        metadata={"help": "Licence of the data: one, or a mapping (in JSON) from dataset name to licence."},
    )
    languages: list[str] = field(
        default_factory=list, metadata={"help": "ISO 639 codes of the languages in the training data."}
    )
    eval_task: str | None = field(
        default=None, metadata={"help": "Task id, if eval_file is a benchmark on the Hub: adds to its leaderboard."}
    )

    def __post_init__(self):
        if isinstance(self.data_licenses, str) and self.data_licenses.lstrip().startswith("{"):
            self.data_licenses = json.loads(self.data_licenses)
        named = [self.license_name is not None, self.license_link is not None]
        if named != [self.model_license == "other"] * 2:
            raise ValueError(
                "A licence without an id takes model_license='other', license_name and license_link together, got "
                f"{self.model_license!r}, {self.license_name!r} and {self.license_link!r}."
            )
        for code in self.languages:
            if not re.fullmatch(r"[a-z]{2,3}|multilingual", code):
                raise ValueError(f"languages takes ISO 639 codes (en, de, …) or multilingual, got {code!r}.")

    def check(self, datasets, eval_source=None):
        """Raise a `ValueError` if a statement does not fit the run: before training, so that no work is lost.

        Args:
            datasets (`list[str]`): Names of the datasets, the evaluator's included.
            eval_source (`str`, *optional*): File or Hub id of the evaluation data.
        """
        unknown = sorted(set(self.data_licenses) - set(datasets)) if isinstance(self.data_licenses, dict) else []
        if unknown:
            raise ValueError(
                f"data_licenses names {unknown}, but the datasets are {sorted(datasets)}. Use these names."
            )
        if self.eval_task and not hub_id(eval_source):
            raise ValueError(
                f"eval_task is {self.eval_task!r}, but the evaluation data is {eval_source!r}. Results are reported "
                "to benchmarks on the Hub only: evaluate on its Hub id, or leave eval_task out."
            )

    def data_license(self, name):
        """The licence of one dataset; `None` if it is not known."""
        return self.data_licenses.get(name) if isinstance(self.data_licenses, dict) else self.data_licenses


def hub_id(source):
    """The Hub id of a dataset that was loaded from this source; `None` for files and unknown sources."""
    on_hub = source is not None and not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    return source if on_hub else None


def render_card(
    config,
    processor,
    prompts,
    arguments=None,
    *,
    repo_id=None,
    examples=None,
    training=None,
    data=(),
    evaluation=None,
    ablation=None,
):
    """The README.md of a repository. Without `training` it warns that the embeddings mean nothing.

    Args:
        config (`PreTrainedConfig`): The model's, with its Bottleneck Tokens.
        processor (`ProcessorMixin`): For the pixel limits.
        prompts (`dict[str, str]`): Instructions by name.
        arguments (`CardArguments`, *optional*): Licences and languages.
        repo_id (`str`, *optional*): Hub id for the snippets. Default: a placeholder.
        examples (`dict`, *optional*): Inputs of the snippets and what they print, as `measured_examples` returns
            them. Default: fixed texts, without the similarities.
        training, data, evaluation, ablation (*optional*): Facts of a run, as `training_run.card_files` collects them.

    Returns:
        `str`
    """
    arguments = arguments or CardArguments()
    examples = {"similarities": None, **(examples or EXAMPLES)}
    text_config = config.get_text_config()
    image_processor = processor.image_processor
    # Each token of an image covers this many pixels.
    patch = (image_processor.patch_size * image_processor.merge_size) ** 2
    limits = image_processor.size
    most = limits["longest_edge"] // patch
    base = getattr(config, "btok_base_model", None)
    facts = {
        "training": training,
        "data": data,
        "evaluation": evaluation,
        "ablation": ablation,
        "arguments": arguments,
        "base": base,
        "base_revision": getattr(config, "btok_base_revision", None),
        "model_type": config.model_type,
        "num_tokens": config.btok_num_tokens,
        "hidden_size": text_config.hidden_size,
        "num_layers": text_config.num_hidden_layers,
        "max_length": processor.tokenizer.model_max_length,
        "min_pixels": limits["shortest_edge"],
        "patch": patch,
        "image_tokens": [most // part for part in (1, 2, 4) if most // part * patch >= limits["shortest_edge"]],
        "prompts": {name: text for name, text in prompts.items() if text},
        "install": " ".join(f'"{requirement}"' for requirement in _snippet_requirements()),
        "repository": json.dumps(repo_id or PLACEHOLDER),
        "on_hub": repo_id is not None,
        "has_images": any(images for images, _ in examples["queries"] + examples["documents"]),
        "queries": [_as_input(*row) for row in examples["queries"]],
        "documents": [_as_input(*row) for row in examples["documents"]],
        "conversations": [
            _as_messages(*examples["queries"][0], prompts.get("query")),
            _as_messages(*examples["documents"][0], prompts.get("document")),
        ],
        "similarities": examples["similarities"],
    }
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(text=_as_text, fence=_as_fence)
    template = environment.from_string(files(__package__).joinpath("card.md.jinja").read_text("utf-8"))
    header = _metadata(config, arguments, base, data, evaluation)
    return f"---\n{header.to_yaml()}\n---\n\n{template.render(facts)}"


def _metadata(config, arguments, base, data, evaluation):
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "bottleneck-tokens", "multimodal", config.model_type],
        license=arguments.model_license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        language=arguments.languages or None,
        base_model=base,
        base_model_relation=base and "finetune",
        datasets=sorted({part["hub_id"] for part in data if part["hub_id"] and part["trained"]}) or None,
        metrics=[metric for metric, *_ in evaluation["rows"]] if evaluation else None,
    )


def _snippet_requirements():
    wanted = {re.match(r"[\w.-]+", line)[0]: line for line in metadata.requires("btok-hf") if "extra ==" not in line}
    return [wanted[name] for name in SNIPPET_REQUIREMENTS]


def _as_input(images, text):
    """Python source of one input for Sentence-Transformers."""
    if not images:
        return _quoted(text)
    paths = [f'f"{{folder}}/{path}"' for path in images]
    image = paths[0] if len(paths) == 1 else f"[{', '.join(paths)}]"
    return f'{{"image": {image}, "text": {_quoted(text)}}}' if text else f'{{"image": {image}}}'


def _as_messages(images, text, prompt):
    """Python source of each message of the same input, the prompt as the first one."""
    parts = [f'{{"type": "image", "image": f"{{folder}}/{path}"}}' for path in images]
    if text:
        parts.append(f'{{"type": "text", "text": {_quoted(text)}}}')
    system = [f'{{"role": "system", "content": {_quoted(prompt)}}}'] if prompt else []
    return [*system, f'{{"role": "user", "content": [{", ".join(parts)}]}}']


def _quoted(text):
    """Python source of a string, in double quotes where they need no escape."""
    source = repr(text)
    return source if '"' in source else f'"{source[1:-1]}"'


def _as_text(value):
    """Any text as one line of Markdown that shows it as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(str(value).split()))


def _as_fence(text, language):
    """A fenced block that the text cannot end."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"
