"""Bad input: one message that says what was wanted, what came and the remedy; no traceback."""

import gzip
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import (
    WORDS,
    command,
    pair_rows,
    python,
    sft_rows,
    tiny_model,
    tiny_tokenizer,
    write_model,
    write_rows,
)

from prefuse.trainer import flags
from prefuse.trainer.cli import main
from prefuse.trainer.config import DPOConfig, SFTConfig
from prefuse.trainer.online_config import GRPOConfig

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model, tmp_path, capsys):
    """Runs a command in this process; returns its exit status and what it printed as errors."""

    def run(method: str, rows: list[dict] | str, *more: str) -> tuple[object, str]:
        data = rows if isinstance(rows, str) else write_rows(tmp_path / "rows.jsonl", rows)
        given = dict(model_name_or_path=model, dataset_name=data, output_dir=str(tmp_path / "out"))
        argv = [f"--{k}={v}" for k, v in given.items() if not any(a == f"--{k}" for a in more)]
        more = ("--max_steps", "1", "--disable_tqdm", *more)
        return outcome([method, *argv, *more], capsys)

    return run


def outcome(argv: list[str], capsys) -> tuple[object, str]:
    status: object = 0
    try:
        main(argv)
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


def assert_told(result: tuple[object, str], *wanted: str) -> None:
    """Status 2 and one message with all of `wanted` in it."""
    status, text = result
    assert status == 2
    messages = [line for line in text.splitlines() if line.startswith("prefuse: error: ")]
    assert len(messages) == 1 and "Traceback" not in text
    for words in wanted:
        assert words in text


@pytest.mark.parametrize(
    "argv, wanted",
    [
        (["--learning_rat", "1"], "--learning_rat: no such flag; did you mean --learning_rate?"),
        (["--learning-rat=1"], "did you mean --learning_rate?"),
        (["--zzzzqqqq"], "--zzzzqqqq: no such flag"),
        (["--learning_rate", "abc"], "--learning_rate: wanted float; got 'abc'"),
        (["--max_steps", "1.5"], "--max_steps: wanted int; got '1.5'"),
        (["--max_length", "x"], "--max_length: wanted int or none; got 'x'"),
        (["--max_steps"], "--max_steps: wanted a value; got none"),
        (["--bf16", "maybe"], "--bf16"),
        (["--layout", "round"], "--layout: wanted one of"),
        (["bare"], "bare: wanted a --flag; got a bare word"),
        (["--learning_rate", "-1e-3"], "--learning_rate: wanted a number from 0; got -0.001"),
        (["--learning_rate", "nan"], "--learning_rate: wanted a number from 0; got nan"),
        (["--eval_steps", "0"], "--eval_steps: wanted a positive number; got 0"),
        (["--eval_strategy", "steps"], "--eval_strategy: wanted held-out rows"),
        (["--num_train_epochs", "0"], "--num_train_epochs: wanted a positive number"),
        (["--max_length", "1"], "--max_length: wanted 2 or more; got 1"),
        (["--loss_type", "sigmoyd"], "--loss_type: wanted one of sigmoid, sigmoid_norm, robust"),
        (["--loss_type", "DPO"], "got DPO; did you mean sigmoid?"),
        (["--loss_type", "xpo"], "--loss_type xpo: it reads explored of every pair"),
        (["--loss_type", "aot"], "--loss_type aot: it compares the pairs of the whole batch"),
        (["--ref_model_mixup_alpha", "0"], "--ref_model_mixup_alpha: wanted a number in (0, 1]"),
        (["--sync_ref_model", "--precompute_ref_log_probs"], "--sync_ref_model: wanted a refer"),
        (["--beta", "0"], "--beta: wanted a positive number; got 0"),
        (["--label_smoothing", "1.5"], "--label_smoothing: wanted a probability; got 1.5"),
        (["--gamma", "1"], "--gamma: loss 'sigmoid' has no such hyperparameter; it takes beta"),
        (["--config"], "--config: wanted a YAML file; got nothing"),
        (["--config", "absent.yaml"], "absent.yaml: no such file"),
    ],
)
def test_wrong_flags(argv, wanted, capsys):
    assert_told(outcome(["dpo", *NEEDED, *argv], capsys), wanted)


def test_required_flags(capsys):
    wanted = "--dataset_name, --output_dir: wanted a value; got none"
    assert_told(outcome(["sft", "--model_name_or_path", "m"], capsys), wanted)


@pytest.mark.parametrize(
    "argv, wanted",
    [
        (["dpoo"], "dpoo: no such command; did you mean dpo?"),
        (["train"], "train: wanted a YAML file first; got nothing"),
        (["train", "--method", "dpo"], "train: wanted a YAML file first; got --method"),
        (["train", "absent.yaml"], "absent.yaml: no such file"),
        (["methods", "sigmoyd"], "sigmoyd: no such loss; did you mean sigmoid?"),
        (["estimate", "dppo"], "wanted a command or a FILE.yaml first; got dppo; did you mean"),
        (["estimate", "--world_size", "8"], "wanted a command or a FILE.yaml first; got nothing"),
        (["methods", "dpo"], "dpo: no such loss; did you mean sigmoid?"),
    ],
)
def test_wrong_commands(argv, wanted, capsys):
    assert_told(outcome(argv, capsys), wanted)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("beta: 0.1\n", "wanted `method:` one of sft, dpo, "),
        ("method: bco\n", "wanted `method:` one of sft, dpo, "),
        ("method: dpo\nbetta: 1\n", "run.yaml:2: betta: no such key; did you mean beta?"),
        ("method: sft\nbeta: 1\n", "run.yaml:2: beta: no such key"),
        ("method: dpo\nmax_steps: 1.5\n", "--max_steps: wanted int; got '1.5'"),
        ("method: dpo\nhyperparameters: {beta: 1}\n", "run.yaml:2: hyperparameters: no such key"),
        ("method: [\n", "not valid YAML"),
        ("- 1\n", "wanted keys and values; got list"),
    ],
)
def test_wrong_yaml(text, wanted, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert_told(outcome(["train", str(tmp_path / "run.yaml"), *NEEDED], capsys), wanted)


def test_a_flag_overrides_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    text = "learning_rate: 3e-4\nbf16: true\nbeta: 0.5\nmax_length: null\nseed:\nlogging_steps: 3\n"
    file.write_text("method: dpo\n" + text)
    for given in (["--config", str(file)], [f"--config={file}"]):
        config = flags.parse(DPOConfig, [*NEEDED, "--seed", "7", *given, "--logging_steps=5"])
        assert (config.learning_rate, config.bf16, config.logging_steps) == (3e-4, True, 5)
        assert (config.max_length, config.seed, config.hyperparameters["beta"]) == (None, 7, 0.5)
    command, rest = flags.from_file([str(file), *NEEDED, "--beta", "0.25"])
    assert command == "dpo" and flags.parse(DPOConfig, rest).hyperparameters["beta"] == 0.25


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--bf16=none"], "bf16", None),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient-checkpointing=no"], "gradient_checkpointing", False),
        (["--shuffle_dataset", "false"], "shuffle_dataset", False),
        (["--no-shuffle-dataset"], "shuffle_dataset", False),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--max_length", "none"], "max_length", None),
        (["--resume_from_checkpoint", "false"], "resume_from_checkpoint", None),
        (["--max_length=64"], "max_length", 64),
        (["--output_dir=a-b=c"], "output_dir", "a-b=c"),
        (["--warmup_steps", "0.1"], "warmup_steps", 0.1),
        (["--completion_only_loss"], "completion_only_loss", True),
        ([], "completion_only_loss", None),
    ],
)
def test_values_of_flags(argv, name, value):
    assert getattr(flags.parse(SFTConfig, [*NEEDED, *argv]), name) == value


@pytest.mark.parametrize(
    "argv, funcs, weights",
    [
        (["--reward_funcs", "x", "y?z=2"], ["x", "y?z=2"], None),
        (["--reward_funcs", "x", "--reward-funcs=y", "--reward_funcs", "z"], ["x", "y", "z"], None),
        (["--config", "run.yaml"], ["a", "b"], [1, -2]),
        (["--config", "run.yaml", "--reward_funcs", "x", "--reward_funcs=y"], ["x", "y"], [1, -2]),
        (["--config", "run.yaml", "--reward_weights", "3", "4"], ["a", "b"], [3, 4]),
        (["--config", "run.yaml", "--reward_weights", "none"], ["a", "b"], None),
        (["--config", "empty.yaml", "--reward_funcs", "x"], ["x"], None),
    ],
)
def test_repeated_lists_go_on_and_replace_the_files(argv, funcs, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("reward_funcs: [a, b]\nreward_weights: [1, -2]\n")
    (tmp_path / "empty.yaml").write_text("reward_funcs: []\nreward_weights:\n")
    config = flags.parse(GRPOConfig, [*NEEDED, *argv])
    assert (config.reward_funcs, config.reward_weights) == (funcs, weights)


def test_lists_replace_those_of_the_file_that_is_trained(tmp_path):
    (tmp_path / "run.yaml").write_text("method: grpo\nreward_funcs: [a, b]\n")
    for argv, wanted in (([], ["a", "b"]), (["--reward_funcs", "x"], ["x"])):
        _, rest = flags.from_file([str(tmp_path / "run.yaml"), *NEEDED, *argv])
        assert flags.parse(GRPOConfig, rest).reward_funcs == wanted


def test_methods_are_listed_and_told(capsys):
    main(["methods"])
    listed = capsys.readouterr().out
    assert re.search(r"^  simpo .*gamma=1\.0", listed, re.M) and "2305.18290" in listed
    assert "kto" in listed and "lipo" in listed
    main(["methods", "ipo"])
    assert "tau depends on the length" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", ["", "train -h", "methods --help", "report -h", "verify-resume -h"]
)
def test_every_command_has_help(argv, capsys):
    main(argv.split())
    assert capsys.readouterr().out.startswith("usage: prefuse COMMAND")


def test_help_does_not_wait_for_torch(capsys):
    main(["--help"])
    assert "prefuse COMMAND" in capsys.readouterr().out
    code = "import sys; from prefuse.trainer.cli import main; main(['--help'])"
    code += "; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    path = "import sys, types; p = types.ModuleType('prefuse'); sys.modules['prefuse'] = p; "
    path += f"p.__path__ = [{str(python.__globals__['HERE'].parent)!r}]; "
    subprocess.run([sys.executable, "-c", path + code], check=True, stdout=subprocess.DEVNULL)


PAIR = {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}
MESSAGES = [{"role": "user", "content": "w1"}]


@pytest.mark.parametrize(
    "method, row, wanted",
    [
        ("dpo", {"prompt": "a", "rejected": "b"}, ":3: wanted a column 'chosen'; got ['prompt', "),
        ("dpo", PAIR | {"rejected": None}, ":3: wanted a column 'rejected'"),
        ("dpo", PAIR | {"rejected": ""}, ":3: 'rejected' is an empty completion"),
        ("dpo", PAIR | {"chosen": 5}, ":3: 'chosen': wanted text or a list of"),
        ("dpo", PAIR | {"chosen": ["w1"]}, ":3: 'chosen': wanted text or a list of"),
        ("dpo", PAIR | {"chosen": MESSAGES}, ":3: 'rejected': wanted messages, as 'chosen' is"),
        ("dpo", PAIR | {"prompt": MESSAGES}, ":3: 'chosen': wanted messages, as 'prompt' is"),
        ("dpo", {"chosen": MESSAGES, "rejected": MESSAGES}, "wanted text, as in "),
        (
            "dpo",
            {"chosen": [*MESSAGES, {"role": "assistant", "content": ""}], "rejected": MESSAGES},
            ":3: 'chosen' is an empty completion",
        ),
        ("kto", PAIR | {"prompt": MESSAGES}, ":3: 'prompt': wanted text, as 'chosen' is"),
        ("sft", {"txt": "w1"}, ":3: wanted 'text', 'messages', or 'prompt' and 'completion'"),
        ("sft", {"text": ""}, ":3: 'text' is empty"),
        ("sft", {"text": 3}, ":3: 'text': wanted text or a list of"),
        ("sft", {"prompt": "w1", "completion": ""}, ":3: 'completion' is an empty completion"),
        ("sft", {"prompt": "w1", "completion": MESSAGES}, ":3: 'prompt': wanted messages, as"),
    ],
)
def test_bad_rows(method, row, wanted, run):
    good = pair_rows(2) if method == "dpo" else sft_rows(2)
    assert_told(run(method, [*good, row]), "rows.jsonl", wanted)


def test_missing_and_broken_files(run, tmp_path):
    assert_told(run("dpo", "absent.jsonl"), "absent.jsonl: no such file")
    assert_told(run("dpo", str(tmp_path / "absent")), "no such file")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PAIR) + "\n\n{'prompt': 1}\n")
    assert_told(run("dpo", str(broken)), "broken.jsonl:3: wanted one JSON object a line; column 2")
    broken.write_text("[1, 2]\n")
    assert_told(run("dpo", str(broken)), "broken.jsonl:1: wanted a JSON object; got list")
    broken.write_bytes(b'{"prompt": "\xff"}\n')
    assert_told(run("dpo", str(broken)), "broken.jsonl: wanted jsonl in UTF-8")
    array = tmp_path / "broken.json"
    array.write_text('[\n{"prompt": "a"},\n]')
    assert_told(run("dpo", str(array)), "broken.json: wanted one JSON object a line; line 3")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:-9])
    assert_told(run("dpo", str(tmp_path / "broken.jsonl.gz")), "broken.jsonl.gz: wanted jsonl")
    (tmp_path / "broken.parquet").write_text("text")
    assert_told(run("dpo", str(tmp_path / "broken.parquet")), "not a parquet file")
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\n")
    assert_told(run("dpo", str(tmp_path / "rows.csv")), "rows.csv:3: wanted 3 cells")
    (tmp_path / "rows.txt").write_text("text")
    assert_told(run("dpo", str(tmp_path / "rows.txt")), "wanted .jsonl, .json, .csv or .parquet")
    (tmp_path / "empty").mkdir()
    assert_told(run("dpo", str(tmp_path / "empty")), "the folder has none")
    (tmp_path / "empty.jsonl").write_text("")
    assert_told(run("sft", str(tmp_path / "empty.jsonl")), "no row is left to train on")


def test_models_that_do_not_load(run, tmp_path):
    rows = pair_rows(2)
    nowhere = str(tmp_path / "nowhere")
    assert_told(run("dpo", rows, "--model_name_or_path", nowhere), f"{nowhere}: no such folder")
    (tmp_path / "hollow").mkdir()
    tiny_tokenizer().save_pretrained(tmp_path / "hollow")
    hollow = str(tmp_path / "hollow")
    assert_told(run("dpo", rows, "--model_name_or_path", hollow), f"{hollow}: no model loads")


def test_tokenizers_that_do_not_fit(run, tmp_path):
    no_eos = write_model(tmp_path / "no_eos", tokenizer=tiny_tokenizer(eos=None))
    rows = pair_rows(4)
    assert_told(run("dpo", rows, "--model_name_or_path", no_eos), "has no EOS token", "eos_token")
    wider = tiny_tokenizer(words=[*WORDS, "extra"])
    folder = write_model(tmp_path / "wider", tokenizer=wider)
    assert_told(
        run("dpo", rows, "--model_name_or_path", folder),
        "the tokenizer has 49 tokens but the model's vocabulary 48",
    )
    # as many tokens as the model has, but with a gap: one id is past the model's last
    vocabulary = {w: i for i, w in enumerate(WORDS[:-1])} | {"far": len(WORDS) + 5}
    gapped = tiny_tokenizer(words=vocabulary)
    folder = write_model(tmp_path / "gapped", tokenizer=gapped)
    row = {"prompt": "w1", "chosen": " far", "rejected": " w2"}
    assert_told(
        run("dpo", [*rows, row], "--model_name_or_path", folder),
        "rows.jsonl:5: wanted tokens below 48, the model's vocabulary; got 53",
    )


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_rows_longer_than_a_table_of_positions(run, tmp_path, method):
    model = tiny_model("OPT", max_position_embeddings=16, word_embed_proj_dim=32)
    folder = write_model(tmp_path / "opt", model)
    pair = {"prompt": "w1", "chosen": " w2", "rejected": " w3" * 20}
    row = pair if method == "reward" else {"text": " w1" * 20}
    told = run(method, [row], "--model_name_or_path", folder)
    assert_told(told, "rows.jsonl:1: wanted 16 tokens at most", "Pass --max_length 16")


def test_conversations_without_a_template(run, tmp_path):
    folder = write_model(tmp_path / "plain", tokenizer=tiny_tokenizer(chat_template=None))
    told = run("sft", [{"messages": MESSAGES}], "--model_name_or_path", folder)
    assert_told(told, "rows.jsonl:1", "the tokenizer has no chat template")
    strict = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    folder = write_model(tmp_path / "strict", tokenizer=strict)
    told = run("sft", [{"messages": MESSAGES}], "--model_name_or_path", folder)
    assert_told(told, "rows.jsonl:1: the chat template refuses the row: roles must alternate")
    plain = tiny_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    folder = write_model(tmp_path / "unmarked", tokenizer=plain)
    more = ("--model_name_or_path", folder, "--assistant_only_loss")
    assert_told(run("sft", [{"messages": MESSAGES}], *more), "{% generation %}")


def test_settings_that_do_not_fit_the_data(run):
    rows = pair_rows(4)
    assert_told(
        run("dpo", rows, "--max_tokens_per_micro_batch", "3"),
        "--max_tokens_per_micro_batch: wanted at least",
    )
    assert_told(run("dpo", rows, "--eval_fraction", "0.01"), "--eval_fraction: wanted a share")
    assert_told(run("dpo", rows, "--max_length", "2"), "no row is left to train on")
    assert_told(
        run("dpo", rows, "--resume_from_checkpoint", "true"), "holds no complete checkpoint"
    )
    assert_told(
        run("dpo", rows, "--resume_from_checkpoint", "absent"), "not a complete checkpoint folder"
    )


def test_references_that_cannot_follow(run, tmp_path):
    rows = pair_rows(4)
    told = run("dpo", rows, "--sync_ref_model", "--loss_type", "simpo", "--gamma", "1")
    assert_told(told, "--sync_ref_model: simpo has no reference to move")
    told = run("dpo", rows, "--sync_ref_model", "--loss_type", "simpo", "--gamma", "1", "--dry_run")
    assert_told(told, "--sync_ref_model: simpo has no reference to move")
    wide = write_model(tmp_path / "wide", tiny_model(intermediate_size=40))
    told = run("dpo", rows, "--sync_ref_model", "--ref_model_name_or_path", wide)
    assert_told(told, "--sync_ref_model: wanted a reference of the policy's architecture")


def test_a_folder_that_holds_another_run(run, tmp_path):
    rows = pair_rows(4)
    assert run("dpo", rows)[0] == 0
    kept = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert_told(run("dpo", rows), "--output_dir", "holds another run", "--overwrite_output_dir")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept
    assert run("dpo", rows, "--overwrite_output_dir")[0] == 0
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_output_folder_that_is_the_model(run, model):
    told = run("dpo", pair_rows(4), "--output_dir", model, "--overwrite_output_dir")
    assert_told(told, f"--output_dir {model}: is --model_name_or_path")


def test_an_output_folder_that_cannot_be(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert_told(run("dpo", pair_rows(2), "--output_dir", str(tmp_path / "file" / "out")), "file")


def test_nothing_finite_stops_before_the_update(run, tmp_path, model):
    """lr 1e30 spoils the weights in step 1; step 2 stops, and what step 1 left stays as it was."""
    rows = pair_rows(16)
    options = ("--per_device_train_batch_size", "4", "--max_steps", "3", "--save_steps", "1")
    options += ("--learning_rate", "1e30", "--optim", "sgd", "--max_grad_norm", "0")
    result = run("dpo", rows, *options)
    assert_told(result, "step 2: loss is not finite", "Lower --learning_rate")
    assert re.search(r"rows\.jsonl:\d+", result[1])
    assert [p.name for p in tmp_path.glob("out/checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_with_broken_weights(run, tmp_path):
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[7, 3] = float("inf")
    folder = write_model(tmp_path / "broken", broken)
    told = run("sft", sft_rows(8), "--model_name_or_path", folder)
    assert_told(told, "the model's own log-probs are not finite")


def start_training(model, tmp_path, *more: str) -> subprocess.Popen:
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(32))
    argv = ["--model_name_or_path", model, "--dataset_name", rows, "--output_dir"]
    argv += [str(tmp_path / "out"), "--per_device_train_batch_size", "4", "--logging_steps", "1"]
    argv += ["--learning_rate", "1e-3", "--save_steps", "0", "--lr_scheduler_type", "constant"]
    pipe = subprocess.PIPE
    return command("dpo", *argv, *more, stdout=pipe, stderr=subprocess.STDOUT)


def test_ctrl_c_saves_and_resume_continues(model, tmp_path):
    process = start_training(model, tmp_path, "--max_steps", "100000")
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    (saved,) = tmp_path.glob("out/checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert f"interrupted after step {step}; saved {saved}" in text
    assert not list(tmp_path.glob("out/.*partial"))
    last = str(step + 3)
    process = start_training(
        model, tmp_path, "--max_steps", last, "--resume_from_checkpoint", "true"
    )
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, step + 4))
    assert load_file(tmp_path / "out" / "model.safetensors")
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["method"] == "dpo" and config["beta"] == 0.1


def test_a_mistake_in_a_process_of_its_own():
    process = command("dpo", "--nope", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("prefuse: error: --nope: no such flag") and err.count("\n") == 1
