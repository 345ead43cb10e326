"""No word leaves this machine unasked: telemetry off, and the hub left alone where the model is local."""

import os
from pathlib import Path


def stay_quiet(model: str | Path) -> None:
    """Set what decides it, for a run with this model; the user's own environment variables win.

    vLLM and processes started from here read the variables. huggingface_hub 2.4 (``constants.py``) read them when it
    was imported, which other libraries do early, so its two constants are set as well.
    """
    from huggingface_hub import constants

    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        constants.HF_HUB_DISABLE_TELEMETRY = True
    if Path(model).is_dir() and "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
    for name in ("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
