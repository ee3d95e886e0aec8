"""Ragged inputs as chat messages, and what the processor makes of them."""

import os

import torch
from PIL import Image
from transformers import AutoProcessor

from support.media import image, video

TOLERANCE = 1e-6  # between vectors of one input, however it was loaded or batched
TARGETS = ["a cat", "", "two dogs and a tree", "x"]


def rows(kind):
    """Four ragged inputs as chat messages."""
    contents = {
        "text": [["hi"], ["a much longer query than the others"], ["mid length"], ["another one here"]],
        "image": [
            [image(60, 80), "what"],
            ["no image at all"],
            [image(56, 56), image(90, 40), "two"],
            [image(40, 40)],
        ],
        "uniform": [
            [image(60, 80), "what"],
            [image(60, 80, 1), "isit"],
            [image(60, 80, 2), "this"],
            [image(60, 80, 3), "kind"],
        ],
        # The processor of InternVL3 takes videos of one length.
        "video": [[video(4), "move"], [video(4, 28, 1)], [image(60, 60), "still"], ["none"]],
    }[kind]
    return [[{"role": "user", "content": [_part(part) for part in content]}] for content in contents]


def _part(value):
    if isinstance(value, str):
        return {"type": "text", "text": value}
    return {"type": "video", "video": value["array"]} if isinstance(value, dict) else {"type": "image", "image": value}


def process(processor, conversations, side="right"):
    padding = {"padding": True, "padding_side": side}
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=padding
    )


def targets(processor, texts=TARGETS):
    """An unsupervised prompt and a supervised text per row; an empty text is a row without a target."""
    tokenizer = processor.tokenizer
    prompt, *bodies = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("<|im_start|>assistant\n", *(f"{text}<|im_end|>" for text in texts))
    )
    ids = [prompt + body if text else [] for text, body in zip(texts, bodies)]
    labels = [[-100] * len(prompt) + row[len(prompt) :] for row in ids]
    pad = {"batch_first": True, "padding_side": "right"}
    return (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in ids], padding_value=7, **pad),
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.long) for row in labels], padding_value=-100, **pad
        ),
    )


def text_inputs(repo, texts, side="right"):
    return process(AutoProcessor.from_pretrained(repo), [[{"role": "user", "content": t}] for t in texts], side)


def as_messages(item, prompt=None):
    """What a user of AutoProcessor would write for an input."""
    system = [{"role": "system", "content": prompt}] if prompt else []
    if isinstance(item, list):
        return [*system, *item]
    if isinstance(item, str) and not os.path.isfile(item):
        item = {"text": item}
    elif not isinstance(item, dict):
        item = {"image": Image.open(item) if isinstance(item, str) else item}
    content = []
    for key, values in item.items():
        for value in values if isinstance(values, list) else [values]:
            content.append({"type": key, key: value})
    return [*system, {"role": "user", "content": content}]
