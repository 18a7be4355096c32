"""lm-evaluation-harness: score a loaded model on its tasks."""

from typing import Any

from torch import nn

from octomoe.errors import missing_package


def run_tasks(model: nn.Module, tokenizer: str, tasks: list[str]) -> dict[str, float]:
    """Score a Transformers model.

    Args:
        model: as loaded; experts may have been replaced.
        tokenizer: folder of its tokenizer.
        tasks: names of tasks, e.g. ``"gsm8k"``.

    Returns:
        ``"task metric"`` -> value.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        install = "pip install 'lm-eval[hf]'"
        raise ImportError(missing_package("eval", "lm_eval", "0.4.9", install)) from error
    from transformers import AutoTokenizer

    wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tokenizer))
    results: dict[str, dict[str, Any]] = simple_evaluate(model=wrapped, tasks=tasks)["results"]
    return {
        f"{task} {metric}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
