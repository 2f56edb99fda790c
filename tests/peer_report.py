"""A plugin that ends a run with the comparisons that the suite could not make."""

from tests import peer


def pytest_terminal_summary(terminalreporter):
    if not peer.missing:
        return
    terminalreporter.section("THE PEER WAS NOT THERE: THE DROP-IN WAS NOT COMPARED", sep="!", red=True, bold=True)
    for what, why in peer.missing.items():
        terminalreporter.write_line(f"{what}: {why}", red=True)
    terminalreporter.write_line(f"Tests that need it were skipped. {peer.REQUIRE}=1 makes them fail instead.", red=True)
