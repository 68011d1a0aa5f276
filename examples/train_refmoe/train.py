"""Trains a small Qwen3-MoE language model from scratch on a CPU.

    python train.py --corpus corpus --tokenizer tokenizer --out refmoe --minutes 120
    python train.py --quick --out quick      # a tiny model on moekit's packaged texts, in seconds

The model is the stock one of transformers, trained with the fast experts function of fast_experts.py; the optimizer
steps float32 master weights whatever the model computes in. Ctrl-C ends the run after the step under way and keeps
everything: the same command with --resume goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import fast_experts  # noqa: F401  registers the experts implementation "padded"
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit import refmoe

HEAD_DIM = 64
QUICK = {
    "steps": 40,
    "hidden": 64,
    "layers": 2,
    "experts": 8,
    "top_k": 2,
    "inner": 32,
    "batch": 8,
    "sequence": 128,
    "lr": 1e-2,
    "warmup": 5,
    "evaluation_rows": 8,
}
MUST_MATCH = ("seed", "hidden", "layers", "experts", "top_k", "inner", "batch", "sequence")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; --quick changes defaults, so that every other option still has its say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", type=Path, help="folder that prepare_corpus.py wrote")
    add("--tokenizer", type=Path, help="folder that train_tokenizer.py wrote")
    add("--out", type=Path, required=True, help="folder for model/, train_log.json and state.pt")
    add("--minutes", type=float, default=120.0, help="length of the run (default %(default)s)")
    add("--steps", type=int, default=0, help="length of the run in steps, instead of --minutes")
    add("--quick", action="store_true", help="a tiny model on moekit's packaged texts")
    add("--resume", action="store_true", help="go on from OUT/state.pt")
    add("--save-minutes", type=float, default=5.0, help="minutes between saves of OUT/state.pt (default %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 pays on CPUs with AMX only")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--hidden", type=int, default=256, help="hidden size, a multiple of 64")
    add("--layers", type=int, default=6)
    add("--experts", type=int, default=32, help="experts a layer")
    add("--top-k", type=int, default=4, help="experts chosen a token")
    add("--inner", type=int, default=64, help="inner size of an expert")
    add("--batch", type=int, default=16, help="sequences a step")
    add("--sequence", type=int, default=256, help="tokens a sequence")
    add("--lr", type=float, default=2.5e-3)
    add("--warmup", type=int, default=40, help="steps of rising learning rate")
    add("--decay", type=float, default=0.4, help="last share of the run, in which the learning rate falls")
    add("--balance", type=float, default=0.01, help="weight of the load-balance loss")
    add("--evaluation-rows", type=int, default=24, help="held-out sequences a domain")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if not args.quick and not (args.corpus and args.tokenizer):
        parser.error("give --corpus and --tokenizer (see README.md), or --quick")
    if not args.quick and not any((args.corpus / "train").glob("*.txt")):
        parser.error(f"no {args.corpus / 'train'}/*.txt: run prepare_corpus.py {args.corpus} first")
    if not args.quick and not (args.tokenizer / "tokenizer.json").exists():
        parser.error(f"no {args.tokenizer / 'tokenizer.json'}: run train_tokenizer.py first")
    if args.hidden % HEAD_DIM or args.top_k > args.experts:
        parser.error(f"--hidden must be a multiple of {HEAD_DIM}, and --top-k at most --experts")
    if args.resume != (args.out / "state.pt").exists():
        parser.error(
            f"{args.out}/state.pt is {'not there' if args.resume else 'there: give --resume or another --out'}"
        )
    return args


def load_texts(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, dict[str, Tensor], dict[str, Tensor]]:
    """The tokenizer, and the tokens of each domain's training and held-out text."""
    if args.quick:
        tokenizer = AutoTokenizer.from_pretrained(refmoe.model_path())
        train, heldout = refmoe.calibration(), refmoe.texts()
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        train = {path.stem: path for path in sorted((args.corpus / "train").glob("*.txt"))}
        heldout = {name: args.corpus / "heldout" / f"{name}.txt" for name in train}
    return (
        tokenizer,
        {name: encode(tokenizer, path) for name, path in train.items()},
        {name: encode(tokenizer, path) for name, path in heldout.items()},
    )


def encode(tokenizer: PreTrainedTokenizerBase, path: Path, piece: int = 50_000) -> Tensor:
    """The tokens of a text, int64; encoded in pieces, which the tokenizer takes in parallel."""
    text = path.read_text("utf-8")
    pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
    return torch.tensor([token for ids in tokenizer(pieces, verbose=False)["input_ids"] for token in ids])


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Qwen3MoeForCausalLM:
    """A freshly initialised model."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD_DIM,
        num_key_value_heads=max(1, args.hidden // HEAD_DIM // 2),
        head_dim=HEAD_DIM,
        intermediate_size=args.top_k * args.inner,
        moe_intermediate_size=args.inner,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        router_aux_loss_coef=args.balance,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, args.dtype))
    model.set_experts_implementation("padded")
    return model


def load_balance(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Mean over layers of sum_e f_e P_e, 1 at perfect balance (Switch Transformer, arXiv:2101.03961, for top-k).

    Args:
        router_logits: one (tokens, E) a layer. f_e = E * (share of the choices that fell on e), P_e = mean probability.
    """
    losses = []
    for logits_TE in router_logits:
        experts = logits_TE.shape[1]
        chosen = logits_TE.topk(top_k).indices.reshape(-1)
        f_E = torch.bincount(chosen, minlength=experts) * experts / len(chosen)
        losses.append((f_E * logits_TE.float().softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def next_token_loss(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given the ones before it."""
    return nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten())


def rate_share(step: int, progress: float, warmup: int, decay: float) -> float:
    """Share of the full learning rate: rises for `warmup` steps, stays, falls to 2% in the last `decay` of the run."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.02, (1 - progress) / decay))


class Trainer:
    """Model, master weights, optimizer and the random numbers that pick sequences: all that a resumed run needs."""

    def __init__(self, args: argparse.Namespace, model: Qwen3MoeForCausalLM, texts: dict[str, Tensor]):
        self.args, self.model, self.texts = args, model, list(texts.values())
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        groups = [
            {"params": [master for master in self.masters if master.ndim > 1], "weight_decay": 0.1},
            {"params": [master for master in self.masters if master.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.random = torch.Generator().manual_seed(args.seed)
        self.step, self.elapsed_s = 0, 0.0
        self.log: list[list[float]] = []  # step, elapsed_s, loss, balance, learning rate

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.step / self.args.steps if self.args.steps else self.elapsed_s / (60 * self.args.minutes)

    def batch(self) -> Tensor:
        """Random sequences, each from a random domain: (batch, sequence)."""
        rows = []
        for domain in torch.randint(len(self.texts), (self.args.batch,), generator=self.random).tolist():
            text = self.texts[domain]
            start = int(torch.randint(len(text) - self.args.sequence + 1, (), generator=self.random))
            rows.append(text[start : start + self.args.sequence])
        return torch.stack(rows)

    def train_step(self) -> None:
        """One step of the optimizer on the master weights, gradient norm clipped at 1; the model's weights follow."""
        start = time.monotonic()
        rate = self.args.lr * rate_share(self.step, self.progress, self.args.warmup, self.args.decay)
        ids = self.batch()
        output = self.model(input_ids=ids, output_router_logits=True, use_cache=False)
        loss, balance = next_token_loss(output.logits, ids), load_balance(output.router_logits, self.args.top_k)
        (loss + self.args.balance * balance).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float()
        nn.utils.clip_grad_norm_(self.masters, 1.0, error_if_nonfinite=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        self.model.zero_grad()
        self.step += 1
        self.elapsed_s += time.monotonic() - start
        self.log.append([self.step, round(self.elapsed_s, 1), loss.item(), balance.item(), rate])

    def save_state(self, path: Path) -> None:
        """Writes everything that `load_state` needs, whole or not at all."""
        state = {
            "settings": {name: getattr(self.args, name) for name in MUST_MATCH},
            "masters": self.masters,
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "log": self.log,
        }
        unfinished = path.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load_state(self, path: Path) -> None:
        """Takes a run up where `save_state` left it.

        Raises:
            SystemExit: the state belongs to a model or run of other settings.
        """
        state = torch.load(path, weights_only=True)
        settings = {name: getattr(self.args, name) for name in MUST_MATCH}
        if state["settings"] != settings:
            raise SystemExit(f"{path} was written with {state['settings']}, not with {settings}: give the same options")
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.weights, self.masters)
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        self.step, self.elapsed_s, self.log = state["step"], state["elapsed_s"], state["log"]


@torch.no_grad()
def perplexities(model: Qwen3MoeForCausalLM, texts: dict[str, Tensor], rows: int, sequence: int) -> dict[str, float]:
    """Perplexity of each domain on `rows` sequences spread evenly over its held-out text."""
    result = {}
    for name, text in texts.items():
        sequences = text[: len(text) // sequence * sequence].view(-1, sequence)
        ids = sequences[:: max(1, len(sequences) // rows)][:rows]
        result[name] = math.exp(next_token_loss(model(input_ids=ids, use_cache=False).logits, ids).item())
    return result


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, train, heldout = load_texts(args)
    model = build_model(args, tokenizer)
    trainer = Trainer(args, model, train)
    state = args.out / "state.pt"
    if args.resume:
        trainer.load_state(state)
    print(f"{model.num_parameters():,} parameters, {sum(map(len, train.values())):,} tokens of {len(train)} domains")
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    saved_s = trainer.elapsed_s
    while trainer.progress < 1 and not stop.is_set():
        trainer.train_step()
        if trainer.step % 20 == 1:
            step, elapsed_s, loss, balance, rate = trainer.log[-1]
            print(
                f"step {step} at {elapsed_s:.0f} s: loss {loss:.3f}, balance {balance:.2f}, lr {rate:.1e}", flush=True
            )
        if trainer.elapsed_s - saved_s > 60 * args.save_minutes:
            trainer.save_state(state)
            saved_s = trainer.elapsed_s
    trainer.save_state(state)
    if stop.is_set():
        raise SystemExit(f"stopped after step {trainer.step}; --resume goes on")
    model.to(torch.bfloat16)
    heldout_perplexity = perplexities(model, heldout, args.evaluation_rows, args.sequence)
    print("held-out perplexity:", ", ".join(f"{name} {value:.2f}" for name, value in heldout_perplexity.items()))
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    record = {
        "settings": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "heldout_perplexity": heldout_perplexity,
        "columns": ["step", "elapsed_s", "loss", "load_balance", "lr"],
        "log": trainer.log,
    }
    (args.out / "train_log.json").write_text(json.dumps(record), "utf-8")


if __name__ == "__main__":
    main()
