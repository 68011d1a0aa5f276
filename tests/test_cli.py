"""The command line as a user meets it: whole jobs, and one screen with the fix for everything that is not right."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moekit
import tiny
from moekit import methods as registry
from moekit import refmoe
from moekit.cli import _register, compress, main
from moekit.plans import Plan
from moekit.recipe import Recipe, format_bytes
from moekit.stats import Stats

JOB = ["--data", "code=code.txt", "--keep", "0.5", "--tokens", "512", "--sequence-length", "64"]
Run = namedtuple("Run", "code out err")
_register()


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """A page of code and one of prose."""
    found = {name: refmoe.texts()[name].read_text()[:6000] for name in ("python", "kjv")}
    return {"code": found["python"], "prose": found["kjv"]}


@pytest.fixture
def place(tmp_path, talker, texts, monkeypatch) -> Path:
    """The folder that we are in: a model, `code.txt` and `prose.txt`."""
    shutil.copytree(talker, tmp_path / "model")
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capfd) -> Callable[..., Run]:
    """Run the command line here; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> Run:
        code = main([str(x) for x in arguments])
        return Run(code, *capfd.readouterr())

    return call


def contents(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its size and time of change."""
    return {
        str(x.relative_to(folder)): (x.stat().st_size, x.stat().st_mtime_ns) for x in folder.rglob("*") if x.is_file()
    }


def model_files(folder: Path) -> dict[str, bytes]:
    """What makes the model, without reports of how long it took."""
    return {
        x.name: x.read_bytes()
        for x in folder.iterdir()
        if x.suffix == ".safetensors" or x.name in ("config.json", "plan.json", "tokenizer.json")
    }


def loads_and_generates(folder: Path, experts: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_experts == experts
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 3


# ---- whole jobs


def test_the_whole_job_on_refmoe(cli, place):
    given = ["--data", "code=code.txt", "--eval", "code=code.txt", "--eval", "prose=prose.txt"]
    run = cli(
        "compress", "refmoe", *given, "--keep", "50%", "--tokens", 1024, "--sequence-length", 128, "--out", "half"
    )
    assert run.code == 0, run.err
    assert run.err == ""
    assert "proven: stock transformers" in run.out
    report = json.loads((place / "half" / "report.json").read_text())
    assert {name: len(kept) for name, kept in report["kept"].items()} == {str(i): 16 for i in range(6)}
    assert report["verification"]["ok"]
    assert report["evaluation"]["domains"].keys() == {"code", "prose"}
    assert report["bytes"]["after"] < 0.62 * report["bytes"]["before"]
    assert sorted(x.name for x in place.iterdir()) == ["code.txt", "half", "model", "prose.txt"]
    loads_and_generates(place / "half", 16)
    again = cli("inspect", "half")
    assert again.code == 0
    assert "16 experts, top-4" in again.out


def test_recipe_and_flags_make_the_same_model(cli, place):
    recipe = {
        "model": "model",
        "data": {"code": "code.txt", "prose": "prose.txt"},
        "domain": "code",
        "method": "reap",
        "keep": 0.5,
        "calibration": {"tokens": 512, "sequence_length": 64, "seed": 3},
        "out": "by-recipe",
        "shard_size": "1MB",
    }
    (place / "recipes").mkdir()
    below = {"model": "../model", "data": {k: f"../{v}" for k, v in recipe["data"].items()}, "out": "../by-recipe"}
    (place / "recipes" / "r.yaml").write_text(json.dumps(recipe | below))
    flags = ["--data", "code=code.txt", "--data", "prose=prose.txt", "--domain", "code", "--method", "reap"]
    flags += ["--keep", "4", "--tokens", "512", "--sequence-length", "64", "--seed", "3", "--shard-size", "1MB"]
    assert cli("compress", "recipes/r.yaml").code == 0
    assert cli("compress", "model", *flags, "--out", "by-flags").code == 0
    first, second = (model_files(place / x) for x in ("by-recipe", "by-flags"))
    plans = [Plan.load(place / x / "plan.json") for x in ("by-recipe", "by-flags")]
    assert plans[0].ops == plans[1].ops
    del first["plan.json"], second["plan.json"]  # they tell 0.5 from 4
    assert first == second
    carried = Recipe.load(place / "by-recipe" / "recipe.yaml")
    assert carried == Recipe.load(place / "recipes" / "r.yaml")


def test_recipe_that_an_output_carries_makes_it_again(cli, place):
    assert cli("compress", "model", *JOB, "--out", "half").code == 0
    first = model_files(place / "half")
    (place / "half" / "recipe.yaml").rename(place / "again.yaml")
    shutil.rmtree(place / "half")
    assert cli("compress", "again.yaml").code == 0
    assert model_files(place / "half") == first


def test_plan_only_writes_no_model(cli, place):
    before = contents(place)
    run = cli("compress", "model", *JOB, "--plan-only")
    assert run.code == 0
    assert "would be saved" in run.out
    assert "expected:" in run.out
    assert "super experts protected" in run.out
    assert contents(place) == before
    assert cli("compress", "model", *JOB, "--plan-only", "--out", "half").code == 0
    assert not (place / "half").exists()
    assert {x.name for x in place.iterdir()} == {"code.txt", "prose.txt", "model", "half.work"}  # statistics, for later


def refuse_to_measure(*_: object, **__: object) -> None:
    raise AssertionError("measured again")


def test_statistics_are_used_again(cli, place, monkeypatch):
    assert cli("compress", "model", *JOB, "--out", "a", "--stats", "stats").code == 0
    kept = contents(place / "stats")
    assert Stats.load(place / "stats").token_count() == 512
    with monkeypatch.context() as patch:
        patch.setattr("moekit.pipeline.statistics.measure", refuse_to_measure)
        assert cli("compress", "model", *JOB, "--keep", "0.75", "--out", "b", "--stats", "stats").code == 0
        assert cli("compress", "model", *JOB, "--out", "c", "--stats", "stats", "--method", "frequency").code == 0
    assert contents(place / "stats") == kept
    other = cli("compress", "model", *JOB, "--seed", "7", "--out", "d", "--stats", "stats")
    assert other.code == 2
    assert "statistics of another model, of other data" in other.err
    assert not (place / "d").exists()


def test_statistics_that_lack_what_a_method_needs_are_taken_anew(cli, place, monkeypatch):
    from moekit import methods

    assert cli("compress", "model", *JOB, "--plan-only", "--stats", "stats", "--method", "frequency").code == 0
    monkeypatch.setattr(type(methods.get("random")), "groups", ("scores", "routing"))
    assert cli("compress", "model", *JOB, "--plan-only", "--stats", "stats", "--method", "random").code == 0
    assert Stats.load(place / "stats").manifest["groups"] == ["routing", "scores"]


def test_an_old_model_is_replaced_when_asked_and_only_by_a_proven_one(cli, place):
    assert cli("compress", "model", *JOB, "--out", "half").code == 0
    assert cli("compress", "model", *JOB, "--out", "half", "--keep", "0.75", "--overwrite").code == 0
    first = contents(place / "half")
    assert json.loads((place / "half" / "config.json").read_text())["num_experts"] == 6
    wrong = cli("compress", "model", *JOB, "--out", "half", "--keep", "0.1", "--overwrite")
    assert wrong.code == 2
    assert contents(place / "half") == first
    assert not [x for x in place.iterdir() if x.name.startswith((".half", "half."))]


def test_measure_then_measure_more(cli, place):
    sizes = ["--tokens", 512, "--sequence-length", 64]
    assert cli("measure", "model", "--data", "code=code.txt", *sizes, "--out", "stats").code == 0
    more = ["measure", "model", "--data", "prose=prose.txt", *sizes, "--out", "stats"]
    again = cli(*more)
    assert (again.code, "pass --add" in again.err) == (2, True)
    assert cli(*more, "--add").code == 0
    assert Stats.load(place / "stats").tokens.tolist() == [512, 512]
    twice = cli(*more, "--add")
    assert (twice.code, "hold this very text already" in twice.err) == (2, True)
    other = cli("measure", "refmoe", *more[2:], "--add")
    assert (other.code, "statistics of another model" in other.err) == (2, True)
    assert Stats.load(place / "stats").tokens.tolist() == [512, 512]
    assert sorted(x.name for x in place.iterdir()) == ["code.txt", "model", "prose.txt", "stats"]


def test_eval_as_a_table_and_as_json(cli, place):
    given = ["eval", "model", "--data", "code=code.txt", "--tokens", 256, "--sequence-length", 64]
    table = cli(*given, "--out", "scores.json")
    assert table.code == 0
    data = json.loads(cli(*given, "--against", "model", "--json").out)
    score = data["domains"]["code"]
    assert score["kl"] == [0, 0, 0]
    assert f"{score['perplexity'][0]:.2f}" in table.out
    assert json.loads((place / "scores.json").read_text())["domains"]["code"]["perplexity"] == score["perplexity"]


def test_inspect_as_text_and_as_json(cli, place):
    text, data = cli("inspect", "model"), json.loads(cli("inspect", "model", "--json").out)
    assert data["family"] == "qwen3_moe"
    assert data["total_bytes"] == sum(x["bytes"] for x in data["parts"].values())
    assert data["layers"][0]["num_experts"] == 8
    assert data["hash"] == moekit.open("model").layout.hash
    for part in ("8 experts, top-2", "softmax", "qwen3_moe", "at least 2 of 8 experts must stay"):
        assert part in text.out
    bytes_of_one = data["layers"][0]["expert_bytes"]
    assert f"keeping 4 saves {format_bytes(12 * bytes_of_one)}, keeping 2 saves" in text.out


def test_inspect_says_what_can_be_done(cli, place):
    """Also of models that little can be done with."""
    for family, said in [
        ("deepseek_v3", "keeping 4 saves"),
        ("ernie4_5_vl_moe", "can be measured and evaluated, not pruned"),
        ("diffusion_gemma", "can be inspected, not run"),
    ]:
        other_family(family)()
        assert said in cli("inspect", "model").out


def test_methods_are_listed(cli):
    run = cli("methods")
    assert run.code == 0
    shown = " ".join(run.out.split())
    for name in registry.names():
        method = registry.get(name)
        assert name in shown
        assert all(word in shown for word in method.paper.split()), f"the paper of {name}"
        assert all(f"{key}={value}" in shown for key, value in method.options.items())


def test_help_and_version_are_light():
    """Nobody waits for torch to read a help page."""
    code = (
        "import sys\nfrom moekit.cli import main\n"
        "codes = [main(x) for x in (['--help'], ['--version'], ['compress', '--help'], ['inspect', '--help'])]\n"
        "assert codes == [0] * 4, codes\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"moekit {moekit.__version__}" in run.stdout
    assert "--keep" in run.stdout


# ---- bad input


def spoil(file: str, change: Callable[[dict], object]) -> None:
    path = Path("model") / file
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def no_experts() -> None:
    shutil.rmtree("model")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained("model")


def pickled() -> None:
    Path("model/model.safetensors").unlink()
    Path("model/pytorch_model.bin").write_bytes(b"\x80\x04")


def outside() -> None:
    Path("model/model.safetensors").rename("stolen.safetensors")
    index = {"weight_map": {"model.norm.weight": "../stolen.safetensors"}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))


def truncated() -> None:
    os.truncate("model/model.safetensors", 100_000)


def own_code() -> None:
    Path("model/code_of_its_own.py").write_text("open('ran', 'w')")
    spoil("config.json", lambda x: x.update(model_type="own", auto_map={"AutoConfig": "code_of_its_own.Own"}))


def own_tokenizer() -> None:
    Path("model/own_tokenizer.py").write_text("open('ran', 'w')")
    auto_map = {"AutoTokenizer": ["own_tokenizer.Own", None]}
    spoil("tokenizer_config.json", lambda x: x.update(auto_map=auto_map, tokenizer_class="Own"))


def recipe(**changes: object) -> Callable[[], object]:
    settings = {"model": "model", "data": {"code": "code.txt"}, "keep": 0.5, "out": "half"} | changes
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    return lambda: Path("r.yaml").write_text("\n".join(lines))


def written(name: str, data: bytes) -> Callable[[], object]:
    return lambda: Path(name).write_bytes(data)


def taken(name: str) -> Callable[[], object]:
    return lambda: (Path(name).mkdir(), Path(name, "thesis.tex").write_text("dear"))


def job(
    *more: str, model: str = "model", data: str = "code=code.txt", keep: str = "0.5", out: str = "half"
) -> list[str]:
    return ["compress", model, "--data", data, "--keep", keep, "--out", out, *more]


def other_family(family: str) -> Callable[[], object]:
    return lambda: (shutil.rmtree("model"), tiny.save_talker(Path("model"), family))


# what is wrong -> (preparation, command, what the message must say: what, where, how to mend it)
BAD = {
    "no such model": (None, job(model="modle"), ["no such model folder", "modle", "refmoe"]),
    "a file for a model": (None, ["inspect", "code.txt"], ["this is a file", "code.txt", "config.json"]),
    "dense model": (no_experts, ["inspect", "model"], ["dense model", "model", "Mixture-of-Experts"]),
    "dense model to cut": (no_experts, job(), ["dense model", "model", "Mixture-of-Experts"]),
    "unsupported family": (
        lambda: spoil("config.json", lambda x: x.update(model_type="qwen3_mo")),
        job(),
        ["unknown model type 'qwen3_mo'", "model/config.json", "did you mean 'qwen3_moe'"],
    ),
    "unsupported quantisation": (
        lambda: spoil("config.json", lambda x: x.update(quantization_config={"quant_method": "awq", "bits": 4})),
        job(),
        ["'awq'", "quant_method", "unquantised"],
    ),
    "family that cannot be cut": (
        other_family("ernie4_5_vl_moe"),
        job(),
        ["cannot be removed", "'ernie4_5_vl_moe'", "docs/families.md"],
    ),
    "family that cannot be run": (
        other_family("diffusion_gemma"),
        job(),
        ["cannot be removed", "block-diffusion", "docs/families.md"],
    ),
    "too small keep": (None, job(keep="0.1"), ["chooses 2 experts", "layer 0", "keep at least 2 experts"]),
    "too small number to keep": (None, job(keep="1"), ["only 1 would be left", "layer 0", "at least 2 experts"]),
    "more than there are": (None, job(keep="9"), ["impossible number", "keep", "keep fewer"]),
    "keep that is none": (None, job(keep="half"), ["keep is not possible", "keep", "as 0.5 or 50%"]),
    "nothing to keep": (None, job()[:4] + job()[6:], ["--keep must be given", "moekit compress model", "e.g."]),
    "unknown recipe key": (
        recipe(calibrations={"tokens": 3}),
        ["compress", "r.yaml"],
        ["no key 'calibrations'", "r.yaml:5", "did you mean 'calibration'?"],
    ),
    "unknown key within": (
        recipe(calibration={"token": 3}),
        ["compress", "r.yaml"],
        ["no key 'calibration.token'", "r.yaml:5", "did you mean 'tokens'?"],
    ),
    "no such recipe": (None, ["compress", "r.yaml"], ["recipe cannot be read", "r.yaml", "path of a recipe"]),
    "recipe and flags": (
        recipe(),
        ["compress", "r.yaml", "--keep", "0.3"],
        ["recipe file and flags", "keep", "write it in the recipe"],
    ),
    "unknown method": (None, job("--method", "easy-pe"), ["no method 'easy-pe'", "method", "did you mean 'easy-ep'"]),
    "unknown option": (None, job("--option", "top=3"), ["no option 'top'", "options.top", "leave it out"]),
    "unknown domain": (None, job("--domain", "cod"), ["no domain 'cod'", "domain", "did you mean 'code'"]),
    "no such text": (None, job(data="code=cod.txt"), ["no such file", "cod.txt", "did you mean 'code.txt'"]),
    "empty text": (written("x.txt", b""), job(data="x=x.txt"), ["empty", "x.txt", "give a file with text"]),
    "text of white space": (written("x.txt", b" \n"), job(data="x=x.txt"), ["empty", "x.txt", "give a file with text"]),
    "no text": (written("x.bin", bytes(range(256))), job(data="x=x.bin"), ["binary", "x.bin", "give plain text"]),
    "empty evaluation text": (
        written("x.txt", b""),
        job("--eval", "x=x.txt"),
        ["empty", "x.txt", "give a file with text"],
    ),
    "too little text": (
        written("x.txt", b"def f(): pass"),
        job(data="x=x.txt"),
        ["fewer tokens than one sequence", "x.txt", "sequence length of at most"],
    ),
    "pickle checkpoint": (pickled, job(), ["pickle checkpoints are refused", "pytorch_model.bin", "convert it"]),
    "truncated checkpoint": (truncated, job(), ["truncated", "model.safetensors", "download or copy"]),
    "remote code": (own_code, job(), ["brings its own code", "model/config.json", "--trust-remote-code"]),
    "index outside its folder": (outside, job(), ["outside its folder", "index.json", "do not trust"]),
    "output folder not empty": (taken("half"), job(), ["output folder is not empty", "half", "--overwrite"]),
    "output that is no model": (
        taken("half"),
        job("--overwrite"),
        ["only a model folder can be overwritten", "half", "empty this one yourself"],
    ),
    "output that is a file": (written("half", b"dear"), job(), ["output is a file", "half", "another name"]),
    "output in no folder": (None, job(out="no/half"), ["does not exist", "no", "mkdir -p"]),
    "output in the model": (None, job(out="model/half"), ["model's own folder", "model/half", "another folder"]),
    "folder beside the output taken": (
        taken("half.unverified"),
        job(),
        ["folder that this output needs is taken", "half.unverified", "move it away"],
    ),
    "folder of statistics taken": (
        taken("papers"),
        job("--stats", "papers"),
        ["statistics holds something else", "papers", "another folder"],
    ),
    "no such device": (None, job("--device", "tpu"), ["no device 'tpu'", "device", "leave it out"]),
    "no such verb": (None, ["inspekt"], ["No such command 'inspekt'", "moekit", "moekit --help"]),
    "no model given": (None, ["inspect"], ["Missing argument 'model'", "model", "moekit inspect --help"]),
    "no text given": (None, ["eval", "model"], ["--data or --tasks must be given", "--data", "--tasks arc_easy"]),
    "no number": (None, job("--tokens", "many"), ["valid integer", "--tokens", "moekit compress --help"]),
    "file in no folder": (
        None,
        ["eval", "model", "--data", "code=code.txt", "--out", "no/x.json"],
        ["does not exist", "no", "mkdir -p"],
    ),
    "no such domain of the demo": (None, ["demo", "--domain", "pyhton"], ["'pyhton'", "--domain", "'python'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_screen_with_the_fix(cli, place, name):
    prepare, command, said = BAD[name]
    if prepare:
        prepare()
    before = contents(place), {x.name for x in place.iterdir()}
    run = cli(*command)
    assert run.code == 2
    for part in said:
        assert part in run.err, run.err
    assert re.match(r"\w+ error ", run.err)
    assert "Traceback" not in run.err
    assert len(run.err.splitlines()) <= 12
    assert (contents(place), {x.name for x in place.iterdir()}) == before


def test_code_of_a_tokenizer_never_runs_unasked(cli, place):
    """There is a stock tokenizer in the folder too: that is taken."""
    own_tokenizer()
    assert cli("compress", "model", *JOB, "--plan-only").code == 0
    assert not (place / "ran").exists()


def test_no_disk_space(cli, place, monkeypatch):
    """Said before anything is measured."""
    free = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr("moekit.pipeline.statistics.measure", refuse_to_measure)
    before = contents(place)
    run = cli("compress", "model", *JOB, "--out", "half")
    assert run.code == 2
    assert "not enough disk space" in run.err
    assert re.search(r"fix: +free [\d,]+ bytes", run.err)
    assert contents(place) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_system_refuses_in_the_middle(cli, place, monkeypatch, number):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "half.work/stats")

    monkeypatch.setattr(Stats, "save_head", fail)
    run = cli("compress", "model", *JOB, "--out", "half")
    assert run.code == 2
    assert os.strerror(number) in run.err
    assert "half.work/stats" in run.err
    assert "fix:" in run.err
    assert not (place / "half").exists()


def test_our_own_mistake_is_not_blamed_on_the_user(cli, place, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyError("[bold]E[/]")

    monkeypatch.setattr("moekit.pipeline.statistics.measure", fail)
    run = cli("compress", "model", *JOB, "--out", "half")
    assert run.code == 1
    assert "internal error KeyError: '[bold]E[/]'" in run.err
    assert "not yours" in run.err
    assert "Traceback" not in run.err
    monkeypatch.setenv("MOEKIT_DEBUG", "1")
    with pytest.raises(KeyError):
        cli("compress", "model", *JOB, "--out", "half")


def test_reader_that_has_seen_enough(place):
    """`moekit methods | head -0`"""
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-m", "moekit", "methods"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert run.returncode == 1
    assert run.stderr == ""


def test_a_result_that_fails_its_proof_is_kept_aside(cli, place, monkeypatch):
    from moekit.pipeline import production

    bake = production.bake

    def bake_wrongly(*arguments: object, **settings: object) -> object:
        baked = bake(*arguments, **settings)
        tensors = load_file(baked.path / "model.safetensors")
        tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].flip(0)
        save_file(tensors, baked.path / "model.safetensors")
        return baked

    with monkeypatch.context() as patch:
        patch.setattr(production, "bake", bake_wrongly)
        for _ in range(2):  # also where an earlier failure lies
            run = cli("compress", "model", *JOB, "--out", "half")
            assert run.code == 1
            assert "does not do what the plan says" in run.err
            assert "half.failed" in run.err
            assert "fix:" in run.err
            assert not (place / "half").exists()
            assert not (place / "half.unverified").exists()
            why = json.loads((place / "half.failed" / "VERIFICATION_FAILED").read_text())
            assert not why["ok"]
    assert cli("compress", "model", *JOB, "--out", "half").code == 0
    assert (place / "half.failed" / "VERIFICATION_FAILED").exists()


# ---- interrupts


@pytest.fixture
def interrupt(monkeypatch) -> Callable[..., list[tuple]]:
    """Press Ctrl-C when progress is told the n-th time; returns what was told."""

    def at(moment: int | None) -> list[tuple]:
        told: list[tuple] = []

        @contextlib.contextmanager
        def bars() -> Iterator[Callable]:
            def progress(*event: object) -> None:
                told.append(event)
                if len(told) == moment:
                    signal.raise_signal(signal.SIGINT)

            yield progress

        monkeypatch.setattr(compress, "bars", bars)
        return told

    return at


def test_interrupted_anywhere_the_same_command_finishes(cli, place, interrupt):
    command = ["compress", "model", *JOB, "--eval", "prose=prose.txt", "--shard-size", "1MB", "--out", "half"]
    told = interrupt(None)
    assert cli(*command).code == 0
    whole = model_files(place / "half")
    stages = [event[0] for event in told]
    borders = [i for i in range(1, len(stages)) if stages[i] != stages[i - 1] or told[i][1] <= told[i - 1][1]]
    between_shards = (borders[0] + borders[1]) // 2
    moments = [
        1,
        between_shards,
        *(i + 1 for i in borders),
        len(told),
    ]  # measuring, baking, verifying, evaluating begin
    assert {"layers", "bytes", "head"} <= set(stages)  # measured, baked, verified, evaluated
    for moment in moments:
        shutil.rmtree(place / "half")
        interrupt(moment)
        run = cli(*command)
        assert run.code == 130, moment
        assert "run the same command again" in run.err
        assert "Traceback" not in run.err
        assert not (place / "half").exists()
        interrupt(None)
        assert cli(*command).code == 0
        assert model_files(place / "half") == whole
        assert sorted(x.name for x in place.iterdir()) == ["code.txt", "half", "model", "prose.txt"]


@pytest.mark.parametrize("verb", typer.main.get_command(moekit.cli.app).commands)
def test_every_verb_says_what_an_interrupt_costs(verb, monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(moekit.cli, "app", interrupted)
    assert main([verb, "model"]) == 130
    said = capsys.readouterr().err
    page = (Path(__file__).resolve().parents[1] / "docs" / "verbs" / f"{verb}.md").read_text()
    goes_on = re.search(r"interrupted\s+goes\s+on|Interrupt and resume", page) is not None
    assert ("goes on where it stopped" in said) == goes_on
    assert ("it starts from the beginning" in said) != goes_on


def test_as_a_program_interrupted_and_run_again(place):
    """The signal reaches a process of its own while it writes; what it leaves is finished by another."""
    code = (
        "import contextlib, os, signal, sys\nfrom moekit.cli import compress, main\n"
        "def progress(stage, done, total):\n"
        "    if stage == 'bytes' and done:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "compress.bars = lambda: contextlib.nullcontext(progress)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["compress", "model", *JOB, "--out", "half"]
    run = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert run.returncode == 130
    assert run.stderr.startswith("interrupted")
    assert "Traceback" not in run.stderr
    assert not (place / "half").exists()
    assert (place / "half.work" / "stats" / "stats.json").exists()
    run = subprocess.run([sys.executable, "-m", "moekit", *command], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "AutoModelForCausalLM.from_pretrained" in run.stdout
    assert sorted(x.name for x in place.iterdir()) == ["code.txt", "half", "model", "prose.txt"]
    loads_and_generates(place / "half", 4)
