"""The other side of data_prep.py: the same rows through TRL's SFTTrainer, in TRL's own environment.

Prints one JSON line: seconds of the dataset preparation, seconds of one epoch of batches, rows and tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-proc", type=int)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    words = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")

    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    datasets.disable_caching()
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    with Path(words.file).open(encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    rows = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in read
    ]
    seconds = {}

    class Timed(trl.SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            began, cpu = time.perf_counter(), sum(os.times()[:4])
            prepared = super()._prepare_dataset(*args, **kwargs)
            seconds["prepare"] = time.perf_counter() - began
            seconds["prepare_cpu"] = sum(os.times()[:4]) - cpu  # with that of its processes, which have ended
            return prepared

    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder,
            use_cpu=True,
            report_to="none",
            max_length=words.max_length,
            dataset_num_proc=words.num_proc,
            per_device_train_batch_size=words.batch,
            disable_tqdm=True,
        )
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(words.model),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(words.model),
        )
        began = time.perf_counter()
        n_tokens = n_scored = 0
        for batch in trainer.get_train_dataloader():
            n_tokens += int(batch["attention_mask"].sum())
            n_scored += int((batch["labels"] != -100).sum())
        seconds["batches"] = time.perf_counter() - began
    print(json.dumps({"trl": trl.__version__, "rows": len(rows), "tokens": n_tokens, "scored": n_scored, **seconds}))


if __name__ == "__main__":
    main()
