"""What is shown of a training on a terminal, and where there is none."""

import io
import re
from contextlib import redirect_stdout

import pytest

from reslab.data.check import Checkup
from reslab.terminal import print_checkup, watch

FACTS = {"loss": 0.5, "top1": 0.75, "val_top1": 0.625, "lr": 0.1}


class Terminal(io.StringIO):
    """Holds what a terminal is sent."""

    def isatty(self) -> bool:
        return True

    def seen(self) -> str:
        """What came since the last time, without colours and movements of the cursor."""
        text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.getvalue())
        self.seek(0)
        self.truncate()
        return text


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_a_terminal_shows_a_bar_of_all_steps_and_a_line_for_each_epoch(terminal: Terminal) -> None:
    with redirect_stdout(terminal), watch() as show:
        assert show.progress
        show.step(2, 4, 5, 10, FACTS)
        show.progress.refresh()
        bar = terminal.seen()
        assert "training ━" in bar
        assert "loss 0.500  top-1  75.0%  epoch 2/4" in bar
        [task] = show.progress.tasks
        assert (task.completed, task.total) == (15, 40)
        show.epoch(2, 4, FACTS)
        assert "epoch   2/4  loss 0.500  train top-1  75.0%  val top-1  62.5%" in terminal.seen()
        show.say("[red] is a class, [/] is no markup")
        assert "[red] is a class, [/] is no markup" in terminal.seen()


def test_reading_has_a_bar_of_its_own_until_it_is_done(terminal: Terminal) -> None:
    with redirect_stdout(terminal), watch() as show:
        assert show.progress
        for done in (3, 9, 10, 4):
            show.reading("decoding train", done, 10)
            terminal.seen()  # what rich's own thread may have drawn before
            show.progress.refresh()
            assert ("decoding train" in terminal.seen()) == (done < 10), done


def test_a_pipe_shows_no_bar_although_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with redirect_stdout(io.StringIO()) as piped, watch() as show:
        show.reading("decoding train", 3, 10)
    assert piped.getvalue() == ""


def test_without_a_terminal_there_are_words_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with watch() as show:
        show.reading("decoding train", 3, 10)
        show.step(1, 4, 5, 10, FACTS)
        show.epoch(1, 4, FACTS)
        show.say("testing [red]")
    assert capsys.readouterr().out == "testing [red]\n"


def test_the_table_of_a_checkup_says_what_it_leaves_out_and_takes_a_name_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"width": [8, 8, 8]}
    print_checkup("x[/y] phot[bold]os", 250, Checkup({f"c{i}": {"train": 1} for i in range(250)}, sizes, []))
    out = capsys.readouterr().out
    assert "x[/y] phot[bold]os: 250 images, 250 classes" in out
    assert "and 150 classes more: --json lists all" in out
