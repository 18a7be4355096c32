"""Read a converted checkpoint again and hold it against its source."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from threading import Lock

import torch

from octomoe.checkpoint.ignored import IgnoreList
from octomoe.checkpoint.linears import module_of, plain_linears
from octomoe.checkpoint.names import ExpertLayer, Role, natural_order
from octomoe.checkpoint.neuron import rename
from octomoe.checkpoint.noise import WeightCheck, check_weight
from octomoe.checkpoint.reader import Expert, Reader
from octomoe.checkpoint.schemes import MODELOPT_CONFIG, NEURON_CONFIG, NEURON_TYPES
from octomoe.checkpoint.source import Checkpoint
from octomoe.checkpoint.stream import default_workers, run_all

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ProjectionQuality:
    """How one projection of a layer's experts was kept; one entry per expert.

    Attributes:
        module: the source's experts module.
        layer: its number.
        role: gate, up or down.
        sqnr_db: signal to quantisation noise ratio, infinite where nothing changed.
        scale_min, scale_max: of the expert's weight scales; 1 if it is not quantised.
    """

    module: str
    layer: int
    role: str
    sqnr_db: list[float]
    scale_min: list[float]
    scale_max: list[float]


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        problems: one sentence each; empty if all is well.
        num_tensors: tensors that were read.
        num_identical: of them, identical to the source's byte for byte.
        num_quantized: quantised matrices compared with the source.
        quality: per layer and projection.
        lowest_sqnr_db: of all quantised matrices; infinite if there are none.
    """

    problems: list[str]
    num_tensors: int
    num_identical: int
    num_quantized: int
    quality: list[ProjectionQuality] = field(default_factory=list)
    lowest_sqnr_db: float = inf

    @property
    def is_sound(self) -> bool:
        """Whether nothing is off."""
        return not self.problems


def verify_checkpoint(
    dst: str | Path,
    *,
    against: str | Path,
    family_file: str | Path | None = None,
    workers: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Verification:
    """Check that a converted checkpoint means what its source means.

    Every tensor of the source is there, and nothing else; what should pass through is identical;
    quantised weights hold no NaN byte (on Neuron none above 240), their scales are positive and
    finite, and bytes times scales come within the format's noise of the source, expert by expert;
    config.json names as unquantised exactly what is not quantised.

    Args:
        dst: the converted checkpoint.
        against: what it was made from.
        family_file: further family records.
        workers: threads; by default one per core.
        on_progress: called with tensors done and in all, from worker threads.

    Returns:
        What was found; `Verification.is_sound` if all is well.

    Raises:
        ValueError: one of the two is no readable checkpoint at all.
        OSError: something cannot be read.
    """
    records = None if family_file is None else Path(family_file)
    check = _Check(Reader(Checkpoint(dst), records), Reader(Checkpoint(against), records))
    tasks = [*check.expert_tasks(), *check.other_tasks()]
    lock, done = Lock(), 0

    def counted(task: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            nonlocal done
            task()
            with lock:
                done += 1
            on_progress(done, len(tasks))

        return run

    run_all(map(counted, tasks), workers or default_workers())
    return check.result()


class _Check:
    """Compares two readers; tasks may run on several threads."""

    def __init__(self, made: Reader, source: Reader) -> None:
        self.made, self.source = made, source
        self._is_neuron = made.scheme.method == "neuron"
        self._lock = Lock()
        self._problems: list[str] = []
        self._num_identical = self._num_quantized = 0
        self._lowest = inf
        # (module, role) -> expert -> check
        self._checks: dict[tuple[str, str], dict[int, WeightCheck]] = {}
        self._layers = self._pair_layers()
        self._expected: set[str] = {n for layer in made.layers for n in layer.names}
        self._expected |= made.companions

    def expert_tasks(self) -> Iterator[Callable[[], None]]:
        """One per expert."""
        for theirs, ours in self._layers:
            for e in range(theirs.num_experts):
                yield lambda theirs=theirs, ours=ours, e=e: self._expert(theirs, ours, e)  # type: ignore[misc]

    def other_tasks(self) -> Iterator[Callable[[], None]]:
        """One per tensor of the source that is no expert's."""
        experts = {name for layer in self.source.layers for name in layer.names}
        for name in self.source.checkpoint.tensors:
            if name not in experts and name not in self.source.companions:
                yield lambda name=name: self._tensor(name)  # type: ignore[misc]

    def result(self) -> Verification:
        """What was found."""
        tensors = self.made.checkpoint.tensors
        extra = sorted(set(tensors) - self._expected)
        if extra:
            self._problems.append(f"{len(extra)} tensors have no source, e.g. {extra[0]}")
        self._check_ignored()
        self._check_static()
        self._check_side_config()
        quality = []
        for theirs, _ in self._layers:
            for role in Role:
                checks = self._checks.get((theirs.module, role))
                if checks:
                    ordered = [checks[e] for e in sorted(checks)]
                    quality.append(
                        ProjectionQuality(
                            theirs.module,
                            theirs.layer,
                            role,
                            [c.sqnr_db for c in ordered],
                            [c.scale_min for c in ordered],
                            [c.scale_max for c in ordered],
                        )
                    )
        return Verification(
            sorted(self._problems, key=natural_order),
            len(tensors),
            self._num_identical,
            self._num_quantized,
            quality,
            self._lowest,
        )

    def _pair_layers(self) -> list[tuple[ExpertLayer, ExpertLayer]]:
        ours = {(layer.layer, layer.is_mtp): layer for layer in self.made.layers}
        pairs = []
        for theirs in self.source.layers:
            found = ours.pop((theirs.layer, theirs.is_mtp), None)
            if found is None:
                self._problems.append(f"{theirs.module}: the layer's experts are missing")
            elif found.num_experts != theirs.num_experts:
                counts = f"{found.num_experts} experts, {theirs.num_experts} in the source"
                self._problems.append(f"{theirs.module}: {counts}")
            else:
                pairs.append((theirs, found))
        self._problems += [f"{left.module}: experts without a source" for left in ours.values()]
        return pairs

    def _expert(self, theirs: ExpertLayer, ours: ExpertLayer, expert: int) -> None:
        source = self.source.expert(theirs, expert)
        made = self.made.expert(ours, expert)
        for role, weight in source.weights.items():
            what = f"{theirs.module}, expert {expert}, {role}"
            check = check_weight(made.weights[role], weight, self._is_neuron)
            self._note(what, check)
            with self._lock:
                self._checks.setdefault((theirs.module, role), {})[expert] = check
        self._compare_biases(theirs, expert, source, made)
        for role, scale in made.input_scales.items():
            if not 0 < scale.item() < inf:
                self._report(
                    f"{theirs.module}, expert {expert}, {role}: input scale {scale.item()}"
                )

    def _compare_biases(
        self, layer: ExpertLayer, expert: int, source: Expert, made: Expert
    ) -> None:
        if set(source.biases) != set(made.biases):
            self._report(f"{layer.module}, expert {expert}: biases are missing")
            return
        for role, bias in source.biases.items():
            stored, extra = made.biases[role][: bias.shape[0]], made.biases[role][bias.shape[0] :]
            if not torch.equal(stored, bias) or extra.any():
                self._report(f"{layer.module}, expert {expert}, {role}: the bias differs")

    def _tensor(self, name: str) -> None:
        new_name = rename(self.source.family, name) if self._is_neuron else name
        made, source = self.made.checkpoint, self.source.checkpoint
        if new_name not in made.tensors:
            self._report(f"{new_name} is missing")
            return
        with self._lock:
            self._expected.add(new_name)
        if self.made.is_quantized(new_name) or self.source.is_quantized(name):
            if self._are_same_bytes(name, new_name):
                self._count_identical()
            else:
                weight = self.made.weight(new_name)
                self._note(
                    new_name, check_weight(weight, self.source.weight(name), self._is_neuron)
                )
        elif self._are_same_bytes(name, new_name):
            self._count_identical()
        else:
            ours, theirs = made.tensors[new_name], source.tensors[name]
            shapes = f"{ours.dtype} {list(ours.shape)} against {theirs.dtype} {list(theirs.shape)}"
            self._report(f"{new_name} is not the source's ({shapes})")

    def _are_same_bytes(self, name: str, new_name: str) -> bool:
        made, source = self.made.checkpoint, self.source.checkpoint
        ours, theirs = made.tensors[new_name], source.tensors[name]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return False
        scales = self.source.companions_of(name)
        same = all(
            torch.equal(a, b)
            for (_, a), (_, b) in zip(made.chunks(new_name), source.chunks(name), strict=True)
        )
        return same and all(
            each in made.tensors and torch.equal(made.read(each), source.read(each))
            for each in scales
        )

    def _check_static(self) -> None:
        """What config.json says of input scales against those that are stored."""
        covered = {n for x in self.made.layers if self.made.layer_companions(x) for n in x.names}
        own = {n for n in self.made.scales if len(self.made.companions_of(n)) > 1}
        lacking = [n for n in self.made.scales if n not in own | covered]
        num_stored = len(self.made.scales) - len(lacking)
        if self.made.scheme.is_static:
            self._problems += [
                f"config.json says activations are static, but {module_of(name)} has no input scale"
                for name in lacking
            ]
        elif num_stored:
            got = f"but {num_stored} input scales are stored"
            self._problems.append(f"config.json says activations are dynamic, {got}")

    def _check_side_config(self) -> None:
        """What an engine's own configuration says against config.json and the scales."""
        checkpoint, scheme = self.made.checkpoint, self.made.scheme
        if scheme.method == "modelopt" and (stated := checkpoint.json(MODELOPT_CONFIG)):
            theirs = stated.get("quantization") or {}
            algorithm = (checkpoint.config.get("quantization_config") or theirs).get("quant_algo")
            names = sorted(theirs.get("exclude_modules") or ())
            if theirs.get("quant_algo") != algorithm or names != sorted(scheme.ignored):
                self._problems.append(f"{MODELOPT_CONFIG} and config.json disagree")
        if scheme.method == "neuron":
            kind = checkpoint.json(NEURON_CONFIG)["quantization_type"]
            for layer in self.made.layers:
                scale = checkpoint.tensors.get(self.made.scales.get(layer.names[0], ""))
                is_one = scale is not None and scale.shape[0] == 1 < layer.num_experts
                if scale is not None and kind != NEURON_TYPES[not is_one]:
                    got = f"{scale.name} has shape {list(scale.shape)}"
                    self._problems.append(f"{NEURON_CONFIG} says {kind}, but {got}")

    def _check_ignored(self) -> None:
        """The ignore list against the real names."""
        scheme = self.made.scheme
        if scheme.method == "none":
            self._problems.append("config.json states no quantisation")
            return
        has_tied_head = bool(self.made.checkpoint.config.get("tie_word_embeddings"))
        modules = {module_of(n) for n in self.made.checkpoint.tensors if n.endswith(".weight")}
        modules |= {layer.module for layer in self.made.layers}
        if has_tied_head:
            modules.add("lm_head")
        ignored = IgnoreList(scheme)
        for entry in ignored.unused(modules):
            self._problems.append(f"config.json's ignore entry {entry!r} names nothing")
        for module in sorted({module_of(name) for name in self.made.scales}):
            if ignored.names(module):
                self._problems.append(f"config.json says {module} is not quantised, but it is")
        for module in plain_linears(self.made):
            if not ignored.names(module):
                self._problems.append(f"config.json does not say that {module} is not quantised")

    def _note(self, what: str, check: WeightCheck) -> None:
        for problem in check.problems:
            self._report(f"{what}: {problem}")
        with self._lock:
            self._num_quantized += check.is_quantized
            if check.is_quantized:
                self._lowest = min(self._lowest, check.sqnr_db)

    def _count_identical(self) -> None:
        with self._lock:
            self._num_identical += 1

    def _report(self, problem: str) -> None:
        with self._lock:
            self._problems.append(problem)
