"""What is odd about a checkpoint, as far as headers, config and scales tell: a sentence each."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from octomoe.checkpoint.destination import REPORT
from octomoe.checkpoint.ignored import IgnoreList
from octomoe.checkpoint.linears import module_of
from octomoe.checkpoint.names import ExpertLayer, matches
from octomoe.checkpoint.options import ExpertScale
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.scale_statistics import ScaleStatistics
from octomoe.checkpoint.schemes import Scheme
from octomoe.checkpoint.source import Checkpoint
from octomoe.checkpoint.writer import PARTIAL

_TOKENIZERS: Final = re.compile(
    r"tokenizer.*|.*\.(model|tiktoken)|(vocab|merges|tekken|spiece).*", re.IGNORECASE
)
_EXPERT: Final = re.compile(r"(^|[._])(?<!shared_)experts?[._]")
_SCALE: Final = re.compile(r".*\.(weight_scale|weight_scale_inv|input_scale|activation_scale)")
_MAX_NAMED: Final = 3


def find_oddities(
    checkpoint: Checkpoint,
    scheme: Scheme,
    reader: Reader | None,
    scales: Sequence[ScaleStatistics],
) -> list[str]:
    """All that is odd.

    Args:
        checkpoint: what is looked at.
        scheme: what its config says of quantised weights.
        reader: None if its experts cannot be read.
        scales: statistics of the experts' scales.
    """
    found = [*_of_files(checkpoint), *_of_tensors(checkpoint, scheme, reader)]
    if reader is not None:
        found += [*_of_layers(reader), *_of_names(reader), *_of_scales(scales)]
    return found


def runs(numbers: Iterable[int]) -> str:
    """Numbers in words: neighbours joined.

    >>> runs([5, 0, 1, 2])
    '0–2, 5'
    """
    ordered = sorted(set(numbers))
    starts = [n for n in ordered if n - 1 not in ordered]
    ends = [n for n in ordered if n + 1 not in ordered]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in pairs)


def _of_files(checkpoint: Checkpoint) -> Iterator[str]:
    names = checkpoint.store.names()
    if partial := [name for name in names if name.startswith(PARTIAL)]:
        do = "octomoe convert --resume finishes it"
        yield f"an unfinished conversion left {_few(partial)}; {do}"
    if not any(_TOKENIZERS.fullmatch(name) for name in names):
        yield "there is no tokenizer"
    report = checkpoint.json(REPORT)
    options = report.get("options") if isinstance(report, dict) else None
    scale = options.get("expert_scale") if isinstance(options, dict) else None
    if scale == ExpertScale.AVERAGED_LEGACY:
        yield f"{REPORT} says that scales are averaged over experts, which falsifies every expert"


def _of_tensors(checkpoint: Checkpoint, scheme: Scheme, reader: Reader | None) -> Iterator[str]:
    companions = reader.companions if reader else set()
    plain: Counter[str] = Counter()
    has_fp8 = False
    for name, entry in checkpoint.tensors.items():
        has_fp8 |= entry.dtype.startswith("F8_E") and entry.dtype != "F8_E8M0"
        is_scale = name in companions or _SCALE.fullmatch(name)
        if entry.dtype in ("BF16", "F16", "F32") and len(entry.shape) > 1 and not is_scale:
            plain[entry.dtype] += 1
    if len(plain) > 1:
        counts = ", ".join(f"{count} {dtype}" for dtype, count in plain.most_common())
        yield f"unquantised matrices mix dtypes: {counts}"
    if has_fp8 and scheme.method == "none":
        yield "there are FP8 tensors, but config.json states no quantisation"
    if reader is not None and scheme.method != "none" and not reader.scales:
        yield f"config.json states {scheme.method}, but nothing is quantised"
    if scheme.ignored:
        yield from _of_ignored(checkpoint, scheme, reader)


def _of_ignored(checkpoint: Checkpoint, scheme: Scheme, reader: Reader | None) -> Iterator[str]:
    modules = {module_of(name) for name in checkpoint.tensors if name.endswith(".weight")}
    modules |= {layer.module for layer in reader.layers} if reader else set()
    if checkpoint.config.get("tie_word_embeddings"):
        modules.add("lm_head")
    ignored = IgnoreList(scheme)
    if unused := ignored.unused(modules):
        yield f"ignore list entries that match nothing: {_few(unused)}"
    quantized = sorted({module_of(name) for name in reader.scales}) if reader else []
    if wrong := [module for module in quantized if ignored.names(module)]:
        yield f"quantised modules on the ignore list: {_few(wrong)}"


def _of_layers(reader: Reader) -> Iterator[str]:
    main = [layer for layer in reader.layers if not layer.is_mtp]
    mtp = [layer for layer in reader.layers if layer.is_mtp]
    if mtp:
        yield f"multi-token prediction has experts too, in {_where(m.layer for m in mtp)}"
    plain = [layer for layer in reader.layers if not _quantized(reader, layer)]
    if len(plain) < len(reader.layers):
        for layers, what in ((main, ""), (mtp, " of multi-token prediction")):
            if numbers := [layer.layer for layer in layers if layer in plain]:
                where = _where(numbers)
                yield f"experts{what} are not quantised in {where}, but elsewhere they are"
    for layer in reader.layers:
        for role, dtypes in _dtypes(reader, layer).items():
            if len(dtypes) > 1:
                both = " and ".join(sorted(dtypes))
                yield f"layer {layer.layer}: experts differ, {role} is stored as {both}"
    kinds: dict[str, list[int]] = defaultdict(list)
    for layer in main:
        sizes = f"{layer.num_experts} experts of {layer.hidden_size} × {layer.intermediate_size}"
        kinds[f"{sizes}, {layer.layout.name}"].append(layer.layer)
    if len(kinds) > 1:
        stated = (f"{_where(numbers)} {kind}" for kind, numbers in kinds.items())
        yield "layers have different experts: " + "; ".join(stated)


def _of_names(reader: Reader) -> Iterator[str]:
    experts = {name for layer in reader.layers for name in layer.names} | reader.companions
    explained = (*reader.family.router, *reader.family.keep)
    unknown, lost = [], []
    for name in reader.checkpoint.tensors:
        if name in experts:
            continue
        if _SCALE.fullmatch(name):
            lost.append(name)
        elif (
            _EXPERT.search(name)
            and not matches(name, explained)
            and not matches(module_of(name), explained)
        ):
            unknown.append(name)
    if reader.family.spare_experts:
        # Such experts compute nothing, but some checkpoints hold their weights.
        modules = tuple(f"{layer.module}." for layer in reader.layers)
        unknown = [name for name in unknown if not name.startswith(modules)]
    if unknown:
        yield f"tensors among the experts that no record explains: {_few(unknown)}"
    if lost:
        yield f"scales of no quantised tensor: {_few(lost)}"


def _of_scales(scales: Sequence[ScaleStatistics]) -> Iterator[str]:
    for count, what in (
        (sum(s.num_not_positive for s in scales), "zero or negative"),
        (sum(s.num_not_finite for s in scales), "NaN or infinite"),
    ):
        if count:
            bad = [s for s in scales if s.num_not_positive or s.num_not_finite]
            plural = "scale is" if count == 1 else "scales are"
            yield f"{count:,} {plural} {what}, in {_where(s.layer for s in bad)}"
    # One power of two for a whole matrix may well be the same for every expert by chance.
    constant = [s for s in scales if s.is_constant and not (s.is_pow2 and s.least == s.largest)]
    if constant:
        roles = ", ".join(dict.fromkeys(s.role for s in constant))
        where = _where(s.layer for s in constant)
        yield (
            f"all experts have the same scales of {roles} in {where}: shared, or averaged, "
            "which is wrong; octomoe verify --against SRC tells"
        )


def _where(numbers: Iterable[int]) -> str:
    ordered = sorted(set(numbers))
    return f"layer{'s' if len(ordered) > 1 else ''} {runs(ordered)}"


def _quantized(reader: Reader, layer: ExpertLayer) -> bool:
    return any(map(reader.is_quantized, layer.names))


def _dtypes(reader: Reader, layer: ExpertLayer) -> dict[str, set[str]]:
    """Role -> dtypes of its tensors."""
    tensors = reader.checkpoint.tensors
    return {
        part.role: {tensors[layer.tensor(part.role, e)].dtype for e in range(layer.num_experts)}
        for part in layer.layout.parts
    }


def _few(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
