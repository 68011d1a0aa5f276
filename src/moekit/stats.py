"""Statistics of a model on data: sums that add up across batches, domains, runs and machines.

Every quantity is a sum (or, for peaks, a maximum) over real tokens, kept by MoE layer and domain, so that
`stats(A) + stats(B) == stats(A and B)`. Methods read them by name; nothing here knows how they were taken.

Symbols: N domains, E experts, D hidden size, P position buckets, R ranks behind the first, B ratio bins, S sets of
experts (where E <= 8), g_j(t) the weight that the model itself gives expert j on token t, f_j its unweighted output,
T_j the tokens routed to j, h the residual stream before the block, y the routed sum, y_S the same when the router
chooses from S only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moekit.arrays import read_arrays, write_arrays
from moekit.errors import DataError, OutputError, PlanError, did_you_mean
from moekit.layout import Layout
from moekit.markup import html_table

SCHEMA = 1
POSITION_BUCKETS = 21  # bucket b > 0 holds positions 2^(b-1) .. 2^b - 1; bucket 0 is position 0
RATIO_BINS = 1000  # of [0, 1], equally wide; the last holds 1

# name -> (group, shape after the domain axis, what it is)
FIELDS: dict[str, tuple[str, str, str]] = {
    "count": ("scores", "E", "tokens routed to j"),
    "gate_mass": ("scores", "E", "sum of g_j(t)"),
    "sequence_share": ("scores", "E", "sum over sequences of the share of their tokens routed to j (fTRI)"),
    "sequence_share_sq": ("scores", "E", "the same of its square, for intervals"),
    "sequence_mass": ("scores", "E", "sum over sequences of the mean of g_j over their tokens (fTRI)"),
    "sequence_mass_sq": ("scores", "E", "the same of its square, for intervals"),
    "norm": ("scores", "E", "sum over T_j of |f_j| (EAN)"),
    "norm_sq": ("scores", "E", "sum over T_j of |f_j|^2 (MSAN)"),
    "gated_norm": ("scores", "E", "sum over T_j of g_j |f_j| (REAP)"),
    "gated_norm_sq": ("scores", "E", "sum over T_j of g_j^2 |f_j|^2 (what is lost without j)"),
    "routed_norm_sq": ("scores", "", "sum of |y|^2"),
    "easy_ep": ("scores", "E", "sum over T_j of max(0, 1 - cos(h, h + y)) g_j |f_j| (EASY-EP)"),
    "peak": ("scores", "E", "maximum over T_j of |element of f_j| (super experts)"),
    "output": ("outputs", "ED", "sum over T_j of f_j"),
    "gated_output": ("outputs", "ED", "sum over T_j of g_j f_j (REAM)"),
    "logit": ("routing", "E", "sum of router logits"),
    "logit_gram": ("routing", "EE", "sum of products of two experts' router logits"),
    "coactivation": ("routing", "EE", "tokens that chose both i and j (diagonal: count)"),
    "transition": ("routing", "FE", "pairs (i chosen in the previous MoE layer, j chosen here), all pairs of a token"),
    "position_tokens": ("routing", "P", "tokens in a position bucket"),
    "entropy": ("routing", "P", "sum of the router's entropy, nats, by position bucket"),
    "margin": ("routing", "P", "sum of the lowest chosen score less the highest other one, by position bucket"),
    "weight_ratio": ("routing", "RB", "tokens by their r-th largest weight over the largest, r from 2 to k (ODP)"),
    "subset_error": ("subsets", "S", "sum over one token in 8 of |y - y_S|^2, S a bit mask; at 0 of |y|^2 (NAEE)"),
}
MAXIMA = frozenset({"peak"})
PER_SEQUENCE = ("sequence_share", "sequence_share_sq", "sequence_mass", "sequence_mass_sq")  # rows of one forward each
ALWAYS = frozenset({"count", "gate_mass", *PER_SEQUENCE})  # taken whatever the groups
OF_THE_ROUTER = frozenset({"logit", "logit_gram"})  # linear in the router's rows
# With other experts they would have to be measured.
NOT_CARRIED = frozenset({"entropy", "margin", "weight_ratio", "subset_error"})
GROUPS = ("scores", "outputs", "routing", "vocabulary")
ALL_GROUPS = (*GROUPS, "subsets")  # what few methods ask for and costs much is not taken unasked
WORDS = ("vocabulary", "following")  # sparse counts by token id

Origins = Sequence[Mapping[int, float]]  # for each new expert: old experts, with their shares in its router row


def position_bucket(position: np.ndarray) -> np.ndarray:
    """The bucket of each position (0-based): 0, then [1], [2, 3], [4 .. 7], ..."""
    return np.minimum(np.ceil(np.log2(np.asarray(position) + 1)).astype(np.int64), POSITION_BUCKETS - 1)


@dataclass
class LayerStats:
    """One MoE layer's sums.

    Attributes:
        arrays: name of `FIELDS` to float64 array [N, ...] (those with E and D: float32).
        vocabulary: integers [M, 4], sorted: domain, token id, expert, count; input tokens routed to an expert. Expert E
            is a slot that stayed empty: a token id's counts always add up to top_k times its occurrences.
        following: the same of the token that comes next in the text, which the model was to predict there.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    vocabulary: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    following: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))

    def merged(self, other: LayerStats, ours: np.ndarray, theirs: np.ndarray, domains: int) -> LayerStats:
        """What both have, together; `ours` and `theirs` map old domain numbers to new ones."""
        out = LayerStats()
        for name in self.arrays.keys() & other.arrays.keys():
            a, b = self.arrays[name], other.arrays[name]
            total = np.zeros((domains, *a.shape[1:]), a.dtype)
            total[ours] = a
            total[theirs] = np.maximum(total[theirs], b) if name in MAXIMA else total[theirs] + b
            out.arrays[name] = total
        if all(len(x.vocabulary) or not x.arrays["count"].any() for x in (self, other)):  # else one has not counted
            for name in WORDS:
                moved = [_renumbered(getattr(x, name), new) for x, new in ((self, ours), (other, theirs))]
                setattr(out, name, add_up(np.concatenate(moved)))
        return out

    def select(self, domain: int) -> LayerStats:
        """One domain alone, as domain 0."""
        arrays = {name: array[domain : domain + 1] for name, array in self.arrays.items()}
        words = {name: getattr(self, name) for name in WORDS}
        return LayerStats(arrays, **{name: rows[rows[:, 0] == domain] * [0, 1, 1, 1] for name, rows in words.items()})

    def regrouped(self, origins: Origins, before: Origins) -> LayerStats:
        """See `Stats.regrouped`; `before` are the origins of the previous MoE layer's experts."""
        merged = any(len(members) > 1 for members in origins)
        gone = NOT_CARRIED | ({"sequence_share_sq", "sequence_mass_sq"} if merged else set())  # squares of sums
        out = LayerStats()
        for name in self.arrays.keys() - gone:
            array = self.arrays[name]
            for axis, letter in enumerate(FIELDS[name][1], 1):
                groups = {"E": origins, "F": before}.get(letter)
                if groups is not None and name in OF_THE_ROUTER:
                    parts = [sum(share * array.take(e, axis) for e, share in group.items()) for group in groups]
                    array = np.stack(parts, axis)
                elif groups is not None:
                    total = np.max if name in MAXIMA else np.sum
                    array = np.stack([total(array.take(list(group), axis), axis) for group in groups], axis)
            out.arrays[name] = array
        if "coactivation" in out.arrays:
            chosen = range(len(origins))
            out.arrays["coactivation"][:, chosen, chosen] = out.arrays["count"]
        return out

    def save(self, file: Path) -> None:
        """Write one safetensors file."""
        words = {name: getattr(self, name).astype(np.int32) for name in WORDS}
        write_arrays(file, self.arrays | words)

    @classmethod
    def load(cls, file: Path) -> LayerStats:
        """Read what `save` wrote, memory-mapped."""
        arrays = read_arrays(file)
        return cls(arrays, arrays.pop("vocabulary"), arrays.pop("following"))


def _renumbered(vocabulary: np.ndarray, domains: np.ndarray) -> np.ndarray:
    out = vocabulary.astype(np.int64)
    out[:, 0] = domains[out[:, 0]]
    return out


def add_up(rows: np.ndarray) -> np.ndarray:
    """Sorted unique rows [M, 4] with the counts (last column) of equal rows added."""
    if not len(rows):
        return rows.reshape(0, 4)
    rows = rows.astype(np.int64, copy=False)
    keys = rows[:, 0] << 48 | (rows[:, 1] + 1) << 16 | rows[:, 2]
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    return np.concatenate([rows[starts, :3], np.add.reduceat(rows[:, 3], starts)[:, None]], axis=1)


@dataclass
class Stats:
    """Statistics of one model on some domains.

    Attributes:
        layout_hash: of the model's layout.
        domains: names, in the order of the arrays' first axis.
        tokens: int64 [N], real tokens seen by domain.
        sequences: int64 [N].
        layers: by decoder layer index.
        manifest: where they come from (model fingerprint, data hash, versions, settings).
    """

    layout_hash: str
    domains: tuple[str, ...]
    tokens: np.ndarray
    sequences: np.ndarray
    layers: dict[int, LayerStats]
    manifest: dict = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """The measured model's layout (without tensor lists).

        Raises:
            DataError: the manifest does not hold it.
        """
        for part in self.parts:
            if "layout" in part:
                return Layout.from_dict(part["layout"])
        raise DataError("the statistics do not say of which layout they are", fix="measure again with this version")

    @property
    def parts(self) -> list[dict]:
        """Manifests of the measurements that were added up."""
        return self.manifest.get("added", [dict(self.manifest)])

    def get(self, name: str, layer: int, domain: str | Iterable[str] | None = None) -> np.ndarray:
        """A named quantity of a layer, added up (or maximised) over the domains given; all of them for None.

        Raises:
            DataError: unknown name or domain, or the quantity was not measured.
        """
        arrays = self.layers[layer].arrays
        if name not in arrays:
            hint = did_you_mean(name, FIELDS) if name not in FIELDS else f"measure with the group {FIELDS[name][0]!r}"
            raise DataError(f"the statistics hold no {name!r}", fix=hint)
        rows = arrays[name][self.domain_numbers(domain)]
        return rows.max(0) if name in MAXIMA else rows.sum(0)

    def domain_numbers(self, domain: str | Iterable[str] | None) -> list[int]:
        """Numbers of the named domains; all of them for None."""
        if domain is None:
            return list(range(len(self.domains)))
        wanted = [domain] if isinstance(domain, str) else list(domain)
        for name in wanted:
            if name not in self.domains:
                raise DataError(f"the statistics hold no domain {name!r}", fix=did_you_mean(name, self.domains))
        return [self.domains.index(name) for name in wanted]

    def token_count(self, domain: str | Iterable[str] | None = None) -> int:
        """Real tokens seen in the named domains."""
        return int(self.tokens[self.domain_numbers(domain)].sum())

    def select(self, domain: str) -> Stats:
        """One domain alone.

        Raises:
            DataError: unknown domain.
        """
        number = self.domain_numbers(domain)
        layers = {index: layer.select(number[0]) for index, layer in self.layers.items()}
        return Stats(self.layout_hash, (domain,), self.tokens[number], self.sequences[number], layers, self.manifest)

    def __add__(self, other: Stats) -> Stats:
        ours, theirs = (_models(x) for x in (self, other))
        if ours != theirs or self.layers.keys() != other.layers.keys():
            raise PlanError(
                "statistics of different models cannot be added",
                expected=", ".join(sorted(ours)),
                got=", ".join(sorted(theirs)),
                fix="measure both texts on the same model",
            )
        domains = tuple(dict.fromkeys((*self.domains, *other.domains)))
        a, b = (np.array([domains.index(x) for x in part.domains], np.int64) for part in (self, other))

        def total(mine: np.ndarray, its: np.ndarray) -> np.ndarray:
            out = np.zeros(len(domains), np.int64)
            out[a] += mine
            out[b] += its
            return out

        return Stats(
            self.layout_hash,
            domains,
            total(self.tokens, other.tokens),
            total(self.sequences, other.sequences),
            {i: x.merged(other.layers[i], a, b, len(domains)) for i, x in self.layers.items()},
            {"added": [*self.parts, *other.parts]},
        )

    def regrouped(self, origins: Mapping[int, Origins], layout: Layout, fingerprint: str) -> Stats:
        """What can be said, without running it, of a model whose experts were made of some of this one's.

        An approximation where experts have gone: what their tokens do now is not in it, and a token that had chosen two
        experts which are one now counts twice. Counts of words are left out, and what `NOT_CARRIED` names.

        Args:
            origins: by layer, for each new expert the experts that it is made of, the dominant one first, with their
                shares in its router row; {3: 1.0} is the old expert 3.
            layout: of the new model.
            fingerprint: of the new model.
        """
        layers, before = {}, None
        for index, layer in sorted(self.layers.items()):
            layers[index] = layer.regrouped(origins[index], origins[index] if before is None else before)
            before = origins[index]
        first = {"model", "fingerprint"}
        parts = []
        for part in self.parts:
            known = part.get("carried_from", {key: part[key] for key in first & part.keys()})
            parts.append(part | {"layout": layout.to_dict(), "fingerprint": fingerprint, "carried_from": known})
        manifest = parts[0] if "added" not in self.manifest else {"added": parts}
        return Stats(layout.hash, self.domains, self.tokens, self.sequences, layers, manifest)

    def __repr__(self) -> str:
        tokens = int(self.tokens.sum())
        return f"<Stats of {len(self.layers)} MoE layers on {tokens:,} tokens of {', '.join(self.domains)}>"

    def _repr_html_(self) -> str:
        rows = zip(self.domains, self.tokens.tolist(), self.sequences.tolist(), strict=True)
        measured = {name for layer in self.layers.values() for name in layer.arrays}
        caption = f"{repr(self)[1:-1]}; measured: {', '.join(x for x in FIELDS if x in measured)}"
        return html_table(caption, ("domain", "tokens", "sequences"), rows)

    def save(self, folder: str | Path) -> Path:
        """Write a folder: stats.json (manifest) and one safetensors file a layer; appears whole or not at all.

        Raises:
            OutputError: the folder holds something else than statistics.
        """
        final = Path(folder)
        self.check_place(final)
        part = final.with_name(final.name + ".partial")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for index, layer in self.layers.items():
            layer.save(part / layer_file(index))
        self.save_head(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        return final

    @staticmethod
    def check_place(folder: Path) -> None:
        """Refuse a folder that holds something else than statistics.

        Raises:
            OutputError: it does, or it is a file.
        """
        taken = any(folder.iterdir()) if folder.is_dir() else folder.exists()
        if taken and not (folder / "stats.json").is_file():
            raise OutputError(
                "the folder for statistics holds something else",
                where=folder,
                expected="a new or empty folder, or one with stats.json",
                fix="choose another folder",
            )

    def save_head(self, folder: Path) -> None:
        """Write stats.json alone, for who writes the layers' files as they come."""
        head = {
            "schema": SCHEMA,
            "layout_hash": self.layout_hash,
            "domains": list(self.domains),
            "tokens": self.tokens.tolist(),
            "sequences": self.sequences.tolist(),
            "layers": sorted(self.layers),
            "manifest": self.manifest,
        }
        (folder / "stats.json").write_text(json.dumps(head, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> Stats:
        """Read what `save` wrote.

        Raises:
            DataError: no statistics there, another schema, or a damaged file.
        """
        path = Path(folder)
        try:
            head = json.loads((path / "stats.json").read_text())
            if head["schema"] != SCHEMA:
                raise DataError(
                    "statistics of another version",
                    where=path,
                    expected=SCHEMA,
                    got=head["schema"],
                    fix="measure again",
                )
            layers = {index: LayerStats.load(path / layer_file(index)) for index in head["layers"]}
            tokens, sequences = (np.array(head[name], np.int64) for name in ("tokens", "sequences"))
            return cls(head["layout_hash"], tuple(head["domains"]), tokens, sequences, layers, head["manifest"])
        except FileNotFoundError as error:
            raise DataError(
                "these are no statistics",
                where=error.filename,
                expected="a folder written by `moekit measure`",
                fix="measure first, or give the folder that holds stats.json",
            ) from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(
                "the statistics are damaged", where=path, got=str(error)[:200], fix="measure again"
            ) from None


def layer_file(index: int) -> str:
    """The name of a layer's file."""
    return f"layer-{index:04d}.safetensors"


def _models(stats: Stats) -> set[str]:
    """Layout and weights that the statistics are of."""
    return {f"{stats.layout_hash} {part.get('fingerprint', '')}" for part in stats.parts}
