"""The live view of `dtrain watch`; needs textual."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Footer, Static

from dtrain.monitoring.watch import read_states, render_run

EVERY_SECONDS = 2.0


class WatchApp(App[None]):
    """Several runs, read again every few seconds; q ends it.

    Raises:
        UserError: a folder is not a run folder.
    """

    TITLE = "dtrain watch"
    BINDINGS = [("q", "quit", "Quit")]  # noqa: RUF012 - as textual declares it

    def __init__(self, folders: Sequence[Path]) -> None:
        super().__init__()
        read_states(folders)  # a wrong folder is an error before the screen is cleared
        self._folders = folders

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            for number in range(len(self._folders)):
                yield Static(id=f"run{number}")
        yield Footer()

    def on_mount(self) -> None:
        self.refresh_runs()
        self.set_interval(EVERY_SECONDS, self.refresh_runs)

    def refresh_runs(self) -> None:
        """Read the runs again and show them."""
        for number, state in enumerate(read_states(self._folders)):
            self.query_one(f"#run{number}", Static).update(render_run(state))
