"""A config's list of unquantised modules against real names, as the engines match it."""

import re
from collections.abc import Iterable
from fnmatch import translate

from octomoe.checkpoint.schemes import Scheme


class IgnoreList:
    """The modules that a scheme says are not quantised.

    Exact names everywhere; besides, ``re:`` entries of compressed-tensors, globs of ModelOpt,
    substrings of Neuron, and elsewhere a module stands for all within it.
    """

    def __init__(self, scheme: Scheme) -> None:
        self._entries = scheme.ignored
        self._exact = set(scheme.ignored)
        self._covers_children = scheme.method not in ("compressed-tensors", "neuron")
        self._patterns: dict[str, re.Pattern[str]] = {}
        for entry in scheme.ignored:
            if scheme.method == "compressed-tensors" and entry.startswith("re:"):
                self._patterns[entry] = re.compile(entry.removeprefix("re:"))
            elif scheme.method == "modelopt" and any(c in entry for c in "*?["):
                self._patterns[entry] = re.compile(translate(entry))
            elif scheme.method == "neuron":
                self._patterns[entry] = re.compile(".*" + re.escape(entry))

    def names(self, module: str) -> bool:
        """Whether a module is named."""
        if module in self._exact:
            return True
        if self._covers_children:
            parent = module.rpartition(".")[0]
            while parent:
                if parent in self._exact:
                    return True
                parent = parent.rpartition(".")[0]
        return any(pattern.match(module) for pattern in self._patterns.values())

    def unused(self, modules: Iterable[str]) -> list[str]:
        """Entries that name none of the modules."""
        present = set(modules)
        parents = set()
        for module in present if self._covers_children else ():
            while module:
                parents.add(module)
                module = module.rpartition(".")[0]
        return [
            entry
            for entry in self._entries
            if entry not in present
            and entry not in parents
            and not (
                entry in self._patterns and any(self._patterns[entry].match(m) for m in present)
            )
        ]
