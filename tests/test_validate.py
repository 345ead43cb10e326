"""``lightning-gym validate``: what is sound passes, and every fault is named by the check that is there for it."""

import contextlib
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from lightning_gym.colocation import CollectSettings, Colocation
from lightning_gym.fake_engine import FakeEngine
from lightning_gym.fake_gym import FakeGym
from lightning_gym.gym.environments import Counter
from lightning_gym.losses import reinforce
from lightning_gym.policy.endpoint import Endpoint
from lightning_gym.policy.engine import EngineModel
from lightning_gym.policy.ledger import Ledger
from lightning_gym.policy.service import PolicyService
from lightning_gym.rollout import SamplingProfile
from lightning_gym.tasks import read_tasks
from lightning_gym.testing import tiny_model, tiny_tokenizer
from lightning_gym.validate import Check, EndpointChecks, check_gym, check_json, check_table
from lightning_gym.validate_training import TrainingChecks

pytestmark = pytest.mark.usefixtures("one_thread")

PROFILE = SamplingProfile(max_output_tokens=6)
PROFILES = {"train": PROFILE, "eval": PROFILE}
MAX_MODEL_LEN = 200


def tasks(count=2):
    import random

    return read_tasks([Counter.row(random.Random(seed)) for seed in range(count)])


def outcome(checks):
    return {check.name.partition(": ")[2]: check.passed for check in checks}


def failed(checks):
    return [check.name.partition(": ")[2] for check in checks if check.passed is False]


# -- an endpoint


@pytest.fixture(scope="module")
def endpoint(model_dir, one_thread):
    engine = FakeEngine(max_model_len=MAX_MODEL_LEN, script=lambda _prompt, seed: [40, 41 + seed % 5, 2])
    engine.start(EngineModel(path=model_dir, dtype="float32", weights=lambda: ()))
    engine.update_weights(lambda: None, version=0)
    engine.resume()
    endpoint = Endpoint(PolicyService(engine, model_dir, Ledger(), PROFILES))
    endpoint.start()
    yield endpoint
    engine.close()
    endpoint.close()


@dataclass
class Reply:
    status: int
    body: dict


@contextlib.contextmanager
def tampering(endpoint, tamper):
    """Stands between a client and the endpoint: ``tamper(path, request, reply)`` changes what is answered."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({})

        def do_POST(self):
            self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def answer(self, request):
            headers = {"authorization": self.headers["authorization"]}
            url = endpoint.url.removesuffix("/v1") + self.path
            real = httpx.get(url, headers=headers) if not request else httpx.post(url, headers=headers, json=request)
            reply = Reply(real.status_code, real.json())
            tamper(self.path, request, reply)
            body = json.dumps(reply.body).encode()
            self.send_response(reply.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_our_own_endpoint_passes_every_check_of_an_endpoint(endpoint):
    checks = EndpointChecks(endpoint.url, api_key=endpoint.api_key).run()
    assert failed(checks) == []
    assert len([check for check in checks if check.passed]) == 9  # this template writes no tools


def test_a_wrong_token_is_named_as_the_cause(endpoint):
    checks = EndpointChecks(endpoint.url, api_key="wrong").run()
    assert checks[0].passed is False
    assert "--api-key" in checks[0].remedy


def test_a_model_that_is_not_served_is_named_with_those_that_are(endpoint):
    checks = EndpointChecks(endpoint.url, api_key=endpoint.api_key, model="other").run()
    assert checks[0].found == "'other' is not among policy, policy-eval"


def test_an_endpoint_that_is_not_there_fails_every_check_that_asks_it():
    checks = EndpointChecks("http://127.0.0.1:9/v1", api_key="x").run()
    assert checks[0].passed is False
    assert "ConnectError" in checks[0].found


def message(reply):
    return reply.body["choices"][0]["message"]


def without_logprobs(path, _request, reply):
    if "chat" in path and reply.status == 200:
        del message(reply)["generation_log_probs"]


def a_logprob_short(path, _request, reply):
    if "chat" in path and reply.status == 200:
        message(reply)["generation_log_probs"].pop()


def positive_logprobs(path, _request, reply):
    if "chat" in path and reply.status == 200:
        message(reply)["generation_log_probs"][0] = 0.5


def history_tokenized_again(path, request, reply):
    if "chat" in path and reply.status == 200 and len(request["messages"]) > 1:
        message(reply)["prompt_token_ids"][-30] += 1


def edited_history_continued(path, request, reply):
    if "chat" in path and request["messages"] and request["messages"][0]["content"] == "Something else.":
        message(reply)["prompt_token_ids"] = request["messages"][1]["prompt_token_ids"] + [5]


def another_tokenization(path, request, reply):
    if path == "/tokenize" and "messages" in request:
        reply.body["tokens"].append(7)


def lossy_text(path, _request, reply):
    if path == "/detokenize":
        reply.body["prompt"] = reply.body["prompt"].lower()


def overflow_as_500(path, _request, reply):
    if "context length" in json.dumps(reply.body):
        reply.status = 500


def every_error_says_overflow(path, _request, reply):
    if reply.status >= 400:
        reply.body = {"error": {"message": "maximum context length or max_tokens"}}


def unknown_finish_reason(path, _request, reply):
    if "chat" in path and reply.status == 200:
        reply.body["choices"][0]["finish_reason"] = "abort"


def no_models(path, _request, reply):
    if path.endswith("/models"):
        reply.body["data"] = []


@pytest.mark.parametrize(
    ("tamper", "first"),
    [
        (without_logprobs, "token bundle"),
        (a_logprob_short, "token bundle"),
        (positive_logprobs, "token bundle"),
        (history_tokenized_again, "second turn"),
        (edited_history_continued, "edited history"),
        (another_tokenization, "tokenize"),
        (lossy_text, "token round trip"),
        (overflow_as_500, "overflow"),
        (every_error_says_overflow, "bad request"),
        (unknown_finish_reason, "chat"),
        (no_models, "models"),
    ],
)
def test_a_fault_of_an_endpoint_fails_the_check_that_is_there_for_it(endpoint, tamper, first):
    with tampering(endpoint, tamper) as url:
        checks = EndpointChecks(url, api_key=endpoint.api_key).run()
    assert failed(checks)[0] == first
    assert next(check for check in checks if check.passed is False).remedy


def test_an_endpoint_without_tokenize_is_not_blamed_for_it(endpoint):
    def no_tokenize(path, _request, reply):
        if "tokenize" in path:
            reply.status = 404

    with tampering(endpoint, no_tokenize) as url:
        checks = outcome(EndpointChecks(url, api_key=endpoint.api_key).run())
    assert checks["tokenize"] is None


# -- a Gym


@contextlib.contextmanager
def gym_of(endpoint, tmp_path, **options):
    gym = FakeGym(["counter"], max_steps=3, **options)
    try:
        yield gym.start(policy_url=endpoint.url, api_key=endpoint.api_key, model="policy", run_dir=tmp_path)
    finally:
        gym.close()


def test_a_gym_whose_rollouts_come_back_with_ids_passes(endpoint, tmp_path):
    with gym_of(endpoint, tmp_path) as head_url:
        checks = check_gym(head_url, tasks(), PROFILE, timeout_s=30)
    assert failed(checks) == []
    assert len(checks) == 4


def test_a_gym_that_fails_a_rollout_is_quoted(endpoint, tmp_path):
    with gym_of(endpoint, tmp_path, fault=lambda _n: 422) as head_url:
        checks = check_gym(head_url, tasks(), PROFILE, timeout_s=30)
    assert failed(checks) == ["/run gives a reward"]
    assert "2 of 2 failed; task 0: environment: HTTP 422: fault injected" in checks[1].found


def test_a_row_of_an_agent_that_this_gym_does_not_run_is_named(endpoint, tmp_path):
    other = read_tasks([{**tasks(1)[0].row, "agent_ref": {"type": "responses_api_agents", "name": "other"}}])
    with gym_of(endpoint, tmp_path) as head_url:
        checks = check_gym(head_url, other, PROFILE, timeout_s=30)
    assert checks[-1].found == "no agent is called other"


def test_a_gym_that_is_not_there_is_said(tmp_path):
    (check,) = check_gym("http://127.0.0.1:9", tasks(), PROFILE, timeout_s=30)
    assert check.passed is False


# -- a whole set-up


def training_checks(model_dir, tmp_path, *, engine=None, gym=None, loss=reinforce, sync_mode="auto"):
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_layers=1, num_kv_heads=1)
    engine = engine or FakeEngine(max_model_len=MAX_MODEL_LEN)
    colocation = Colocation(
        engine, gym or FakeGym(["counter"], max_steps=2), PROFILES, CollectSettings(), sync_mode=sync_mode
    )
    return TrainingChecks(model, colocation, tasks(), model_path=model_dir, run_dir=tmp_path, loss=loss).run()


def test_a_sound_set_up_passes_every_check_and_is_closed(model_dir, tmp_path):
    engine = FakeEngine(max_model_len=MAX_MODEL_LEN)
    checks = training_checks(model_dir, tmp_path, engine=engine)
    assert failed(checks) == []
    assert outcome(checks)["weights after a step"] is True
    assert engine.events[-1] == "close"


def test_logprobs_of_another_distribution_fail_the_parity(model_dir, tmp_path):
    engine = FakeEngine(max_model_len=MAX_MODEL_LEN, logprob=lambda _position, _token: -0.25)
    assert "logprob parity" in failed(training_checks(model_dir, tmp_path, engine=engine))


def test_a_loss_that_looks_at_tokens_that_were_not_sampled_fails_the_gradient(model_dir, tmp_path):
    def careless(logprobs, batch):
        return (-logprobs * (batch.loss_weight + 1e-3)).sum(), {}

    def leaky(logprobs, batch):
        return -(logprobs * batch.loss_weight).sum() * (1 + batch.advantages.sum()), {}

    assert failed(training_checks(model_dir, tmp_path, loss=careless)) == ["gradient"]
    assert failed(training_checks(model_dir, tmp_path, loss=leaky)) == ["gradient"]


class OldWeights(FakeEngine):
    """Puts back the first weights after every update."""

    def update_weights(self, write, *, version):
        super().update_weights(write, version=version)
        if version == 0:
            self.first = {name: view.clone() for name, view in self.weight_views().items()}
        else:
            for name, view in self.weight_views().items():
                view.data.copy_(self.first[name])


@pytest.mark.parametrize(
    ("mode", "words"), [("copy", "disagree"), ("share", "a step along the gradient moved the sampled")]
)
def test_an_engine_that_keeps_its_old_weights_fails_after_the_step(model_dir, tmp_path, mode, words):
    engine = OldWeights(max_model_len=MAX_MODEL_LEN)
    checks = training_checks(model_dir, tmp_path, engine=engine, sync_mode=mode)
    assert failed(checks) == ["weights after a step"]
    assert words in checks[-1].found


def test_a_set_up_that_does_not_start_says_why_and_stops_there(model_dir, tmp_path):
    checks = training_checks(model_dir, tmp_path, engine=FakeEngine(max_model_len=5))
    assert outcome(checks) == {"start": False}
    assert "max_model_len" in checks[0].found


def test_rollouts_that_all_fail_are_a_failed_check_and_not_a_crash(model_dir, tmp_path):
    checks = training_checks(model_dir, tmp_path, gym=FakeGym(["counter"], fault=lambda _n: 422))
    assert failed(checks) == ["rollouts"]
    assert "4 environment" in checks[-1].found or "environment" in checks[-1].found


# -- what is printed


def test_the_table_has_a_line_a_check_and_the_remedy_below_a_failed_one():
    checks = [Check(name="a", passed=True, found="1 token"), Check(name="bb", passed=False, found="2", remedy="mend")]
    assert check_table(checks) == "PASS  a   1 token\nFAIL  bb  2\n          -> mend"
    assert json.loads(check_json(checks))[1]["remedy"] == "mend"


def test_the_command_checks_a_recipe_with_overrides(model_dir, tmp_path, monkeypatch, capsys):
    from lightning_gym.cli import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(task.row) for task in tasks(3)))
    overrides = [
        f"policy.model={model_dir}",
        f"data.train={rows}",
        f"output_dir={tmp_path}/out",
        "engine._target_=lightning_gym.testing.FakeEngine",
        "~engine.seed",
        "sampling.max_output_tokens=4",
    ]
    main(["validate", *overrides, "--limit", "2", "--json"])
    checks = json.loads(capsys.readouterr().out)
    assert all(check["passed"] is not False for check in checks)
    assert checks[-1]["name"] == "training: weights after a step"


def test_the_command_leaves_with_status_1_when_a_check_fails(capsys):
    from lightning_gym.cli import main

    with pytest.raises(SystemExit) as left:
        main(["validate", "--endpoint", "http://127.0.0.1:9/v1"])
    assert left.value.code == 1
    assert "FAIL  endpoint: models" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"), [([], "nothing to check"), (["--gym", "http://127.0.0.1:9"], "--gym needs --rows")]
)
def test_a_command_without_anything_to_check_says_what_is_missing(arguments, words):
    from lightning_gym.cli import main

    with pytest.raises(SystemExit, match=words):
        main(["validate", *arguments])
