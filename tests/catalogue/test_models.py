import pytest

import reslab
from reslab.catalogue.models import amount, listing, models
from reslab.family import FAMILY


def names(*patterns: str, **filters: object) -> list[str]:
    return [model.name for model in models(patterns, **filters)]  # type: ignore[arg-type]


def test_without_a_pattern_the_whole_family_is_listed_in_its_order() -> None:
    assert names() == list(FAMILY)


def test_patterns_are_globs_of_names_or_text_in_name_and_origin() -> None:
    assert names("RESNET1?2") == ["resnet152"]
    assert names("wrn*", "resnet18") == ["wrn40-4", "wrn16-8", "wrn28-10", "wrn28-10-dropout", "resnet18", "resnet18d", "se_resnet18", "resnet18_blur"]
    assert set(names("bello 2021")) == {name for name in FAMILY if name.startswith("resnetrs")}


def test_filters_narrow_what_patterns_found() -> None:
    assert names("plain", image_size=224) == ["plain18", "plain34"]
    assert names("plain", image_size=32, max_params="500k") == ["plain20", "plain32"]


def test_orders() -> None:
    costs = [model.cost for model in models(sort="params")]
    assert [cost.params for cost in costs] == sorted(cost.params for cost in costs)
    costs = [model.cost for model in models(sort="macs")]
    assert [cost.macs for cost in costs] == sorted(cost.macs for cost in costs)
    assert names("plain*", sort="name") == ["plain18", "plain20", "plain32", "plain34", "plain44", "plain56", "plain110"]
    best = models(sort="top1")
    assert best[0].name == "resnext29_8x64d"
    known = [model.row.top1 is not None for model in best]
    assert known == sorted(known, reverse=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models(["resnet19"]), "received 'resnet19': did you mean 'resnet1"),
        (lambda: models(["resnet50", "wideresnett50*"]), "received 'wideresnett50*': did you mean 'wide_resnet50_2'"),
        (lambda: models(["\x1b]2J"]), r"received '\\x1b]2J': `reslab models` lists them"),
        (lambda: models(["wrn"], max_params="1M"), "of 4 none has this"),
        (lambda: models(image_size=31), f"of {len(FAMILY)} none has this"),
        (lambda: models(max_params="many"), "--max-params must be a number such as 800k, 5M or 1.5G; received 'many'"),
        (lambda: models(max_params="9" * 5000), "must be a number"),
    ],
)
def test_nothing_found_is_an_error_of_one_line(call: object, message: str) -> None:
    with pytest.raises(reslab.CallError, match=message.replace("*", r"\*")) as raised:
        call()  # type: ignore[operator]
    assert "\n" not in str(raised.value)


def test_amounts_have_units() -> None:
    assert [amount(text) for text in ("269722", "1,000", "800k", "1.5G", " 5M ")] == [269_722, 1000, 800_000, 1_500_000_000, 5_000_000]


def test_the_listing_says_what_was_published_where() -> None:
    heading, _, row, note = listing(models(["resnet110_conv*"]), None)
    assert heading.split("  ")[0] == "net"
    for part in ("1,826,202", "266.8 M", "32 px", "87.78%", "He 2016 (1603.05027), table 1", "CIFAR-10"):
        assert part in row
    assert note.startswith("1 net, counted")
    assert "within one source only" in note


def test_a_narrow_terminal_gets_no_longer_lines() -> None:
    assert max(map(len, listing(models(), 80)[:-1])) == 80
