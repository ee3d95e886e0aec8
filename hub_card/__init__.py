"""The model card: a Jinja template and the function that fills it. Installed as `btok_hf.hub_card`."""

from importlib.resources import files

import jinja2


def render_card(config, processor, prompts, **results):
    """Fill the card's template with what is known of a model.

    Args:
        config (`PreTrainedConfig`): The model's, with its Bottleneck Tokens.
        processor (`ProcessorMixin`): For the pixel limits.
        prompts (`dict[str, str]`): Instructions by name.
        results: What a training run measured: `training` (list of `(name, value)`), `evaluation` (list of
            `(metric, before, after)`), `evaluation_note`, `license`, `command`. Sections without content are left out.

    Returns:
        `str`: The README.md of the repository.
    """
    template = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(files(__name__).joinpath("card.md.jinja").read_text("utf-8"))
    text_config = config.get_text_config()
    size = processor.image_processor.size
    defaults = dict.fromkeys(("training", "evaluation", "evaluation_note", "license", "command"))
    return template.render(
        model_type=config.model_type,
        num_tokens=config.btok_num_tokens,
        hidden_size=text_config.hidden_size,
        num_layers=text_config.num_hidden_layers,
        max_length=processor.tokenizer.model_max_length,
        min_pixels=size["shortest_edge"],
        max_pixels=size["longest_edge"],
        prompts={name: text for name, text in prompts.items() if text},
        **{**defaults, **results},
    )
