"""Speed of the vision tower: one attention call for all images of a size, against transformers' loop over images.

    python -m benchmarks.vision    # 5 minutes on one CPU core with --rounds 5

It writes benchmarks/results/vision.json.

Outputs and gradients of both are compared before anything is timed.
"""

import torch
from transformers import AutoModel, AutoProcessor

from benchmarks.bench import DEVICE, arguments, compare, images, record, repository, show, summary
from btok_hf.packed_attention import VISION_ATTENTION


def calls(size, pictures):
    """One callable for each attention, forward and training step."""
    repo = repository(size, 4)
    processor, model = AutoProcessor.from_pretrained(repo), AutoModel.from_pretrained(repo).to(DEVICE)
    inputs = processor.image_processor(pictures, return_tensors="pt").to(DEVICE)
    visual = model.visual

    def forward(attention):
        visual.config._attn_implementation = attention
        layouts = {"vision_layouts": {}} if attention == VISION_ATTENTION else {}  # shared by the layers
        output = visual(inputs["pixel_values"].to(visual.dtype), grid_thw=inputs["image_grid_thw"], **layouts)
        return output.pooler_output if hasattr(output, "pooler_output") else output

    @torch.no_grad()
    def encode(attention):
        return forward(attention)

    def train(attention, keep=False):
        output = forward(attention)
        output.float().square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in visual.named_parameters() if p.grad is not None}
        visual.zero_grad(set_to_none=True)
        return output, gradients

    return inputs, encode, train


def measure(size, rounds):
    """Rows of the table."""
    drawings, figures, pages = images()
    rows = []
    for name, pictures in (
        ("64 drawings of 4 tokens", drawings[:64]),
        ("8 pages of 224 tokens", pages[:8]),
        ("20 figures of many sizes", figures[:20]),
    ):
        inputs, encode, train = calls(size, pictures)
        (ours, ours_grad), (loop, loop_grad) = train(VISION_ATTENTION), train("sdpa")
        error = ((ours - loop).abs().max() / loop.abs().max()).item()
        scale = max(gradient.abs().max() for gradient in loop_grad.values())
        gradient_error = max(((ours_grad[k] - loop_grad[k]).abs().max() / scale).item() for k in loop_grad)
        limit = 1e-4 if ours.dtype == torch.float32 else 0.05
        if not max(error, gradient_error) <= limit:
            raise SystemExit(f"{name}: outputs differ by {error:.1e}, gradients by {gradient_error:.1e}.")
        for mode, call in (("encode", encode), ("train", train)):
            contenders = {kind: (lambda call=call, kind=kind: call(kind)) for kind in ("sdpa", VISION_ATTENTION)}
            found = summary(compare(contenders, rounds), "sdpa")
            rows.append(
                show(
                    {
                        "images": name,
                        "mode": mode,
                        "patches": len(inputs["pixel_values"]),
                        "loop_s": found["sdpa"]["median_s"],
                        "grouped_s": found[VISION_ATTENTION]["median_s"],
                        "speed_ratio": found[VISION_ATTENTION]["speed_ratio"],
                        "quartiles": found[VISION_ATTENTION]["ratio_quartiles"],
                        "outputs_differ_by": float(f"{error:.1e}"),
                        "gradients_differ_by": float(f"{gradient_error:.1e}"),
                    }
                )
            )
    return rows


def main():
    options = arguments(__doc__)
    record("vision", measure(options.size, options.rounds), size=options.size)


if __name__ == "__main__":
    main()
