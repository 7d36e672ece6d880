"""transformers and the Hub client, kept quiet and quick to give up. The one place that touches their globals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.network import go_offline_if_unreachable


def hush() -> None:
    """No advice, no bars for what takes a moment, no telemetry. What matters of it `load_policy` checks and says.

    Downloads keep their bars, and TRANSFORMERS_VERBOSITY brings the advice back.
    """
    import huggingface_hub.constants
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    logging.disable_progress_bar()  # the Hub client's as well
    if huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        enable_progress_bars()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()


def reach(source: str) -> None:
    """Before a Hub name is looked up: without a network only the cache is asked, instead of a minute of retries."""
    hush()
    if not Path(source).is_dir():
        go_offline_if_unreachable()


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model folder or Hub name, without its weights."""
    reach(source)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as fault:
        said = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise ModelError(
            f"model {source!r} has no tokenizer that can be loaded: {said.rstrip('.')}.",
            remedy="Give a model folder, a Hub name you have access to, or builtin:tiny-base.",
        ) from fault
