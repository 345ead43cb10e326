"""The environment of every test: offline and silent, whoever starts pytest. Set before anything is imported."""

import os

os.environ.update(
    DO_NOT_TRACK="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_DO_NOT_TRACK="1",
    VLLM_NO_USAGE_STATS="1",
)
