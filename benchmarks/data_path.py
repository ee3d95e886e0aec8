"""The data path: the time of decoding, and whether training waits for data.

    python -m benchmarks.data_path    # 3 minutes on one CPU core with --rounds 5

It writes benchmarks/results/data_path.json.

Waiting is the share of a run in which the training loop waits for its next batch, by the number of worker processes.
On a CPU, workers and model share the cores. On a GPU they do not.
"""

import time

from datasets import Dataset
from PIL import Image

from benchmarks import ROOT
from benchmarks.bench import DEVICE, arguments, compare, images, record, repository, show, summary
from btok_hf import BTokSentenceTransformer
from btok_hf.media import read_image
from btok_hf.training import CondensationConfig, CondensationTrainer

PHOTO = (4000, 3000)
FOLDER = ROOT / "runs" / "bench" / "photos"


def photos(count):
    """Large JPEG files: figures of textbooks, enlarged to the size of a photograph."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(images()[1][:count]):
        if not (path := FOLDER / f"{index}.jpg").exists():
            picture.resize(PHOTO, Image.Resampling.BICUBIC).save(path, quality=90)
    return [str(FOLDER / f"{index}.jpg") for index in range(count)]


def decoding(model, rounds):
    """A photograph to model inputs, decoded whole and at a reduced size, and how far the vectors differ."""
    paths = photos(4)
    limit = model[0].processor.image_processor.size["longest_edge"]
    calls = {
        "whole": lambda: model.preprocess([read_image(path) for path in paths]),
        "reduced": lambda: model.preprocess([read_image(path, limit) for path in paths]),
    }
    found = summary(compare(calls, rounds), "whole")
    vectors = [model.encode([read_image(path, pixels) for path in paths]) for pixels in (None, limit)]
    return show(
        {
            "table": "decoding",
            "pixels": "{} x {}".format(*PHOTO),
            "max_pixels": limit,
            "whole_s": found["whole"]["median_s"] / len(paths),
            "reduced_s": found["reduced"]["median_s"] / len(paths),
            "speed_ratio": found["reduced"]["speed_ratio"],
            "quartiles": found["reduced"]["ratio_quartiles"],
            "smallest_cosine": round(float((vectors[0] * vectors[1]).sum(1).min()), 6),
        }
    )


class Watched(CondensationTrainer):
    """Measures how long training waits for batches, from the third step on: workers have to start."""

    waited, since = 0.0, None

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        batch = super().get_batch_samples(*args, **kwargs)
        if self.state.global_step == 2:
            self.since = time.perf_counter()
        elif self.state.global_step > 2:
            self.waited += time.perf_counter() - start
        return batch


def waiting(size, workers, steps):
    """One short run over photographs and their captions."""
    # No two of them are equal, so that all are encoded.
    queries = [{"image": path, "text": f"photograph {i}"} for i, path in enumerate(photos(16) * 16)]
    rows = Dataset.from_dict({"query": queries, "positive": [f"figure {i} of a book" for i in range(len(queries))]})
    model = BTokSentenceTransformer(repository(size, 4), processor_kwargs={"max_pixels": 224 * 224})
    args = CondensationConfig(
        output_dir=str(ROOT / "runs" / "bench" / "run"),
        max_steps=steps,
        per_device_train_batch_size=16,
        mini_batch_size=16,
        dataloader_num_workers=workers,
        learning_rate=1e-5,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=DEVICE == "cuda",
    )
    trainer = Watched(model=model, args=args, train_dataset=rows)
    trainer.train()
    seconds = time.perf_counter() - trainer.since
    return show(
        {
            "table": "waiting",
            "workers": workers,
            "samples_per_s": round(16 * (steps - 2) / seconds, 1),
            "waiting": round(trainer.waited / seconds, 3),
        }
    )


def main():
    options = arguments(
        __doc__,
        steps={"type": int, "default": 12},
        workers={"type": int, "nargs": "+", "default": [0, 1, 2] if DEVICE == "cpu" else [0, 4, 8]},
    )
    rows = [decoding(BTokSentenceTransformer(repository(options.size, 4)), options.rounds)]
    rows += [waiting(options.size, workers, options.steps) for workers in options.workers]
    record("data_path", rows, size=options.size)


if __name__ == "__main__":
    main()
