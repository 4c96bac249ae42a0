"""What is printed is what was given."""

import pytest

from jaxlm.runtime.console import make_console


@pytest.mark.parametrize("text", ["data [v1]/prep [raw]", "[/x] and [bold]b[/bold]", "a :smile: b"])
def test_text_is_no_markup(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print(text, soft_wrap=True)
    assert capsys.readouterr().out == text + "\n"
