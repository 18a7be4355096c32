"""Claims: messages say function, argument, what came, what is needed and what to do, in this order;
nothing is added where there is nothing to do.
"""

from octomoe.errors import missing_package, refusal


def test_refusal_says_everything_in_order():
    message = refusal(
        "grouped_gemm",
        "w.scale",
        "has shape (8, 28, 56)",
        "(8, 56, 16)",
        "was it saved for another projection?",
    )
    assert message == (
        "grouped_gemm: w.scale has shape (8, 28, 56), but needs (8, 56, 16); "
        "was it saved for another projection?"
    )


def test_refusal_without_advice_ends_with_the_need():
    assert refusal("quantize", "x", "is None", "a tensor") == (
        "quantize: x is None, but needs a tensor"
    )


def test_refusal_takes_any_printable_value():
    assert refusal("f", "x", (1, 2), 3) == "f: x (1, 2), but needs 3"


def test_missing_package_names_the_floor_and_the_install_line():
    message = missing_package("report", "matplotlib", "3.9", "pip install 'octomoe[report]'")
    assert message == (
        "report: needs the package matplotlib (3.9 or newer), which is not installed; "
        "run: pip install 'octomoe[report]'"
    )
