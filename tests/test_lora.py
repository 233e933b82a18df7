"""Adapters: what is trained, what is the reference, what is left behind, and that peft loads it."""

import json
import math
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from online_runs import FULL, REWARDS
from safetensors.torch import load_file
from tiny import (
    assert_same_gradients,
    gradients,
    needs,
    pair_rows,
    ragged_pairs,
    scorer_of,
    sft_rows,
    tiny_model,
    write_model,
    write_rows,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from prefuse.trainer import loop, lora, model, objectives, offline
from prefuse.trainer.batch import pack
from prefuse.trainer.cli import main
from prefuse.trainer.config import DPOConfig
from prefuse.trainer.engines.twin import Twin
from prefuse.trainer.errors import UserError
from prefuse.trainer.reward_model import RewardModel
from prefuse.trainer.scores import Unadapted
from prefuse.trainer.sharding import decoder_layers

peft = pytest.importorskip("peft", reason="needs peft: pip install 'prefuse[peft]'")

TOKENS = torch.arange(2, 40)[None]
ONLINE = ("--max_completion_length", "6", "--per_device_train_batch_size", "8")
ONLINE += ("--reward_funcs", f"{REWARDS}:share_of_w7")
PROMPTS = [{"prompt": f"w{i} w{j} :"} for i in range(4) for j in range(6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    top = tmp_path_factory.mktemp("models")
    return {
        "untied": write_model(top / "untied"),
        "tied": write_model(top / "tied", tiny_model(tie=True)),
    }


@pytest.fixture
def run(models, tmp_path):
    """Two steps or more of a command with adapters; the lines of its metrics.jsonl."""

    def run(method: str, name: str, *more: str, model: str = "untied", peft: bool = True):
        offline = {"sft": sft_rows, "dpo": pair_rows, "kto": pair_rows, "reward": pair_rows}
        rows = offline[method](24) if method in offline else PROMPTS
        argv = ["--model_name_or_path", models.get(model, model), "--output_dir"]
        argv += [str(tmp_path / name), "--dataset_name"]
        argv += [write_rows(tmp_path / f"{name}.jsonl", rows), "--logging_steps", "1"]
        argv += ["--max_steps", "4", "--bf16", "false", "--disable_tqdm", "--learning_rate", "1e-2"]
        argv += () if method in offline else ONLINE
        main([method, *argv, *(["--use_peft"] if peft else []), *more])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def settings(**changes) -> DPOConfig:
    return DPOConfig("tiny", "rows", "out", use_peft=True, **changes)


def adapted(model, seed: int = 0, **changes):
    """`model` with adapters that do something."""
    lora.attach(settings(**changes), model)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1, generator=generator)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


COMMANDS = {
    "sft": (),
    "dpo": (),
    "kto": (),
    "reward": (),
    "grpo": ("--beta", "0.1"),
    "ppo": (),
    "online-dpo": ("--loss_type", "xpo", "--num_generations", "4"),
    "nash-md": (),
    "raft": (),
}


FAST = ("dpo", "reward", "grpo", "online-dpo")


@pytest.mark.parametrize(
    "command", [c if c in FAST else pytest.param(c, marks=FULL) for c in COMMANDS]
)
def test_only_adapters_move_and_peft_loads_them(run, models, tmp_path, command):
    lines = run(command, "out", *COMMANDS[command])
    assert all(math.isfinite(x["loss"]) for x in lines) and lines[-1]["grad_norm"] > 0
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    heads = {"base_model.model.score.weight"} if command == "reward" else set()
    assert {n for n in saved if ".lora_" not in n} == heads
    assert any(p.abs().max() > 1e-3 for n, p in saved.items() if "lora_B" in n)
    assert not (tmp_path / "out/model.safetensors").exists()
    kind = "SequenceClassification" if command == "reward" else "CausalLM"
    auto = getattr(peft, f"AutoPeftModelFor{kind}")
    loaded = auto.from_pretrained(tmp_path / "out", **({"num_labels": 1} if heads else {}))
    with loaded.disable_adapter():
        base = AutoModelForCausalLM.from_pretrained(models["untied"])
        assert heads or torch.equal(logits(loaded), logits(base))
    differences = [x.get("sampling/logp_difference", 0.0) for x in lines]  # of what was sampled
    assert max(differences) < 1e-4 and (command != "grpo" or max(differences) > 0)


@pytest.mark.full
@needs("psutil", "dev")
def test_continuous_batching_samples_the_adapted_model(run):
    lines = run("grpo", "out", "--engine", "transformers", "--gradient_checkpointing")
    assert 0 < max(x["sampling/logp_difference"] for x in lines) < 1e-4


def test_the_optimizer_has_adapters_alone(models):
    model = adapted(tiny_model(), lora_modules_to_save=["norm"])
    optimizer = loop.make_optimizer(scorer_of(model), settings())
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in mine}
    norms = {n for n in names if ".lora_" not in n}
    assert norms == {n for n, _ in model.named_parameters() if ".modules_to_save." in n}
    assert len(norms) == 5 and len(names - norms) == 2 * 2 * 2  # two layers, q and v, A and B


@pytest.mark.parametrize(
    "more", [(), ("--precompute_ref_log_probs",), ("--ref_log_probs_cache", "CACHE")]
)
def test_the_reference_is_the_model_without_adapters(run, models, tmp_path, more, monkeypatch):
    """As a second model, loaded, is; and none is loaded."""
    more = [str(tmp_path / "cache") if x == "CACHE" else x for x in more]
    beside = run("dpo", "beside", "--ref_model_name_or_path", models["untied"])
    loads = []
    monkeypatch.setattr(
        offline, "load_model", lambda *a, **k: loads.append(a) or model.load_model(*a, **k)
    )
    own = run("dpo", "own", *more)
    assert len(loads) == 1
    assert_close(own[0]["loss"], math.log(2), rtol=0, atol=1e-6)
    for mine, theirs in zip(own, beside, strict=True):
        for name in ("loss", "rewards/margins", "grad_norm"):
            assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)


class Shapes(TorchDispatchMode):
    """The shapes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat = out if isinstance(out, tuple | list) else [out]
        self.seen |= {tuple(t.shape) for t in flat if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_a_frozen_head_has_no_gradient(use_peft, tie):
    """Nothing of the weight's shape is made on the way back."""
    model = tiny_model(tie=tie, vocab_size=61)
    if use_peft:
        adapted(model)
    scorer = scorer_of(model)
    loss = objectives.sft().objective(scorer, pack(ragged_pairs(), True)).loss.sum()
    with Shapes() as shapes:
        loss.backward()
    assert ((61, 32) in shapes.seen) != use_peft
    assert (model.lm_head.weight.grad is None) == use_peft


def gpt2():
    """Its weights are transposed."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=48, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(shape)


@pytest.mark.parametrize("made, norm", [(tiny_model, "norm"), (gpt2, "ln_f")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_adapted_model(made, norm, dtype):
    model = made()
    before = logits(model.eval())
    adapted(model, lora_modules_to_save=[norm])
    wanted = logits(model)
    assert (wanted - before).abs().max() > 0.1
    sent = dict(lora.merged(model, dict(model.named_parameters())))
    assert sent.keys() == dict(made().named_parameters()).keys()  # what vLLM is sent
    copy = Twin(model, "sdpa", dtype)  # gathers as it does from shards where its dtype is another
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert_close(logits(copy.model).float(), wanted, rtol=0, atol=tolerance)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05 if p.requires_grad else 1.0)
    copy.follow(model)
    assert_close(logits(copy.model).float(), logits(model), rtol=0, atol=tolerance)


def test_without_adapters_it_is_the_model_before(models):
    plain = tiny_model().eval()
    model = adapted(tiny_model(), lora_modules_to_save=["norm"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    base, wanted = lora.base_of(model), logits(plain)
    for _ in range(2):
        after = logits(model)
        with lora.without_adapters(model):
            assert torch.equal(logits(model), wanted)
        assert torch.equal(logits(model), after) and not torch.equal(after, wanted)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(logits(base), wanted) and base.lm_head.weight is model.lm_head.weight
    assert not any("lora" in name for name, _ in base.named_modules())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("change", ["nothing", "checkpointing", "dropout"])
def test_the_same_gradients_in_every_layout(layout, change):
    """As from the model's own logits, by autograd; dropout that is off in evaluation mode."""
    found = []
    for ours in (True, False):
        model = adapted(tiny_model("Qwen2"), lora_dropout=0.5 if change == "dropout" else 0.0)
        if ours and change == "checkpointing":
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        rows = ragged_pairs()
        if ours:
            scorer = scorer_of(model, layout)
            method = objectives.dpo(lora_reference(scorer), "sigmoid", {"beta": 0.5})
            method.objective(scorer, pack(rows, layout == "shared")).loss.sum().backward()
        else:
            torch.stack([own_loss(model, row) for row in rows]).sum().backward()
        found.append(gradients(model))
    assert all(".lora_" in name for name in found[0])
    assert_same_gradients(*found, tolerance=3e-5)


def lora_reference(scorer):
    return objectives.live_reference(Unadapted(scorer))


def own_loss(model, row):
    """DPO's sigmoid with beta 1/2, by hand."""
    ratios = []
    for sequence in row.sequences:
        tokens = torch.from_numpy(sequence.tokens)[None]

        def logp(tokens=tokens, sequence=sequence):
            out = model(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
            own = out.gather(1, tokens[0, 1:, None]).squeeze(1)
            return own[torch.from_numpy(sequence.scored[1:])].sum()

        with lora.without_adapters(model), torch.no_grad():
            reference = logp()
        ratios.append(logp() - reference)
    return -torch.nn.functional.logsigmoid(0.5 * (ratios[0] - ratios[1]))


@pytest.mark.full
def test_compiled_layers_give_the_same_gradients():
    """With adapters and without, in turn."""
    found = []
    for compiled in (False, True):
        scorer = scorer_of(adapted(tiny_model()))
        for layer in decoder_layers(scorer) if compiled else ():
            layer.compile(backend="aot_eager")
        method = objectives.dpo(lora_reference(scorer), "sigmoid", {})
        for seed in (0, 1):
            method.objective(scorer, pack(ragged_pairs(seed=seed), True)).loss.sum().backward()
        found.append(gradients(scorer))
    assert_same_gradients(*found, tolerance=1e-5)


@pytest.mark.parametrize(
    "command", ["dpo", pytest.param("ppo", marks=FULL), pytest.param("reward", marks=FULL)]
)
def test_resume_is_straight_through(run, tmp_path, command):
    """Exactly, with dropout; and a checkpoint has the adapters alone."""
    more = ["--lora_dropout", "0.3", *(["--num_iterations", "1"] if command == "ppo" else [])]
    straight = run(command, "straight", *more)
    run(command, "broken", *more, "--save_steps", "3")
    path = str(tmp_path / "broken/checkpoint-3")
    resumed = run(command, "broken", *more, "--resume_from_checkpoint", path)
    for name in ("loss", "grad_norm"):
        assert [x[name] for x in resumed] == [x[name] for x in straight]
    wanted, got = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("straight", "broken")
    )
    assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    held = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    names = {n for n in held if n.startswith("model.") and not n.endswith("length_head.weight")}
    assert names and all(".lora_" in n or ".modules_to_save." in n for n in names)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_merged_export_is_a_whole_model(run, tmp_path, name):
    run("sft", "adapters", model=name)
    run("sft", "whole", "--merge_on_export", model=name)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")
    assert_close(logits(whole), logits(loaded), rtol=0, atol=1e-5)
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == (name == "tied")
    for kind in ((), ("--merge_on_export",)):  # one folder has one of them
        run("sft", "whole", "--overwrite_output_dir", *kind, model=name)
        adapters, config = (tmp_path / "whole" / n for n in (lora.SETTINGS, "config.json"))
        assert (adapters.exists(), config.exists()) == (not kind, bool(kind))


def test_training_goes_on_from_an_adapter(run, tmp_path, capsys):
    """It is merged first: the new adapter's reference is the old one's model."""
    run("sft", "first")
    folder = str(tmp_path / "first")
    with pytest.raises(SystemExit):
        run("dpo", "refused", model=folder)
    assert "pass --merge_on_export" in capsys.readouterr().err
    for name, options in (("second", {}), ("whole", {"peft": False})):
        more = ("--merge_on_export",) if not options else ()
        cache = ("--ref_log_probs_cache", str(tmp_path / "cache"))
        lines = run("dpo", name, *more, *cache, model=folder, **options)
        assert_close(lines[0]["loss"], math.log(2), rtol=0, atol=1e-6)
        moved = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        assert (moved - logits(loaded)).abs().max() > 1e-3


def test_adapters_of_a_reward_model_are_a_reward(run, tmp_path):
    run("reward", "adapters")
    run("reward", "whole", "--merge_on_export")
    prompts, texts = ["w1 w2", "w3"], [" w4 w5", " w6"]
    one, other = (RewardModel(str(tmp_path / n))(prompts, texts) for n in ("adapters", "whole"))
    assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "more, wanted",
    [
        (["--lora_target_modules", "q_proj", "lm_head"], "wanted modules between the embedding"),
        (["--lora_modules_to_save", "lm_head"], "wanted modules between the embedding"),
        (["--lora_target_modules", "embed_tokens"], "wanted modules between the embedding"),
        (["--lora_target_modules", "nowhere"], "--lora_target_modules: Target modules"),
        (["--lora_r", "0"], "--lora_r: wanted a positive number; got 0"),
        (["--lora_dropout", "1"], "--lora_dropout: wanted [0, 1)"),
        (["--sync_ref_model"], "--sync_ref_model: wanted false with use_peft"),
        (["--use_peft", "false", "--merge_on_export"], "--merge_on_export: wanted --use_peft"),
        (["--use_peft", "false", "--lora_r", "8"], "--lora_r: wanted --use_peft"),
    ],
)
def test_mistakes_are_told(run, more, wanted, capsys):
    with pytest.raises(SystemExit) as exit:
        run("dpo", "out", *more)
    assert exit.value.code == 2 and wanted in capsys.readouterr().err


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'prefuse\[peft\]'"):
        lora.attach(settings(), tiny_model())


def test_adapters_stay_in_float32():
    model = adapted(tiny_model().bfloat16())
    kinds = {(".lora_" in n): p.dtype for n, p in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
