"""The mini-language of config strings."""

import pytest

from cv_jax.config.calls import (
    Call,
    build,
    build_one,
    parse,
)
from cv_jax.config.errors import UserError

TABLE = {
    "crop": lambda padding, mode="reflect": ("crop", padding, mode),
    "flip": lambda: ("flip",),
    "sizes": lambda *sizes, fill=0: ("sizes", sizes, fill),
}


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("", []),
        ("  \n", []),
        ("flip", [Call("flip", (), {})]),
        ("flip()", [Call("flip", (), {})]),
        (" crop( 4 ) ", [Call("crop", (4,), {})]),
        ("crop(-4, mode='zero')", [Call("crop", (-4,), {"mode": "zero"})]),
        (
            "a(1)|b(2.5, x=(1, 1e-3))|c([True, None])",
            [
                Call("a", (1,), {}),
                Call("b", (2.5,), {"x": (1, 0.001)}),
                Call("c", ([True, None],), {}),
            ],
        ),
        ("a|(b|c)", [Call("a", (), {}), Call("b", (), {}), Call("c", (), {})]),
    ],
)
def test_parse_reads_calls_in_order(text, calls):
    assert parse(text) == calls


@pytest.mark.parametrize(
    "text",
    [
        "crop(4",
        "crop(4) flip",
        "crop(4)|",
        "crop(4)+flip",
        "crop(size)",
        "crop(2 * 2)",
        "crop(*[4])",
        "crop(**{'padding': 4})",
        "crop(padding=4, padding=4)",
        "crop({[]: 4})",
        "np.crop(4)",
        "crop(4)(5)",
        "'crop'",
        "crop(__import__('os'))",
        "crop\0",
    ],
)
def test_parse_refuses_what_is_no_chain_of_literal_calls(text):
    with pytest.raises(UserError, match=r"is not understood: write .* such as 'crop\(4\)\|flip'"):
        parse(text)


def test_build_calls_the_functions_in_order():
    built = build("crop(4)|flip|crop(2, mode='zero')|sizes(1, 2, fill=3)", TABLE, "augmentation")
    assert built == [
        ("crop", 4, "reflect"),
        ("flip",),
        ("crop", 2, "zero"),
        ("sizes", (1, 2), 3),
    ]
    assert build("", TABLE, "augmentation") == []


def test_an_unknown_name_gets_the_nearest_one_and_the_list():
    with pytest.raises(UserError) as error:
        build("flip|crp(4)", TABLE, "augmentation")
    assert str(error.value) == (
        "Unknown augmentation 'crp'. Did you mean 'crop'? There are: crop, flip, sizes; or name a "
        "function of your own as 'module:function'."
    )


@pytest.mark.parametrize("text", ["crop", "crop(4, 'zero', 1)", "crop(4, size=1)", "flip(1)"])
def test_wrong_arguments_show_how_the_call_is_written(text):
    name = text.partition("(")[0]
    written = {"crop": "crop(padding, mode='reflect').", "flip": "flip()."}[name]
    with pytest.raises(UserError) as error:
        build(text, TABLE, "augmentation")
    assert str(error.value).startswith(f"augmentation {name!r}: ")
    assert str(error.value).endswith(f"Write it as {written}")


def test_the_reason_that_a_function_gives_is_shown():
    def crop(padding: int):
        raise ValueError(f"padding={padding} must be >= 0")

    with pytest.raises(UserError) as error:
        build("crop(-1)", {"crop": crop}, "augmentation")
    assert str(error.value) == (
        "augmentation 'crop': padding=-1 must be >= 0. Write it as crop(padding: int)."
    )


def test_context_goes_to_the_functions_that_name_it_wherever_they_do():
    table = {
        "first": lambda num_classes, width=8: (num_classes, width),
        "last": lambda width, *, num_classes: (num_classes, width),
        "none": lambda width: width,
    }
    built = build("first|first(4)|first(width=5)|last(6)|none(7)", table, "model", num_classes=10)
    assert built == [(10, 8), (10, 4), (10, 5), (10, 6), 7]


def test_context_is_neither_set_nor_shown():
    table = {"lenet": lambda num_classes, width=8: None}
    with pytest.raises(UserError, match=r"Write it as lenet\(width=8\)\.") as error:
        build("lenet(num_classes=3)", table, "model", num_classes=10)
    assert "unexpected keyword argument 'num_classes'" in str(error.value)


def test_build_one_wants_exactly_one_call():
    assert build_one("crop(4)", TABLE, "augmentation") == ("crop", 4, "reflect")
    for text in ("", "flip|flip"):
        with pytest.raises(UserError, match="expected one of crop, flip, sizes"):
            build_one(text, TABLE, "augmentation")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f('a')", "number='a' must be float, with numbers of at most 32 bits"),
        ("f(True)", "number=True must be float"),
        ("f(1e999)", "number=inf must be float"),
        ("f(1, whole=1.0)", "whole=1.0 must be int"),
        (f"f(1, {2**31})", "whole=2147483648 must be int"),
        ("f(1, pair=(1, 2, 3))", "pair=(1, 2, 3) must be tuple[float, float] | None"),
        ("f(1, mode=1)", "mode=1 must be str"),
    ],
)
def test_an_argument_is_what_its_annotation_says(text, message):
    def f(
        number: float,
        whole: int = 1,
        pair: tuple[float, float] | None = None,
        mode: str = "a",
    ):
        return number

    table = {"f": f}
    assert build_one("f(1, 2, [1, 0.5], 'b')", table, "key") == 1
    assert build_one("f(0.5, pair=None)", table, "key") == 0.5
    with pytest.raises(UserError) as error:
        build_one(text, table, "key")
    assert message in str(error.value)
