"""How this library words a refusal: function, argument, what came, what is needed, what to do."""


def refusal(function: str, argument: str, got: object, needs: object, do: str = "") -> str:
    """Compose one error message.

    Args:
        function: public name the caller used, e.g. ``"quantize"``.
        argument: argument (or attribute of it) that is wrong, e.g. ``"w.scale"``.
        got: what came, worded to follow the argument's name, e.g. ``"has shape (3, 4)"``.
        needs: what is needed, worded to follow "needs".
        do: what the caller can do about it; left out when the need says it already.

    Returns:
        The message, e.g. ``"quantize: x has dtype torch.int8, but needs a float dtype"``.

    >>> refusal("quantize", "x", "has dtype torch.int8", "a floating-point tensor", "cast it first")
    'quantize: x has dtype torch.int8, but needs a floating-point tensor; cast it first'
    """
    message = f"{function}: {argument} {got}, but needs {needs}"
    return f"{message}; {do}" if do else message


def missing_package(function: str, package: str, floor: str, install: str) -> str:
    """Compose the message for an optional package that is not installed.

    >>> missing_package("f", "jinja2", "3.1", "pip install jinja2")
    'f: needs the package jinja2 (3.1 or newer), which is not installed; run: pip install jinja2'
    """
    return (
        f"{function}: needs the package {package} ({floor} or newer), which is not installed; "
        f"run: {install}"
    )
