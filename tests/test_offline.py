"""A run with a local model asks no hub and reports to nobody."""

import json
import os
import subprocess
import sys

import pytest

ASK = (
    "import sys, json; from lightning_gym import train; from lightning_gym.offline import stay_quiet; "
    "stay_quiet(sys.argv[1]); import huggingface_hub.constants as hub; "
    "print(json.dumps([hub.HF_HUB_OFFLINE, hub.HF_HUB_DISABLE_TELEMETRY]))"
)


@pytest.mark.parametrize(("local", "said"), [(True, [True, True]), (False, [False, True])])
def test_the_hub_is_offline_for_a_local_model_and_telemetry_is_off_for_any(tmp_path, local, said):
    unset = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    model = str(tmp_path) if local else "some/name"
    asked = subprocess.run(
        [sys.executable, "-c", ASK, model], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(asked.stdout.splitlines()[-1]) == said
